# SPDX-License-Identifier: Apache-2.0
r"""Make a LoRA smaller: a fixed rank, or for each layer the rank that keeps enough of it.

    python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 8
    python networks/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 32 \
        --dynamic_method sv_fro --dynamic_param 0.97 --verbose

sv_ratio keeps singular values above the largest one divided by --dynamic_param; sv_cumulative keeps the fewest whose
sum is --dynamic_param of all, sv_fro the fewest that keep --dynamic_param of the norm. --new_rank is then the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import DeviceOptions, SaveOptions, missing_adapters, needed, target_problems
from library.cli import run_tool
from library.options import at_least, option, positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.adapters.formats.layer_tensors import Tensors
    from library.adapters.surgery.lora_math import RankStatistics

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")


@dataclass(frozen=True)
class ResizeOptions:
    """The LoRA and its new rank."""

    model: str | None = option(None, help="LoRA file to read.", path=True)
    new_rank: int = option(4, help="Rank of the new LoRA; with --dynamic_method the largest one.", check=at_least(1))
    new_conv_rank: int | None = option(
        None, help="Rank of convolutions with a kernel; not given: --new_rank.", check=at_least(1)
    )
    dynamic_method: str | None = option(None, help="How each layer's own rank is found.", choices=METHODS)
    dynamic_param: float | None = option(None, help="What --dynamic_method aims at.", check=positive)
    verbose: bool = option(False, help="Print what is kept of each layer.")
    svd_lowrank_niter: int = option(
        2, help="Steps of an approximate decomposition.", answer="the decomposition is exact, and fast without it"
    )

    def problems(self) -> Iterator[str]:
        yield from needed(self, "model")
        yield from missing_adapters("--model", [self.model])
        if self.dynamic_method is None:
            if self.dynamic_param is not None:
                yield f"--dynamic_param needs --dynamic_method: {', '.join(METHODS)}"
        elif self.dynamic_param is None:
            yield f"--dynamic_method {self.dynamic_method} needs --dynamic_param"
        elif self.dynamic_method == "sv_ratio" and self.dynamic_param < 1:
            yield f"--dynamic_param must be at least 1 for sv_ratio, got {self.dynamic_param}"
        elif self.dynamic_method != "sv_ratio" and self.dynamic_param > 1:
            yield f"--dynamic_param must be at most 1 for {self.dynamic_method}, got {self.dynamic_param}"


@dataclass(frozen=True)
class ResizeSaveOptions(SaveOptions):
    """The file to write."""

    no_metadata: bool = option(False, help="Leave out modelspec.*; the other entries of the source stay.")


@dataclass(frozen=True)
class ResizeLoraOptions:
    """All options of this script."""

    resize: ResizeOptions = field(default_factory=ResizeOptions)
    save: ResizeSaveOptions = field(default_factory=ResizeSaveOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def problems(self) -> Iterator[str]:
        """Options that are missing or would destroy a file."""
        yield from target_problems("--save_to", self.save.save_to, [self.resize.model])


def resize(options: ResizeLoraOptions) -> None:
    """Read, decompose layer by layer, write. Raises UserError for layers that are not a plain LoRA."""
    from library.adapters.surgery.tool_files import device_named, dims_in, read_lora, save_lora
    from library.families.adapters import adapter_tables

    asked = options.resize
    assert asked.model is not None
    file = read_lora(asked.model, adapter_tables())
    layers, kept = resized(file.layers, asked, device_named(options.device.device))
    if asked.verbose:
        print("\n".join(table(kept)))
    old = max(len(own["lora_down.weight"]) for name, own in file.layers.items() if name in kept)
    comment = file.metadata.get("ss_training_comment", "")
    method = f"{asked.dynamic_method}: {asked.dynamic_param}"
    how = f"resized to rank {asked.new_rank}" if asked.dynamic_method is None else f"dynamic resize with {method}"
    metadata = {**file.metadata, "ss_training_comment": f"{how}, from {old}; {comment}", **dims_in(layers)}
    if asked.dynamic_method is not None:
        metadata |= {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    if options.save.no_metadata:
        metadata = {key: value for key, value in metadata.items() if not key.startswith("modelspec.")}
    save_lora(options.save, layers, metadata)


def resized(
    layers: Mapping[str, Tensors], options: ResizeOptions, device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], dict[str, RankStatistics]]:
    """The layers at their new ranks, and what is left of each. alpha / rank stays the same; changes of norms and of
    whole weights are copied.

    Raises UserError naming the layers that are not a plain LoRA.
    """
    from library.adapters.formats.layer_tensors import scale_of
    from library.adapters.surgery import lora_math
    from library.errors import UserError
    from library.log import progress

    others = {name: own for name, own in layers.items() if not lora_math.is_lora(own)}
    wrong = [lora_math.not_lora(name, own) for name, own in others.items() if not set(own) <= lora_math.ADDED]
    if wrong:
        raise UserError(wrong[:1] + [f"and {len(wrong) - 1} layers more"] * (len(wrong) > 1))
    found: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, RankStatistics] = {}
    with progress(len(layers), "layers") as bar:
        for name, own in layers.items():
            bar.advance()
            if name in others:
                found[name] = dict(own)
                continue
            scale = scale_of(own)
            plain = {key: value for key, value in own.items() if key != "alpha"}
            change = lora_math.change_of(name, plain, device)
            values = lora_math.spectrum_of_change(change)
            largest = (options.new_conv_rank or options.new_rank) if change.is_3x3 else options.new_rank
            rank = lora_math.choose_rank(values.s, largest, options.dynamic_method, options.dynamic_param or 0)
            kept[name] = lora_math.RankStatistics.of(values.s, rank)
            found[name] = lora_math.as_tensors(*values.cut(rank), change.shape, scale * rank)
    if not kept:
        raise UserError(f"{options.model} has no LoRA layers")
    return found, kept


def table(kept: Mapping[str, RankStatistics]) -> Iterator[str]:
    """The lines of --verbose: one per layer, and the mean."""
    width = max(len(name) for name in kept)
    for name, own in kept.items():
        yield (
            f"{name:{width}} | rank {own.rank:4d} | sum kept {own.of_sum:6.1%} | norm kept {own.of_norm:6.1%} | "
            f"largest / smallest {own.ratio:.1f}"
        )
    norms = [own.of_norm for own in kept.values()]
    yield f"mean norm kept: {sum(norms) / len(norms):.2%}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(ResizeLoraOptions, resize, argv, "resize_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
