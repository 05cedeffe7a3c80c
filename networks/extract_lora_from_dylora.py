# SPDX-License-Identifier: Apache-2.0
r"""Take the smaller LoRAs out of a DyLoRA (arXiv:2210.07558): one file for every multiple of --unit below its rank.

    python networks/extract_lora_from_dylora.py --model dylora.safetensors --unit 4 --save_to out.safetensors

writes out-0004.safetensors, out-0008.safetensors ... A rank is the first rows of down and columns of up. alpha stays as
it was, as in files of sd-scripts: readers scale rank r by alpha / r, which is sqrt(R / r) times what training at r has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import missing_adapters, needed, target_problems
from library.cli import run_tool
from library.options import at_least, option

if TYPE_CHECKING:
    from torch import Tensor

    from library.adapters.formats.layer_tensors import Tensors


@dataclass(frozen=True)
class ExtractRanksOptions:
    """The DyLoRA, and the ranks and names of the new files."""

    model: str | None = option(None, help="DyLoRA file to read.", path=True)
    unit: int | None = option(None, help="Ranks are the multiples of this number.", check=at_least(1))
    save_to: str | None = option(None, help="Name of the files to write; the rank is put before the ending.", path=True)

    def problems(self) -> Iterator[str]:
        yield from needed(self, "model", "unit")
        yield from missing_adapters("--model", [self.model])
        yield from target_problems("--save_to", self.save_to, [])


@dataclass(frozen=True)
class ExtractDyloraOptions:
    """All options of this script."""

    extract: ExtractRanksOptions = field(default_factory=ExtractRanksOptions)


def extract(options: ExtractDyloraOptions) -> None:
    """Write one file per rank. Raises UserError for a file that is not a LoRA of a larger rank."""
    from library.adapters.surgery.lora_math import is_lora, not_lora
    from library.adapters.surgery.tool_files import read_lora
    from library.errors import UserError
    from library.families.adapters import adapter_tables
    from library.io.checkpoint import save_tensors
    from library.log import get_logger

    asked = options.extract
    assert asked.model and asked.unit and asked.save_to
    file = read_lora(asked.model, adapter_tables())
    wrong = [not_lora(name, own) for name, own in file.layers.items() if not is_lora(own)]
    if wrong:
        raise UserError(wrong[0])
    whole = max(len(own["lora_down.weight"]) for own in file.layers.values())
    if asked.unit >= whole:
        raise UserError(f"--unit {asked.unit}: {asked.model} has rank {whole}; give a smaller unit")
    comment = file.metadata.get("ss_training_comment", "")
    base = Path(asked.save_to)
    base.parent.mkdir(parents=True, exist_ok=True)
    for rank in range(asked.unit, whole, asked.unit):
        layers = {name: truncated(own, rank) for name, own in file.layers.items()}
        tensors = {f"{name}.{suffix}": value for name, own in layers.items() for suffix, value in own.items()}
        told = {"ss_network_dim": str(rank), "ss_training_comment": f"rank {rank} of a DyLoRA of {whole}; {comment}"}
        path = base.with_name(f"{base.stem}-{rank:04d}{base.suffix}")
        if path.resolve() == Path(asked.model).resolve():
            raise UserError(f"--save_to {asked.save_to}: {path} is --model itself; give another name")
        save_tensors(path, tensors, {**file.metadata, **told})
        get_logger().info("%s: rank %d of %d", path, rank, whole)


def truncated(own: Tensors, rank: int) -> dict[str, Tensor]:
    """The first `rank` ranks of a layer, or all that it has. Copies, since files cannot hold views."""
    cuts: Mapping[str, tuple[slice, ...]] = {
        "lora_down.weight": (slice(rank),),
        "lora_up.weight": (slice(None), slice(rank)),
        "lora_mid.weight": (slice(rank), slice(rank)),
    }
    return {name: value[cuts[name]].contiguous().clone() if name in cuts else value for name, value in own.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(ExtractDyloraOptions, extract, argv, "extract_lora_from_dylora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
