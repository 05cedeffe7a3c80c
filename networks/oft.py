# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.oft: OFT for the U-Nets of Stable Diffusion 1.x, 2.x and XL.

The Linear layers of attention; with enable_all_linear all Linear layers and 1x1 convolutions of the transformer blocks,
with enable_conv also those of the residual blocks. `--network_dim` is the number of blocks per layer.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.oft import OFT
from library.families.adapters import adapter_tables, unets
from library.families.sd.targets import UnetOftTargets

BUILDER = NetworkBuilder("networks.oft", OFT, UnetOftTargets(unets()), adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
