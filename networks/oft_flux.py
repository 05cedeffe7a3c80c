# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.oft_flux: OFT for FLUX.1 and Chroma.

The attention layers of the double blocks; with enable_all_linear all Linear layers of all blocks. q, k, v and the MLP
of a fused layer are rotated apart, each by blocks of its own: `oft_blocks.0`, `oft_blocks.1` and so on in a file.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.oft import NUMBERED_OFT
from library.families.adapters import adapter_tables
from library.families.flux.targets import OFT_TARGETS

BUILDER = NetworkBuilder("networks.oft_flux", NUMBERED_OFT, OFT_TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
