# SPDX-License-Identifier: Apache-2.0
"""What the machine itself can do: matrix products at FLUX.1's shapes, copies from pinned memory, kernel launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.jobs import Card

PRODUCTS = {"qkv": (4608, 3072, 9216), "MLP in": (4608, 3072, 12288), "MLP out": (4608, 12288, 3072)}
BLOCK_BYTES = 680_000_000  # a double block of FLUX.1 in bf16
LAUNCHES = 2000


def ceilings(*, tiny: bool) -> Iterator[tuple[str, float, str]]:
    """What, how much, in which unit. What a card or this torch cannot do is left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, shape in PRODUCTS.items():
        m, k, n = (number // 64 for number in shape) if tiny else shape
        for kind, product in PRODUCT_KINDS.items():
            try:
                seconds = time_of(product(m, k, n, device), device, 2 if tiny else 50)
            except (RuntimeError, NotImplementedError):
                continue
            label = f"{kind} matrix product {m} x {k} x {n} ({name})"
            yield label, 2 * m * k * n / seconds / 1e12, "TF/s"
    yield from copies(device, 1_000_000 if tiny else BLOCK_BYTES)
    yield "launch of a small kernel, on the host", launch_seconds(device, 20 if tiny else LAUNCHES) * 1e6, "us"


def as_card(found: list[tuple[str, float, str]]) -> Card | None:
    """The best bf16 product, and the copy to the device; None where one of them could not be measured."""
    best = max((value for name, value, _ in found if name.startswith("bf16")), default=0.0)
    copy = next((value for name, value, _ in found if "to the device" in name), 0.0)
    return Card(best, copy) if best > 0 and copy > 0 else None


def time_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after three that do not count."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- products -------------------------------------------------------------------------------------------------------


def bf16(m: int, k: int, n: int, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
    return lambda: a @ b.T


def fp8(m: int, k: int, n: int, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(shape, device=device).to(torch.float8_e4m3fn) for shape in ((m, k), (n, k)))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def int8(m: int, k: int, n: int, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randint(-127, 128, shape, device=device, dtype=torch.int8) for shape in ((m, k), (n, k)))
    return lambda: torch._int_mm(a, b.T)


PRODUCT_KINDS = {"bf16": bf16, "fp8": fp8, "int8": int8}


# ---- copies and launches --------------------------------------------------------------------------------------------


def copies(device: torch.device, size: int) -> Iterator[tuple[str, float, str]]:
    on_card = device.type == "cuda"
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_card)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    ways = {"to the device": (there, host), "from the device": (host, there)}
    for name, (target, source) in ways.items():
        copy = lambda target=target, source=source: target.copy_(source, non_blocking=True)
        yield f"copy of {size / 1e6:.0f} MB {name}, pinned", size / time_of(copy, device, 10) / 1e9, "GB/s"


def launch_seconds(device: torch.device, launches: int) -> float:
    """Host time of one small operation: few enough for the queue, which never fills."""
    value = torch.zeros(8, device=device)
    best = float("inf")
    for _ in range(max(1, launches // 500)):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            value.add_(1)
        best = min(best, (time.perf_counter() - start) / 500)
    return best
