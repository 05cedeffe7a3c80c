# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.loha: LoHa for Stable Diffusion 1.x, 2.x, XL, FLUX.1, FLUX.2, SD3 and Lumina.

Files are those of LyCORIS (--network_module lycoris.kohya with algo=loha); the layers are those of networks.lora.
"""

from __future__ import annotations

from library.adapters.build import NetworkBuilder
from library.adapters.layers.loha import LOHA
from library.families.adapters import adapter_tables, every_family

BUILDER = NetworkBuilder("networks.loha", LOHA, every_family(), adapter_tables())
create_network = BUILDER.create_network
create_network_from_weights = BUILDER.create_network_from_weights
