# SPDX-License-Identifier: Apache-2.0
"""The diffusers folder of the base model: writing, loading and sampling."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from .tokenizer import build_tokenizer, save_tokenizer
from .training import batches
from .unet import build_scheduler


def assemble(folder: Path, *, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Write the pipeline in fp16. The given models are converted to fp16, too."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    save_tokenizer(folder / "tokenizer")


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load the pipeline in fp32, for sampling on a CPU."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
    batch_size: int = 16,
) -> list[Image.Image]:
    """One 128-px picture per caption. Picture i starts from noise with seed + i."""
    images: list[Image.Image] = []
    for part in batches(len(captions), batch_size):
        generators = [torch.Generator().manual_seed(seed + index) for index in range(part.start, part.stop)]
        drawn = pipeline(
            list(captions[part]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=128,
            width=128,
            generator=generators,
        )
        images.extend(drawn.images)
    return images


def folder_bytes(folder: Path) -> dict[str, int]:
    """Sizes of the parts of the folder and of the whole folder."""
    sizes = {
        part.name: sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        for part in folder.iterdir()
        if part.is_dir()
    }
    return {**sizes, "all": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())}
