# SPDX-License-Identifier: Apache-2.0
"""CPU seconds to find a folder's pictures, captions and sizes: first start, restart, and the pattern in common use.

    python benchmarks/cpu/scan.py --count 100000

Makes small JPEGs with captions in a temporary folder, measures, prints one row of a Markdown table. The common pattern:
one glob per suffix in both cases, one open per caption, PIL to get the size. Of several rounds the best one counts,
because other programs on the machine slow all of them down.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image

from library.data.manifest import FOLDER, SETTLED_NS
from library.data.records import BucketRules, DatasetConfig, SubsetConfig
from library.data.scan import scan

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def make_folder(folder: Path, count: int) -> None:
    """`count` JPEGs of a few sizes, each with a comment of its own, and their captions."""
    pictures = []
    for size in ((64, 64), (96, 64), (64, 96), (80, 48)):
        data = io.BytesIO()
        Image.effect_noise(size, 40).convert("RGB").save(data, "JPEG")
        pictures.append(data.getvalue())
    for index in range(count):
        picture = pictures[index % len(pictures)]
        comment = b"\xff\xfe\x00\x08%06d" % (index % 1_000_000)
        name = f"{folder}/{index:07d}"
        with open(name + ".jpg", "wb") as file:
            file.write(picture[:2] + comment + picture[2:])
        with open(name + ".txt", "w", encoding="utf-8") as file:
            file.write(f"picture {index}, a red square, standing on a blue table, soft light\n")


def common_pattern(folder: str) -> int:
    """Ten globs, a caption read per picture, a size by PIL per picture."""
    paths: list[str] = []
    for suffix in SUFFIXES:
        for form in (suffix, suffix.upper()):
            paths += glob.glob(os.path.join(glob.escape(folder), "*" + form))
    paths = sorted(set(paths))
    found = 0
    for path in paths:
        caption_path = os.path.splitext(path)[0] + ".txt"
        if os.path.isfile(caption_path):
            with open(caption_path, encoding="utf-8") as file:
                caption = file.readlines()[0].strip()
        with Image.open(path) as image:
            width, height = image.size
        found += bool(caption and width and height)
    return found


def cpu_seconds(work: Callable[[], int], rounds: int, count: int, before: Callable[[], None] | None = None) -> float:
    """The least CPU time of `rounds` runs. Raises RuntimeError when a run does not find every picture."""
    best = float("inf")
    for _ in range(rounds):
        if before is not None:
            before()
        start = time.process_time()
        found = work()
        best = min(best, time.process_time() - start)
        if found != count:
            raise RuntimeError(f"found {found} of {count} pictures")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="number of pictures (default 100000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, the best one counts (default 3)")
    parser.add_argument(
        "--dir", default=None, help="where to make the pictures (default: the system's temporary folder)"
    )
    arguments = parser.parse_args()
    count, rounds = arguments.count, arguments.rounds
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name, "pictures")
        folder.mkdir()
        make_folder(folder, count)
        time.sleep(1.5 * SETTLED_NS / 1e9)  # the manifest does not trust files that have just been written
        subset = SubsetConfig(str(folder), caption_extension=".txt")
        configs = (DatasetConfig((subset,), BucketRules((64, 64))),)

        def forget() -> None:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)

        def ours() -> int:
            return sum(len(dataset.samples) for dataset in scan(configs).datasets)

        common = cpu_seconds(lambda: common_pattern(str(folder)), rounds, count)
        first = cpu_seconds(ours, rounds, count, forget)
        again = cpu_seconds(ours, rounds, count)
    print("| pictures | common pattern, every start | first start | restart |\n|---|---|---|---|")
    print(
        f"| {count:,} | {common:.2f} CPU-s | {first:.2f} CPU-s ({common / first:.1f}x less) "
        f"| {again:.2f} CPU-s ({common / again:.1f}x less) |"
    )


if __name__ == "__main__":
    main()
