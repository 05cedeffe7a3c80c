# SPDX-License-Identifier: Apache-2.0
"""Which blocks --blocks_to_swap means, and which Linears can be hoisted, in models of the published depth."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.families.chroma.model import Chroma
from library.families.flux.model import Flux
from library.families.flux.options import FluxFineTuneOptions, FluxOptions
from library.families.sd3.model import StableDiffusion3
from library.families.sd3.options import SD3Options
from tests.memory.swap_models import flux, sd3


@dataclass
class Depth:
    """FLUX.1 as it is published: 19 double blocks and 38 single ones, without weights."""

    double: int = 19
    single: int = 38

    def model(self) -> nn.Module:
        lists = {"transformer_blocks": self.double, "single_transformer_blocks": self.single}
        return nn.ModuleDict({name: nn.ModuleList(nn.Identity() for _ in range(n)) for name, n in lists.items()})


FAMILY = Flux(FluxOptions(pretrained_model_name_or_path="x"))


@pytest.mark.parametrize("count", [0, 1, 2, 9, 18, 35])
def test_flux_swaps_double_and_single_blocks_as_users_know_it(count: int) -> None:
    found = FAMILY.swapped(Depth().model(), count)
    assert sum(i < 19 for i in found) == count // 2
    assert sum(i >= 19 for i in found) == 2 * (count - count // 2)
    assert found == sorted(set(found)) and all(0 <= i < 57 for i in found)


def test_flux_has_a_limit() -> None:
    """17 double blocks, 36 single ones."""
    with pytest.raises(UserError, match=r"--blocks_to_swap 36: at most 35 blocks"):
        FAMILY.swapped(Depth().model(), 36)
    with pytest.raises(UserError, match=r"--blocks_to_swap 1: at most 0 blocks"):
        FAMILY.swapped(Depth(2, 2).model(), 1)


def test_flux_full_training_names_the_numbers_itself() -> None:
    options = FluxFineTuneOptions(double_blocks_to_swap=3, single_blocks_to_swap=5)
    found = FAMILY.swapped(Depth().model(), 0, options)
    assert sum(i < 19 for i in found) == 3 and sum(i >= 19 for i in found) == 5
    assert len(FAMILY.swapped(Depth().model(), 0, FluxFineTuneOptions(double_blocks_to_swap=17))) == 17
    assert FAMILY.swapped(Depth().model(), 4, FluxFineTuneOptions()) == FAMILY.swapped(Depth().model(), 4)
    for given, message in (
        ({"double_blocks_to_swap": 18}, "--double_blocks_to_swap 18: at most 17"),
        ({"single_blocks_to_swap": 37}, "--single_blocks_to_swap 37: at most 36"),
    ):
        with pytest.raises(UserError, match=message):
            FAMILY.swapped(Depth().model(), 0, FluxFineTuneOptions(**given))
    with pytest.raises(UserError, match="leave out --double_blocks_to_swap"):
        FAMILY.swapped(Depth().model(), 2, options)


def test_other_models_spread_over_all_blocks() -> None:
    family = StableDiffusion3(SD3Options(pretrained_model_name_or_path="x"))
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList(nn.Identity() for _ in range(24))})
    assert family.swapped(model, 3) == [4, 12, 20]
    assert len(family.swapped(model, 22)) == 22
    with pytest.raises(UserError, match="--blocks_to_swap 23: at most 22"):
        family.swapped(model, 23)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_modulations_are_what_is_given_the_time_alone(name: str) -> None:
    """Every Linear in blocks whose input is silu of the embedder's output, and no other."""
    families = {"flux": FAMILY, "sd3": StableDiffusion3(SD3Options(pretrained_model_name_or_path="x"))}
    sample = {"flux": flux, "sd3": sd3}[name]()
    embedder, linears = families[name].modulations(sample.denoiser)
    given: list[torch.Tensor] = []
    called: list[nn.Module] = []
    embedder.register_forward_hook(lambda _, args, y: given.append(torch.nn.functional.silu(y)))

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if given and args[0].shape == given[0].shape and torch.equal(args[0], given[0]):
            called.append(module)

    for block in sample.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(look)
    sample.loss(0)
    assert called == linears


def test_chroma_has_no_modulations_of_its_own() -> None:
    chroma = Chroma(FluxOptions(pretrained_model_name_or_path="x", model_type="chroma"))
    assert chroma.modulations(nn.Module()) is None
