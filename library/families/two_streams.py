# SPDX-License-Identifier: Apache-2.0
"""Transformers designed like FLUX.1: double blocks, in which picture and text are two streams, then single blocks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from library.families.family import STAYING_BLOCKS, ModelFamily, require_blocks
from library.memory.block_swap import spread


class TwoStreamFamily(ModelFamily):
    """A family whose denoiser has double and single blocks: its swapped blocks and its modulations."""

    embedder: ClassVar[str]  # name of the module that computes the time embedding

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return [block for blocks in block_lists(denoiser) for block in blocks]

    def swapped(self, denoiser: nn.Module, count: int, options: Any = None) -> list[int]:
        """Half of `count` are double blocks. Each other one stands for two single blocks, which are about as large."""
        require_blocks("--blocks_to_swap", count, self.most_swapped(denoiser))
        return self.swapped_of_each(denoiser, count // 2, 2 * (count - count // 2))

    def swapped_of_each(self, denoiser: nn.Module, double: int, single: int) -> list[int]:
        """Indices into `blocks` of `double` double blocks and `single` single blocks, evenly spread."""
        doubles, singles = map(len, block_lists(denoiser))
        return [*spread(doubles, double), *(doubles + index for index in spread(singles, single))]

    def most_swapped(self, denoiser: nn.Module) -> int:
        doubles, singles = (len(blocks) - STAYING_BLOCKS for blocks in block_lists(denoiser))
        return max(0, min(2 * doubles + 1, singles // 2 * 2))

    def modulations(self, denoiser: nn.Module) -> tuple[nn.Module, list[nn.Linear]] | None:
        doubles, singles = block_lists(denoiser)
        names = [(block, f"{norm}.linear") for block in doubles for norm in ("norm1", "norm1_context")]
        names += [(block, "norm.linear") for block in singles]
        linears = [block.get_submodule(name) for block, name in names]
        return denoiser.get_submodule(self.embedder), linears  # type: ignore[return-value]


def block_lists(denoiser: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Double blocks and single blocks."""
    double, single = (denoiser.get_submodule(name) for name in ("transformer_blocks", "single_transformer_blocks"))
    return [*double.children()], [*single.children()]
