# SPDX-License-Identifier: Apache-2.0
"""Clip and optimizer step: one tensor per adapter weight against one flat buffer per group.

    python benchmarks/cpu/optimizer.py

836 tensors are what a LoRA of FLUX with diffusers' split layers has, 1444 a LoRA of SDXL. CPU time, not wall time, so
that other programs do not count. Width 640 is a common layer; width 8 shows the cost per tensor alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from library.optim.flat import FlatParameters

RUNS = 30
RANK = 8


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


def plain(count: int, width: int, foreach: bool) -> float:
    params = parameters(count, width)
    optimizer = torch.optim.AdamW(params, lr=1e-6, foreach=foreach)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0, foreach=foreach)
        optimizer.step()

    return median_ms(step)


def flat(count: int, width: int, fused: bool) -> float:
    joined = FlatParameters([{"params": parameters(count, width)}])
    optimizer = torch.optim.AdamW(joined.param_groups, lr=1e-6, fused=fused)

    def step() -> None:
        joined.clip_grad_norm(1.0)
        optimizer.step()

    return median_ms(step)


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, AdamW, rank {RANK}; clip + step, median of {RUNS}, CPU ms")
    print("| tensors | width | loop | foreach | flat | flat, fused=True |\n|---|---|---|---|---|---|")
    for width in (640, 8):
        for count in (836, 1444):
            times = [plain(count, width, foreach=False), plain(count, width, foreach=True)]
            times += [flat(count, width, fused=False), flat(count, width, fused=True)]
            print(f"| {count} | {width} | " + " | ".join(f"{t:.1f}" for t in times) + " |")


if __name__ == "__main__":
    main()
