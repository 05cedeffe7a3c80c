# SPDX-License-Identifier: Apache-2.0
"""Adapters of Chroma are on the layers that those of FLUX.1 are on."""

from library.families.flux import targets

TARGETS = targets.TARGETS
