# SPDX-License-Identifier: Apache-2.0
"""Start-up of train_network.py: --help, imports, time to the first step, and peak memory of a short LoRA run.

    python tools/make_random_checkpoint.py --version 1 --layout single --output /tmp/sd15
    python benchmarks/cpu/startup.py --model /tmp/sd15/model.safetensors

Each figure comes from a process of its own. CPU seconds are user plus system time and depend little on what else the
machine does; wall seconds do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import host_line, make_pictures, markdown, measure

IMPORTS = (
    "import library.trainers.methods.network, library.trainers.run; "
    "from library.weights.quick_import import import_diffusers; import_diffusers()"
)
# train_network.py, left as soon as its first optimizer step is done
FIRST_STEP = """
import os
from library import cli

load = cli.load_attribute

def load_leaving(path):
    found = load(path)
    if path.endswith(":NetworkMethod"):
        step = found.train_step
        found.train_step = lambda trainer, *words: (step(trainer, *words), os._exit(0))
    return found

cli.load_attribute = load_leaving
cli.run("network", "sd")
"""


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
        words = [
            "--pretrained_model_name_or_path", settings.model, "--train_data_dir", str(folder.parent),
            "--caption_extension", ".txt", "--output_dir", f"{name}/output", "--resolution", str(settings.resolution),
            "--train_batch_size", "2", "--network_module", "networks.lora", "--network_dim", "16", "--learning_rate",
            "1e-4", "--seed", "1", "--max_data_loader_n_workers", "0", "--cache_latents", "--optimizer_type", "AdamW",
        ]  # fmt: skip
        script, bf16 = [python, "train_network.py"], ["--mixed_precision", "bf16"]
        commands = {
            "`--help`": [*script, "--help"],
            "imports of a run": [python, "-c", IMPORTS],
            "to the end of the first step, fp32": [python, "-c", FIRST_STEP, *words],
            "to the end of the first step, bf16": [python, "-c", FIRST_STEP, *words, *bf16],
            "LoRA run of 1 step, fp32": [*script, *words, "--max_train_steps", "1"],
            "LoRA run of 3 steps, fp32": [*script, *words, "--max_train_steps", "3"],
            "LoRA run of 1 step, bf16": [*script, *words, *bf16, "--max_train_steps", "1"],
        }
        print(host_line(), "\n")
        rows = {what: measure(command, settings.threads) for what, command in commands.items()}
    table = [(what, f"{row.wall_s:.1f}", f"{row.cpu_s:.1f}", f"{row.peak_gb:.2f}") for what, row in rows.items()]
    print(markdown(("what", "wall s", "CPU s", "peak RSS GB"), table))


if __name__ == "__main__":
    main()
