# SPDX-License-Identifier: Apache-2.0
"""Memory and CPU time of a FLUX.1 LoRA run on the CPU, at real width with few blocks, with and without T5's work.

    python tools/make_random_flux.py --double 3 --single 4 --t5_layers 24 --output /tmp/flux
    python benchmarks/cpu/flux.py --models /tmp/flux

Four pictures of 128 px, batch 1, rank 16, bf16, T5 length 64. Each figure comes from a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import make_pictures, measure

FEW, MANY = 2, 6  # steps; what a step costs is the difference


def command(models: Path, folder: str) -> list[str]:
    """A run that caches everything that can be cached."""
    files = {"pretrained_model_name_or_path": "flux", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
    given = [word for option, name in files.items() for word in (f"--{option}", str(models / f"{name}.safetensors"))]
    return [
        sys.executable, "flux_train_network.py", *given, "--train_data_dir", f"{folder}/pictures",
        "--caption_extension", ".txt", "--output_dir", f"{folder}/output", "--resolution", "128",
        "--train_batch_size", "1", "--network_dim", "16", "--network_train_unet_only", "--learning_rate", "1e-4",
        "--mixed_precision", "bf16", "--model_prediction_type", "raw", "--t5xxl_max_token_length", "64", "--seed", "1",
        "--max_data_loader_n_workers", "0", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk",
        "--cache_dir", f"{folder}/cache",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, type=Path, help="folder that tools/make_random_flux.py wrote")
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        thing = Path(folder) / "pictures" / "1_thing"
        thing.mkdir(parents=True)
        make_pictures(thing, 4, 128)
        train = command(settings.models, folder)
        first = measure([*train, "--max_train_steps", "1"], settings.threads)
        print("| run | CPU s per step | CPU s in all | peak RSS GB |\n|---|---|---|---|")
        print(f"| 1 step, T5, CLIP and autoencoder fill the caches | | {first.cpu_s:.1f} | {first.peak_gb:.2f} |")
        runs = {"everything cached": [], "the same with checkpointing": ["--gradient_checkpointing"]}
        for name, more in runs.items():
            few, many = (measure([*train, *more, "--max_train_steps", str(n)], settings.threads) for n in (FEW, MANY))
            step = (many.cpu_s - few.cpu_s) / (MANY - FEW)
            print(f"| {MANY} steps, {name} | {step:.1f} | {many.cpu_s:.1f} | {many.peak_gb:.2f} |")


if __name__ == "__main__":
    main()
