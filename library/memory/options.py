# SPDX-License-Identifier: Apache-2.0
"""Options of memory and speed: quantisation, recomputation, offloading, compilation. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.options import Idle, at_least, convert, option
from library.values import number, shown

AUTO = "auto"
GIB = 1 << 30
BACKENDS = ("eager", "aot_eager", "inductor", "cudagraphs")  # backends that torch has now
GONE = ("aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt", "onnxrt", "tensort", "ipex", "tvm")


def _share_or_auto(value: Any) -> float | str:
    if str(value).strip().lower() == AUTO:
        return AUTO
    try:
        share = number(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"expects a number from 0 to 1, or {AUTO}, got {shown(str(value))}")
    return share


def _switch_or_auto(value: Any) -> bool | str:
    if str(value).strip().lower() == AUTO:
        return AUTO
    try:
        return bool(convert(value, bool))
    except ValueError:
        raise ValueError(f"expects true, false or {AUTO}, got {shown(str(value))}") from None


def _count_or_auto(value: Any) -> int | str:
    if str(value).strip().lower() == AUTO:
        return AUTO
    if not re.fullmatch(r"\d{1,9}(\.0)?", str(value).strip()):
        raise ValueError(f"expects a number of blocks, or {AUTO}, got {shown(str(value))}")
    return int(float(value))


def _bytes(value: Any) -> int:
    """ "12GB", "11.5 GiB", "800MB" or a number of GB. As cards are sold, a GB is 2^30 bytes and an MB is 2^20."""
    found = re.fullmatch(r"([0-9]{,15}\.?[0-9]{1,15})\s*(g|gb|gib|m|mb|mib)?", str(value).strip().lower())
    if found is None:
        raise ValueError(f"expects an amount of memory such as 12GB, got {shown(str(value))}")
    return int(float(found[1]) * (1 << 20 if (found[2] or "g").startswith("m") else GIB))


@dataclass(frozen=True)
class MemoryOptions:
    """Memory and speed. None of these changes what is learned, but for the bases in fewer bits."""

    vram_budget: int | None = option(
        None,
        help="Memory that the run may take on the card, such as 12GB: what is not given here is then chosen, so that "
        "the run is as fast as it can be within that.",
        parse=_bytes,
        check=at_least(64 << 20, 1 << 50),
    )
    plan: bool = option(
        False, help="Print what the run would take with each way of saving memory, and exit. Reads no weights."
    )
    gradient_checkpointing: bool = option(
        False,
        help="Recompute activations in the backward pass: less memory, slower. The same as --activation_budget 0.",
    )
    activation_budget: float | str | None = option(
        None,
        help="Share of the activations that is kept for the backward pass, from 0 (all are recomputed) to 1 (none), or "
        "auto: as much as there is memory for.",
        parse=_share_or_auto,
    )
    cpu_offload_checkpointing: bool = option(
        False, help="Keep what recomputation starts from in main memory, copied while the card computes."
    )
    blocks_to_swap: int | str | None = option(
        None,
        help="Blocks of the denoiser whose weights wait in main memory until they are needed, or auto: as many as "
        "there is no memory for.",
        parse=_count_or_auto,
        zero_is_unset=True,
    )
    hoist_modulation: bool = option(
        False,
        help="FLUX.1, SD3 and HunyuanImage, adapters only: compute all modulations at the start of a step, and keep "
        "their weights, a quarter of the model, in main memory.",
    )
    fp8_base: bool = option(False, help="Keep the frozen denoiser and text encoders in 8-bit floats, with scales.")
    fp8_base_unet: bool = option(False, help="Keep the frozen denoiser in 8-bit floats, with scales.")
    base_quant: str | None = option(
        None,
        help="Keep the frozen denoiser in 8-bit integers, or in 4 bits (bitsandbytes).",
        choices=("int8", "nf4"),
    )
    compile: bool | str = option(
        False,
        help="Compile each block of the denoiser before the first step, or auto: where the run is long enough to earn "
        "back the time that this takes. Without a value: true.",
        parse=_switch_or_auto,
    )
    compile_cache_dir: str | None = option(
        None,
        help="Folder for archives of compiled blocks, so that the next run finds them (default: in the user's cache "
        "folder).",
        path=True,
    )
    torch_compile: bool = option(False, help="The same as --compile.")
    dynamo_backend: str = option("inductor", help="Backend of --compile.", choices=("no", *BACKENDS, *GONE))

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled in any case."""
        return self.compile is True or self.torch_compile

    @property
    def compiles_where_it_pays(self) -> bool:
        """Whether the planner decides if blocks are compiled."""
        return self.compile == AUTO

    @property
    def asks_planner(self) -> bool:
        """Whether the planner must choose something to fit the available memory."""
        return self.vram_budget is not None or AUTO in (self.activation_budget, self.blocks_to_swap)

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense."""
        if self.gradient_checkpointing and self.activation_budget not in (None, 0):
            yield "--gradient_checkpointing is --activation_budget 0: give one of them"
        recomputes = self.gradient_checkpointing or self.activation_budget not in (None, 1)
        if self.cpu_offload_checkpointing and not recomputes:
            yield Idle("--cpu_offload_checkpointing has no effect without --gradient_checkpointing")
        if self.base_quant and (self.fp8_base_unet or self.fp8_base):
            given = "fp8_base" if self.fp8_base else "fp8_base_unet"
            yield f"--base_quant and --{given} each say how the denoiser is kept: give one of them"
        if self.torch_compile and self.compiles_where_it_pays:
            yield f"--torch_compile compiles in any case, --compile {AUTO} only where it pays: give one of them"
        may_compile = self.compiles or self.compiles_where_it_pays
        if may_compile and self.dynamo_backend == "no":
            yield "--dynamo_backend no switches compilation off: leave one of them out"
        elif may_compile and self.dynamo_backend in GONE:
            yield f"--dynamo_backend {self.dynamo_backend} is gone from torch: use inductor"
        if self.compile_cache_dir and not may_compile:
            yield Idle("--compile_cache_dir has no effect without --compile")
