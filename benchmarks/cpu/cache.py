# SPDX-License-Identifier: Apache-2.0
"""Cached latents per CPU second: the packed store against one npz file per picture, as sd-scripts writes them.

    python benchmarks/cpu/cache.py --count 2000 --folder /some/disk

npz: float32, `np.savez` / `np.load` into a bf16 tensor, and the look into each file that its users pay at every start.
store: bf16 with a CRC-32 of everything. "write" includes fsync of the store (npz files are not synced); "first read"
opens the files, "read" is every later epoch; both compute the checksum. Rounds alternate between both; of several
rounds the best one counts, because other programs on the machine slow all of them down. Reads come from the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import cpu_seconds
from library.data.caches.store import PackedStore

SHAPES = {"SDXL 4x128x128": (4, 128, 128), "FLUX 16x128x128": (16, 128, 128)}
STAGES = ("write", "check at start", "first read", "read")


def npz_round(folder: Path, latents: Sequence[Tensor], order: Sequence[int]) -> tuple[list[float], int]:
    """CPU seconds of the stages, and bytes on the disk."""
    folder.mkdir()
    paths = [folder / f"{number:06d}_1024x1024_sdxl.npz" for number in range(len(latents))]

    def write() -> None:
        for path, latent in zip(paths, latents):
            array = latent.float().numpy()
            np.savez(path, latents=array, original_size=np.array([1024, 1024]), crop_ltrb=np.array([0, 0, 1024, 1024]))

    def read() -> None:
        for number in order:
            with np.load(paths[number]) as file:
                torch.from_numpy(file["latents"]).bfloat16()

    def check() -> None:
        for path in paths:
            with np.load(path) as file:
                assert "latents" in file.files and "original_size" in file.files

    times = [cpu_seconds(stage) for stage in (write, check, read, read)]
    return times, sum(path.stat().st_size for path in paths)


def store_round(folder: Path, latents: Sequence[Tensor], order: Sequence[int]) -> tuple[list[float], int]:
    """CPU seconds of the stages, and bytes on the disk, the index included."""
    keys = [hashlib.blake2b(str(number).encode(), digest_size=20).digest() for number in range(len(latents))]
    store = PackedStore(folder)

    def write() -> None:
        for key, latent in zip(keys, latents):
            store.put(key, {"latents": latent})
        store.close()

    def read() -> None:
        for number in order:
            opened.get(keys[number])

    def check() -> None:
        assert not opened.check(keys).missing

    written = cpu_seconds(write)
    opened = PackedStore(folder)
    times = [written, *(cpu_seconds(stage) for stage in (check, read, read))]
    assert torch.equal(opened.get(keys[-1])["latents"], latents[-1])
    return times, sum(path.stat().st_size for path in folder.iterdir())


def measure(shape: tuple[int, ...], count: int, rounds: int, folder: str | None) -> dict[str, tuple[list[float], int]]:
    """Best CPU seconds per stage over the rounds, and bytes, of both ways."""
    some = [torch.randn(shape).bfloat16() for _ in range(16)]
    latents = [some[number % len(some)] for number in range(count)]
    order = random.Random(0).sample(range(count), count)
    results: dict[str, list[tuple[list[float], int]]] = {"npz": [], "store": []}
    for _ in range(rounds):
        for name, run in (("npz", npz_round), ("store", store_round)):
            place = Path(tempfile.mkdtemp(dir=folder))
            try:
                results[name].append(run(place / name, latents, order))
            finally:
                shutil.rmtree(place)
    return {
        name: ([min(times) for times in zip(*(times for times, _ in done))], done[0][1])
        for name, done in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="latents")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="folder on the disk to measure (default: the folder for temporary files)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| latents per CPU second ({options.count}) | way | {' | '.join(STAGES)} | MB |")
    print("|---" * (len(STAGES) + 3) + "|")
    for title, shape in SHAPES.items():
        best = measure(shape, options.count, options.rounds, options.folder)
        for name, (times, size) in best.items():
            rates = " | ".join(f"{options.count / seconds:,.0f}" for seconds in times)
            print(f"| {title} | {name} | {rates} | {size / 1e6:,.0f} |")
        factors = " | ".join(f"{old / new:.1f}x" for old, new in zip(best["npz"][0], best["store"][0]))
        print(f"| {title} | gain | {factors} | {best['npz'][1] / best['store'][1]:.1f}x |")


if __name__ == "__main__":
    main()
