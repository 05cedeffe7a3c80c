# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL."""

from __future__ import annotations

from library.families.recipes import IN_BACKWARD, BenchmarkJob, MemoryRecipe
from library.families.sd import FORMATS, PUBLISHED_LAYOUT
from library.families.sdxl.options import SDXLFineTuneOptions, SDXLOptions
from library.families.sheet import OF_UNETS, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant


def _variant(prediction: str) -> Variant:
    facts = ModelFacts("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", PUBLISHED_LAYOUT, prediction)
    return Variant(facts, PreviewDefaults(size=1024))


SHEET = Sheet(
    name="sdxl",
    title="Stable Diffusion XL",
    path="library.families.sdxl.model:StableDiffusionXL",
    option_groups={"model": SDXLOptions, "finetune": SDXLFineTuneOptions},
    files=FileMarks(
        "an SDXL",
        tensors=("label_emb.", "add_embedding."),
        pipelines=("StableDiffusionXL",),
        unknown="no SDXL checkpoint: it has no model.diffusion_model.* weights",
    ),
    networks=OF_UNETS,
    variants={"sdxl": _variant("epsilon"), "sdxl v": _variant("v")},
    adapter_prefixes={"clip_l": "lora_te1", "clip_g": "lora_te2"},
    bucket_step=32,
    scripts={
        "network": "sdxl_train_network.py",
        "finetune": "sdxl_train.py",
        "textual_inversion": "sdxl_train_textual_inversion.py",
        "lllite": "sdxl_train_control_net_lllite.py",
    },
    formats=FORMATS,
    models="SDXL",
    page="docs/sdxl.md",
    recipes={
        "network": "configs/sdxl_lora.toml",
        "finetune": "configs/sdxl_full.toml",
        "lllite": "configs/sdxl_control_net_lllite.toml",
    },
    memory_recipes={
        "sdxl_lora": MemoryRecipe("sdxl_lora", "sdxl", "LoRA for Stable Diffusion XL"),
        "sdxl_full": MemoryRecipe("sdxl_full", "sdxl", "All weights of SDXL's U-Net", IN_BACKWARD),
    },
    benchmarks={
        "sdxl_lora": BenchmarkJob("sdxl", "network", 1024, 1, 6.76, 14.35, 4.37, goal="<= 35 ms"),
        "sdxl_lora_bs4": BenchmarkJob("sdxl", "network", 1024, 4, 27.05, 57.39, 4.37, goal="<= 110 ms"),
    },
)
