# SPDX-License-Identifier: Apache-2.0
"""CPU time and memory of an optimizer step on a mid-size SDXL U-Net, beside the plain loop of diffusers' examples.

    OMP_NUM_THREADS=1 python benchmarks/cpu/sdxl_step.py

LoRA of rank 16 on every linear layer of the attention blocks, and full training of the U-Net; float32, AdamW, clipping,
batch 1, 256 px, latents and text states at hand before the first step. The model is made here, with random weights.
Each figure comes from a process of its own; what a step costs is the difference of a long and a short run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import make_pictures, measure

FEW, MANY = 1, 5  # steps
SIZE, PICTURES, RANK = 256, 4, 16
ADAPTED = (  # what networks.lora takes of SDXL without conv_dim, in diffusers' names
    r".*\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
WAYS = {"lora": "sdxl_train_network.py", "full": "sdxl_train.py"}


def make_model(folder: Path) -> float:
    """A pipeline: the U-Net at 0.4 of the real width, the other parts tiny. Returns the size of its U-Net."""
    import torch
    from diffusers import UNet2DConditionModel

    from tests.families.sdxl import POOLED, WIDTHS, tiny_modules, write_pipeline

    modules = tiny_modules()
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(2, 4, 8),  # the numbers of heads, which are 64 wide
        cross_attention_dim=sum(WIDTHS.values()),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + POOLED,
    )
    write_pipeline(folder, {**modules, "unet": unet})
    return sum(value.nbytes for value in unet.parameters()) / 1.024e9  # in GB of a million KiB, as `measure` counts


def reference(way: str, model: Path, steps: int) -> None:
    """The loop of diffusers' training examples in its plainest form, on random latents and text states."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    from tests.families.sdxl import POOLED

    torch.manual_seed(1)
    unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
    scheduler: Any = DDPMScheduler.from_pretrained(model / "scheduler")
    if way == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED))
    unet.train()
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    print(f"{len(learning)} tensors, {sum(p.numel() for p in learning)} numbers learn")
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    latents = torch.randn(PICTURES, 4, SIZE // 8, SIZE // 8)
    states, pooled = torch.randn(PICTURES, 77, unet.config.cross_attention_dim), torch.randn(PICTURES, POOLED)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)
    for step in range(steps):
        own = slice(step % PICTURES, step % PICTURES + 1)
        noise = torch.randn_like(latents[own])
        t = torch.randint(0, 1000, (1,))
        noisy = scheduler.add_noise(latents[own], noise, t)
        added = {"text_embeds": pooled[own], "time_ids": time_ids}
        pred = unet(noisy, t, states[own], added_cond_kwargs=added).sample
        loss = F.mse_loss(pred, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(step, loss.item())
    with tempfile.TemporaryDirectory() as output:
        if way == "lora":
            save_file(get_peft_model_state_dict(unet), f"{output}/lora.safetensors")
        else:
            unet.save_pretrained(output)


def trainer(way: str, folder: Path) -> list[str]:
    """Our command for the same run; its first run fills the caches."""
    lora = ["--network_module", "networks.lora", "--network_dim", str(RANK), "--network_alpha", str(RANK)]
    return [
        sys.executable, WAYS[way], "--pretrained_model_name_or_path", str(folder / "model"),
        "--train_data_dir", str(folder / "pictures"), "--caption_extension", ".txt", "--output_dir",
        str(folder / "output"), "--resolution", str(SIZE), "--train_batch_size", "1", "--learning_rate", "1e-4",
        "--optimizer_type", "AdamW", "--seed", "1", "--max_data_loader_n_workers", "0", "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(folder / "cache"),
        *([*lora, "--network_train_unet_only"] if way == "lora" else []),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", choices=[*WAYS], help="only the plain loop, for a process of its own")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=MANY)
    settings = parser.parse_args()
    if settings.reference:
        reference(settings.reference, settings.model, settings.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        thing = folder / "pictures" / "1_thing"
        thing.mkdir(parents=True)
        make_pictures(thing, PICTURES, SIZE)
        unet_gb = make_model(folder / "model")
        measure([*trainer("lora", folder), "--max_train_steps", "1"], settings.threads)
        print(f"U-Net: {unet_gb:.2f} GB, {settings.threads} thread(s), {FEW} and {MANY} steps\n")
        print("| run | CPU s per step | peak RSS GB | above the U-Net's weights GB |\n|---|---|---|---|")
        for way in WAYS:
            plain = [sys.executable, __file__, "--reference", way, "--model", str(folder / "model"), "--steps"]
            for who, command in {"plain loop": plain, WAYS[way]: [*trainer(way, folder), "--max_train_steps"]}.items():
                few, many = (measure([*command, str(steps)], settings.threads) for steps in (FEW, MANY))
                step, above = (many.cpu_s - few.cpu_s) / (MANY - FEW), many.peak_gb - unet_gb
                print(f"| {way}, {who} | {step:.2f} | {many.peak_gb:.2f} | {above:.2f} |", flush=True)


if __name__ == "__main__":
    main()
