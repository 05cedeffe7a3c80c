# SPDX-License-Identifier: Apache-2.0
"""The builder joins every kind of adapters with the targets of every family, or refuses the pair."""

from __future__ import annotations

from importlib import import_module

import pytest

from library.adapters.build import NetworkBuilder
from library.adapters.kind import AdapterKind
from library.adapters.layers.dylora import DYLORA
from library.adapters.layers.lllite import LLLITE
from library.adapters.layers.loha import LOHA
from library.adapters.layers.lokr import LOKR
from library.adapters.layers.lora import LORA
from library.adapters.layers.lora_fa import LORA_FA
from library.adapters.layers.oft import OFT
from library.adapters.targets import Targets
from library.families.adapters import adapter_tables, every_family, unets
from tests.adapters.families import TINY
from tests.adapters.models import tiny_clip, tiny_unet

ADDING = {"lora": LORA, "lora_fa": LORA_FA, "loha": LOHA, "lokr": LOKR}
RANKS = {
    "flux": {"img_attn_dim": "2"},
    "sd3": {"x_attn_dim": "2"},
    "lumina": {"attn_dim": "2"},
    "flux2": {"img_attn_dim": "2"},
}


def builder(kind: AdapterKind, targets: Targets) -> NetworkBuilder:
    return NetworkBuilder("tests.own", kind, targets, adapter_tables())


def own_targets(family: str) -> Targets:
    found = import_module(f"library.families.{family}.targets").TARGETS
    assert isinstance(found, Targets)
    return found


@pytest.mark.parametrize("family", RANKS)
@pytest.mark.parametrize("kind", ADDING)
def test_ranks_of_a_family_for_every_kind(kind: str, family: str) -> None:
    network = builder(ADDING[kind], own_targets(family)).create_network(
        1.0, 4, 1.0, None, None, TINY[family].make(), **RANKS[family]
    )
    ranks = {layer.rank for layer in network.modules() if hasattr(layer, "rank")}
    assert ranks == {2, 4}


@pytest.mark.parametrize("kind", [*ADDING, "dylora"])
def test_files_of_every_kind_come_back(kind: str) -> None:
    made = builder({**ADDING, "dylora": DYLORA}[kind], unets())
    first = made.create_network(1.0, 2, 1.0, None, tiny_clip(), tiny_unet()).state(None)
    again, _ = made.create_network_from_weights(1.0, None, None, tiny_clip(), tiny_unet(), first)
    assert {key: value.shape for key, value in again.state(None).items()} == {k: v.shape for k, v in first.items()}


@pytest.mark.parametrize("kind", [OFT, LLLITE])
def test_targets_of_another_name_are_refused(kind: AdapterKind) -> None:
    with pytest.raises(ValueError, match=r"tests\.own: .*_unet adapters do not go with lora_unet targets"):
        builder(kind, every_family())


def test_ranks_by_block_are_needed() -> None:
    with pytest.raises(ValueError, match="need targets with the option group BlockOptions"):
        builder(DYLORA, own_targets("flux"))
