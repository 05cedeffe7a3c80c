# SPDX-License-Identifier: Apache-2.0
"""Start-up of train_network.py: --help, imports, first optimizer step, and peak memory of a short LoRA run.

    python tools/make_random_checkpoint.py --version 1 --layout single --output /tmp/sd15
    python benchmarks/cpu/startup.py --model /tmp/sd15/model.safetensors

Each figure comes from a process of its own. CPU seconds are user plus system time and depend little on what else the
machine does; wall seconds do.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "import library.trainers.network; from library.models.quick_import import import_diffusers; import_diffusers()"
)


@dataclass(frozen=True)
class Measured:
    """One finished process."""

    wall_s: float
    cpu_s: float
    peak_gb: float


def measure(command: list[str], threads: int) -> Measured:
    """Run a command in the project's folder. Raises RuntimeError with its output when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{output.read()}")
    return Measured(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6)


def make_pictures(folder: Path, count: int, size: int) -> None:
    """Random pictures with captions."""
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a picture, number {index}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint of Stable Diffusion 1.x")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=4)
    settings = parser.parse_args()
    python = sys.executable
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures" / "1_thing"
        folder.mkdir(parents=True)
        make_pictures(folder, settings.pictures, settings.resolution)
        train = [
            python, "train_network.py", "--pretrained_model_name_or_path", settings.model,
            "--train_data_dir", str(folder.parent), "--caption_extension", ".txt", "--output_dir", f"{name}/output",
            "--resolution", str(settings.resolution), "--train_batch_size", "2", "--network_module", "networks.lora",
            "--network_dim", "16", "--learning_rate", "1e-4", "--seed", "1", "--max_data_loader_n_workers", "0",
            "--cache_latents", "--optimizer_type", "AdamW",
        ]  # fmt: skip
        rows = {
            "`--help`": measure([python, "train_network.py", "--help"], settings.threads),
            "imports of a run": measure([python, "-c", IMPORTS], settings.threads),
            "LoRA run of 1 step, fp32": measure([*train, "--max_train_steps", "1"], settings.threads),
            "LoRA run of 3 steps, fp32": measure([*train, "--max_train_steps", "3"], settings.threads),
            "LoRA run of 1 step, bf16": measure(
                [*train, "--max_train_steps", "1", "--mixed_precision", "bf16"], settings.threads
            ),
        }
    print("| what | wall s | CPU s | peak RSS GB |\n|---|---|---|---|")
    for what, row in rows.items():
        print(f"| {what} | {row.wall_s:.1f} | {row.cpu_s:.1f} | {row.peak_gb:.2f} |")


if __name__ == "__main__":
    main()
