# SPDX-License-Identifier: Apache-2.0
r"""Merge several LoRAs, of any ranks, into one of a given rank: the nearest one that there is (by singular values).

    python networks/svd_merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --new_rank 16 \
        --save_to merged.safetensors
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import DeviceOptions, ModelsOptions, SaveOptions, target_problems
from library.cli import run_tool
from library.options import at_least, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.adapters.formats.layer_tensors import Tensors


@dataclass(frozen=True)
class RankOptions:
    """The rank of the new LoRA."""

    new_rank: int = option(4, help="Rank of the new LoRA, at most that of all sources together.", check=at_least(1))
    new_conv_rank: int | None = option(
        None, help="Rank of convolutions with a kernel; not given: --new_rank.", check=at_least(1)
    )
    v2: bool = option(False, help="The LoRAs are for SD 2.x.", answer="the version is found from the files")


@dataclass(frozen=True)
class SvdMergeOptions:
    """All options of this script."""

    models: ModelsOptions = field(default_factory=ModelsOptions)
    rank: RankOptions = field(default_factory=RankOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def problems(self) -> Iterator[str]:
        """Options that are missing or would destroy a file."""
        yield from target_problems("--save_to", self.save.save_to, self.models.models)


def merge(options: SvdMergeOptions) -> None:
    """Read, sum, decompose layer by layer, write. Raises UserError for layers that are not a plain LoRA."""
    from library.adapters.surgery.merge import read_weighted, same_layers
    from library.adapters.surgery.tool_files import device_named, merged_metadata, save_lora
    from library.families.adapters import adapter_tables
    from library.log import progress

    device = device_named(options.device.device)
    tables = adapter_tables()
    loras = read_weighted(options.models, tables)
    layers = same_layers(loras, tables)
    found: dict[str, dict[str, Tensor]] = {}
    with progress(len(layers), "layers") as bar:
        for name, own in layers.items():
            found[name] = nearest(name, own, options.rank, device)
            bar.advance()
    conv_rank = options.rank.new_conv_rank
    arguments = "" if conv_rank is None else json.dumps({"conv_dim": conv_rank, "conv_alpha": conv_rank})
    metadata = merged_metadata([file for file, _ in loras], found, options.save, tables, arguments=arguments)
    save_lora(options.save, found, metadata)


def nearest(
    name: str, layers: Sequence[tuple[Tensors, float]], ranks: RankOptions, device: torch.device
) -> dict[str, Tensor]:
    """One layer of all files: the matrices of the rank that are nearest to Σ ratio · ΔW. Raises UserError."""
    from library.adapters.surgery.lora_math import ADDED, as_tensors, choose_rank, spectrum_of_change
    from library.adapters.surgery.merge import added, exact_sum

    if all(set(own) <= ADDED for own, _ in layers):
        return added(name, layers)
    change = exact_sum(name, layers, device)
    values = spectrum_of_change(change)
    rank = choose_rank(values.s, ranks.new_conv_rank or ranks.new_rank if change.is_3x3 else ranks.new_rank, None, 0)
    return as_tensors(*values.cut(rank), change.shape, rank)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(SvdMergeOptions, merge, argv, "svd_merge_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
