# SPDX-License-Identifier: Apache-2.0
"""CPU time of the batches of a step where epochs are short: three steps each, with loading processes and without any.

    OMP_NUM_THREADS=1 python benchmarks/cpu/epochs.py --before /path/to/an/older/checkout

Six pictures of 64 px, batch 2, loaded as the trainer does it, without a model: what is counted is the CPU time, user
and system, of this process and of those that it started. "Cached" latents are in memory. An older checkout is measured
by this same script with `library` from there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import ROOT, host_line, interleaved, make_pictures, markdown, quartiles

PICTURES, SIZE, BATCH = 6, 64, 2
STEPS_PER_EPOCH = PICTURES // BATCH
WORKERS = (2, 0)


class InMemory:
    """Latents of every picture."""

    def get(self, job: Any) -> tuple[Any, None]:
        import torch

        return torch.zeros(4, SIZE // 8, SIZE // 8), None


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measured(tree: Path, folder: Path, epochs: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds per step of each way, with the library of `tree`."""
    import multiprocessing

    sys.path.insert(0, str(tree))

    from library.data.dataset import TrainingData
    from library.data.records import BucketRules, DatasetConfig, Sample, SubsetConfig
    from library.trainers.feed import steps_of
    from library.trainers.run_plan import RunPlan
    from library.types import Position

    subset = SubsetConfig(image_dir=str(folder))
    config = DatasetConfig(batch_size=BATCH, buckets=BucketRules((SIZE, SIZE)), subsets=(subset,))
    samples = [Sample(str(path), (SIZE, SIZE), "cat", subset, 0, 0) for path in sorted(folder.glob("*.png"))]
    opened = TrainingData([(config, samples)], seed=1)
    cached: Any = opened.prepared(latents=InMemory())  # type: ignore[arg-type]
    plan = RunPlan(STEPS_PER_EPOCH, 1, STEPS_PER_EPOCH * epochs, 1, 1)

    def way(data: TrainingData, workers: int) -> float:
        before = cpu_seconds()
        steps = sum(1 for _ in steps_of(data, data.loader(workers=workers), plan, Position(), rank=0, world=1))
        for child in multiprocessing.active_children():
            child.join()
        assert steps == plan.total_steps
        return 1000 * (cpu_seconds() - before) / steps

    ways: dict[str, Callable[[], float]] = {
        f"{what}, {workers} processes at most": lambda d=data, w=workers: way(d, w)
        for what, data in (("pictures opened", opened), ("latents cached", cached))
        for workers in WORKERS
    }
    return interleaved(ways, rounds)


def in_checkout(tree: Path, folder: Path, epochs: int, rounds: int) -> dict[str, list[float]]:
    """The figures of the code in another folder."""
    words = [sys.executable, __file__, "--measure", str(tree), "--data", str(folder)]
    words += ["--epochs", str(epochs), "--rounds", str(rounds)]
    ended = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout of the project, measured by the same script")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        print(json.dumps(measured(settings.measure, settings.data, settings.epochs, settings.rounds)))
        return
    trees = {"before": settings.before.resolve()} if settings.before else {}
    trees["now"] = ROOT
    with tempfile.TemporaryDirectory() as name:
        make_pictures(Path(name), PICTURES, SIZE)
        found = {
            when: in_checkout(tree, Path(name), settings.epochs, settings.rounds) for when, tree in trees.items()
        }  # fmt: skip
    print(host_line())
    rows = [
        (f"{way}, {when}", *(f"{value:.1f}" for value in (min(values), *quartiles(values))))
        for way in found["now"]
        for when, values in ((when, figures[way]) for when, figures in found.items())
    ]
    print(markdown(("CPU ms per step", "least", "lower quartile", "median", "upper quartile"), rows))


if __name__ == "__main__":
    main()
