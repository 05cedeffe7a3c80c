# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: the machine's line, processes that are measured, rounds that alternate, tables.

A script puts the project's folder on sys.path and then imports from here; torch is imported only where it is named.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GB = 1e9  # bytes, in every table that does not say otherwise


# ---- the machine ----------------------------------------------------------------------------------------------------


def host_line() -> str:
    """Processor, cores, versions, date and load: what a figure means nothing without."""
    import torch

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s){load}, {date}"
    )


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One finished process. A GB of `peak_gb` is a million KiB, as the system counts."""

    wall_s: float
    cpu_s: float  # user and system
    peak_gb: float  # resident, mapped files included
    output: str = ""  # stdout and stderr together


def measure(command: Sequence[str], threads: int) -> Measured:
    """Run a command in the project's folder. Raises RuntimeError with its output when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{output}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6, output)


# ---- rounds ---------------------------------------------------------------------------------------------------------


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, user and system, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each way's figures, the ways in turn: what else the machine does then meets all of them alike."""
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            figures[name].append(way())
    return figures


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value, that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


# ---- data and tables ------------------------------------------------------------------------------------------------


def make_pictures(folder: Path, count: int, size: int, caption: str = "a picture, number {}") -> None:
    """Random pictures with captions."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png", compress_level=0)
        (folder / f"{index}.txt").write_text(caption.format(index), encoding="utf-8")


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; an empty cell for None."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)
