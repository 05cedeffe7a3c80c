# SPDX-License-Identifier: Apache-2.0
"""Clip, optimizer step and moving average: one tensor per adapter weight against one flat buffer per group.

    python benchmarks/cpu/optimizer.py

836 tensors are what a LoRA of FLUX with diffusers' split layers has, 1444 a LoRA of SDXL. CPU time, not wall time, so
that other programs do not count. Width 8 shows the cost per tensor, which is the host's; width 640 is a common layer,
where a CPU also does the work that a GPU would do meanwhile. "flat" is what the trainer does: library/optim/flat.py.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from library.optim.ema import Ema
from library.optim.flat import FlatParameters

RUNS = 50
RANK = 8
WAYS: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def parameters(count: int, width: int) -> list[nn.Parameter]:
    """Half down, half up matrices with a gradient."""
    shapes = [(RANK, width), (width, RANK)]
    params = [nn.Parameter(torch.randn(shapes[i % 2]) * 0.01) for i in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def median_ms(call: Callable[[], object]) -> float:
    """Median CPU time of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1000)
    return statistics.median(times)


def separate(count: int, width: int, way: dict[str, Any]) -> tuple[float, float]:
    """ms of clip and step, and of the moving average."""
    params = parameters(count, width)
    optimizer = torch.optim.AdamW(params, lr=1e-6, **way)
    averages = [p.detach().clone() for p in params]
    values: list[Tensor] = [p.detach() for p in params]

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=way.get("foreach", True))
        optimizer.step()

    def loop() -> None:
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, 0.001)

    average = loop if way.get("foreach") is False else lambda: torch._foreach_lerp_(averages, values, 0.001)
    return median_ms(step), median_ms(average)


def flat(count: int, width: int) -> tuple[float, float]:
    """The same in flat buffers, as the trainer calls it."""
    params = parameters(count, width)
    joined = FlatParameters([{"params": params}])
    optimizer = torch.optim.AdamW(joined.param_groups, lr=1e-6, fused=True)
    ema = Ema(params, 0.999, joined)

    def step() -> None:
        joined.clip_grad_norm(1.0)
        optimizer.step()

    return median_ms(step), median_ms(lambda: ema.update(10_000))


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, AdamW, rank {RANK}; clip + step (+ average), median of {RUNS}, CPU ms")
    print(f"| tensors | width | {' | '.join([*WAYS, 'flat'])} |\n|---|---|{'---|' * (len(WAYS) + 1)}")
    for width in (640, 8):
        for count in (836, 1444):
            times = [*(separate(count, width, way) for way in WAYS.values()), flat(count, width)]
            cells = (f"{step:.2f} (+ {average:.2f})" for step, average in times)
            print(f"| {count} | {width} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
