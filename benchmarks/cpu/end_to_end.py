# SPDX-License-Identifier: Apache-2.0
"""A whole LoRA run on a tiny model, ours as a process beside the plain loop of diffusers and PEFT, same data and rates.

    OMP_NUM_THREADS=1 python benchmarks/cpu/end_to_end.py

A tiny SD 1.x, six smooth pictures of 64 px, batch 2, rank 4, AdamW, clipping, constant rate, float32, latents and text
states encoded once. Both start at the same model and at LoRA weights of the same distribution; noise and order of the
pictures are each one's own. The plain loop is that of diffusers' examples: read the pictures, encode, train, save.
Every figure is of the whole process; steps per second are those of a long and a short run's difference. The loss is one
measure for both, taken afterwards from the saved files: fixed noise, ten timesteps, all pictures.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import Measured, host_line, markdown, measure, quartiles

STEPS, FEW = 200, 20
PICTURES, SIZE, BATCH, RANK, RATE, SEED = 6, 64, 2, 4, 1e-3, 1
TARGETS = (  # what networks.lora takes of SD 1.x without conv_dim, in diffusers' names
    r".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
CAPTIONS = ("cat, red, photo", "dog, blue", "sks girl, red, star", "sks, blue", "photo, dog", "star, cat, red")
MEASURED_T = tuple(range(50, 1000, 100))
OURS, PLAIN = "train_network.py", "plain loop"


# ---- data -----------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Model and pictures: a few soft squares each, so that there is something to learn."""
    from PIL import Image

    from tests.tiny import make_tiny_sd

    make_tiny_sd(folder / "model")
    thing = folder / "pictures" / "1_thing"
    thing.mkdir(parents=True)
    for number in range(PICTURES):
        raw = random.Random(number).randbytes(4 * 4 * 3)
        picture = Image.frombytes("RGB", (4, 4), raw).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        picture.save(thing / f"p{number}.png")
        (thing / f"p{number}.txt").write_text(CAPTIONS[number], encoding="utf-8")


def encoded(folder: Path) -> tuple[Any, Any]:
    """Scaled latents (mean of the posterior) and text states of all pictures, in the order of their names."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    model, thing = folder / "model", folder / "pictures" / "1_thing"
    vae: Any = AutoencoderKL.from_pretrained(model / "vae")
    clip: Any = CLIPTextModel.from_pretrained(model / "text_encoder")
    tokenizer: Any = CLIPTokenizer.from_pretrained(model / "tokenizer")
    arrays = [np.asarray(Image.open(thing / f"p{number}.png")) for number in range(PICTURES)]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    texts = [(thing / f"p{number}.txt").read_text(encoding="utf-8") for number in range(PICTURES)]
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor, clip(ids).last_hidden_state


# ---- both ways ------------------------------------------------------------------------------------------------------


def ours(folder: Path, steps: int) -> list[str]:
    return [
        sys.executable, OURS, "--pretrained_model_name_or_path", str(folder / "model"), "--train_data_dir",
        str(folder / "pictures"), "--caption_extension", ".txt", "--output_dir", str(folder / "ours"), "--output_name",
        "x", "--resolution", str(SIZE), "--train_batch_size", str(BATCH), "--network_dim", str(RANK),
        "--network_alpha", str(RANK), "--network_train_unet_only", "--learning_rate", str(RATE), "--optimizer_type",
        "AdamW", "--optimizer_args", "weight_decay=0.01", "--seed", str(SEED), "--max_data_loader_n_workers", "0",
        "--cache_latents", "--cache_text_encoder_outputs", "--lora_format", "peft", "--max_train_steps", str(steps),
    ]  # fmt: skip


def plain_loop(folder: Path, steps: int) -> None:
    """The loop of diffusers' training examples in its plainest form."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    latents, states = encoded(folder)
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "model" / "unet")
    scheduler: Any = DDPMScheduler.from_pretrained(folder / "model" / "scheduler")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    unet.train()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(PICTURES).tolist()
        own, order = order[:BATCH], order[BATCH:]
        noise = torch.randn_like(latents[own])
        t = torch.randint(0, 1000, (BATCH,))
        pred = unet(scheduler.add_noise(latents[own], noise, t), t, states[own]).sample
        loss = F.mse_loss(pred, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as the examples do for their bar
    (folder / "plain").mkdir(exist_ok=True)
    save_file(get_peft_model_state_dict(unet), folder / "plain" / "x.safetensors")


# ---- the loss of what was saved -------------------------------------------------------------------------------------


def measured_loss(folder: Path, file: Path | None) -> float:
    """Mean squared error at fixed noise and timesteps, of the model with this LoRA in diffusers' names."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(folder / "model" / "unet")
    if file is not None:
        merge(unet, file)
    scheduler: Any = DDPMScheduler.from_pretrained(folder / "model" / "scheduler")
    latents, states = encoded(folder)
    losses = []
    with torch.no_grad():
        for t in MEASURED_T:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t))
            steps = torch.full((len(latents),), t)
            pred = unet(scheduler.add_noise(latents, noise, steps), steps, states).sample
            losses.append(F.mse_loss(pred, noise).item())
    return statistics.fmean(losses)


def merge(unet: Any, file: Path) -> None:
    """Add up @ down of a file in PEFT's names to each weight; alpha is the rank in both ways."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            weight = unet.get_submodule(name.removesuffix(".lora_A.weight").removeprefix("unet.")).weight
            with torch.no_grad():
                weight += (up.flatten(1) @ down.flatten(1)).view_as(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--threads", type=int, default=1)
    for name in ("plain", "folder"):  # of one process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.plain:
        plain_loop(Path(settings.folder), int(settings.plain))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(host_line(), "\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        commands = {
            PLAIN: lambda steps: [sys.executable, __file__, "--plain", str(steps), "--folder", name],
            OURS: lambda steps: ours(folder, steps),
        }
        long: dict[str, list[Measured]] = {way: [] for way in commands}
        short: dict[str, list[Measured]] = {way: [] for way in commands}
        for _ in range(settings.rounds):
            for way, command in commands.items():
                short[way].append(measure(command(FEW), settings.threads))
                long[way].append(measure(command(settings.steps), settings.threads))
        files = {PLAIN: folder / "plain" / "x.safetensors", OURS: folder / "ours" / "x.safetensors"}
        start = measured_loss(folder, None)
        losses = {way: measured_loss(folder, file) for way, file in files.items()}
    print(f"{settings.steps} steps, median of {settings.rounds} round(s); loss before training {start:.4f}\n")
    head = ("way", "wall s", "CPU s", "CPU ms per step", "steps per CPU s", "peak RSS GB", "loss afterwards")
    rows = [(way, *cells(long[way], short[way], settings.steps), f"{losses[way]:.4f}") for way in commands]
    print(markdown(head, rows))


def cells(long: Sequence[Measured], short: Sequence[Measured], steps: int) -> list[str]:
    """Medians of the whole run, and the cost of one step."""
    middle = lambda values: quartiles([*values])[1]
    step = (middle(run.cpu_s for run in long) - middle(run.cpu_s for run in short)) / (steps - FEW)
    return [
        f"{middle(run.wall_s for run in long):.1f}",
        f"{middle(run.cpu_s for run in long):.1f}",
        f"{1000 * step:.1f}",
        f"{1 / step:.1f}",
        f"{middle(run.peak_gb for run in long):.2f}",
    ]


if __name__ == "__main__":
    main()
