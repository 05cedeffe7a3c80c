# SPDX-License-Identifier: Apache-2.0
"""Adapter files of Chroma name its layers as those of FLUX.1 do."""

from library.families.flux import adapter_names

TABLES = adapter_names.TABLES
