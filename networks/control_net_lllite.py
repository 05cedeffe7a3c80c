# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.control_net_lllite: ControlNet-LLLite for U-Nets (Stable Diffusion 1.x, 2.x and XL).

What its layers compute: library/adapters/layers/lllite.py.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.lllite import LLLITE
from library.families.adapters import adapter_tables
from library.families.sd.lllite_targets import TARGETS

CONDITIONED = True  # the network looks at control images, and changes the denoiser only
BUILDER = NetworkBuilder("networks.control_net_lllite", LLLITE, TARGETS, adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
