# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from library.families.recipes import ADAFACTOR, IN_BACKWARD, NO_ENCODER, BenchmarkJob, MemoryRecipe
from library.families.sd.options import SDFineTuneOptions, SDOptions
from library.families.sheet import OF_UNETS, FileMarks, ModelFacts, Sheet, Variant

FORMATS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")  # of --save_model_as
PUBLISHED_LAYOUT = "https://github.com/Stability-AI/generative-models"


def _variant(version: str, architecture: str, prediction: str) -> Variant:
    return Variant(ModelFacts(version, architecture, "diffusers", prediction, PUBLISHED_LAYOUT))


SHEET = Sheet(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    path="library.families.sd.model:StableDiffusion",
    option_groups={"model": SDOptions, "finetune": SDFineTuneOptions},
    files=FileMarks(
        "a Stable Diffusion 1.x or 2.x",
        tensors=("input_blocks.",),
        pipelines=("StableDiffusion",),
        unknown="no Stable Diffusion checkpoint: it has no model.diffusion_model.* weights",
    ),
    networks=OF_UNETS,
    variants={
        "sd1": _variant("sd_v1", "stable-diffusion-v1", "epsilon"),
        "sd1 v": _variant("sd_v1_v", "stable-diffusion-v1", "v"),
        "sd2": _variant("sd_v2", "stable-diffusion-v2-512", "epsilon"),
        "sd2 v": _variant("sd_v2_v", "stable-diffusion-v2-768-v", "v"),
    },
    adapter_prefixes={"clip": "lora_te"},
    bucket_step=64,
    scripts={
        "network": "train_network.py",
        "dreambooth": "train_db.py",
        "finetune": "fine_tune.py",
        "textual_inversion": "train_textual_inversion.py",
    },
    formats=FORMATS,
    models="Stable Diffusion 1.x / 2.x",
    page="docs/train_network.md",
    recipes={
        "network": "configs/sd_lora.toml",
        "finetune": "configs/sd_full.toml",
        "dreambooth": "configs/dreambooth.toml",
        "textual_inversion": "configs/sd_textual_inversion.toml",
    },
    memory_recipes={
        "sd_lora": MemoryRecipe("sd_lora", "sd15", "LoRA for Stable Diffusion 1.x / 2.x", {"train_batch_size": "1"}),
        "sd_full": MemoryRecipe(
            "sd_full",
            "sd15",
            "All weights of Stable Diffusion 1.x / 2.x",
            IN_BACKWARD,
            ways=({}, NO_ENCODER, {**NO_ENCODER, **ADAFACTOR}),
        ),
    },
    benchmarks={"sd15_lora": BenchmarkJob("sd15", "network", 512, 4, 3.21, 6.96, 1.72, goal="<= 18 ms")},
)
