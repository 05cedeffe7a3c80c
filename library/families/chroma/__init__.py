# SPDX-License-Identifier: Apache-2.0
"""Chroma: FLUX.1 with another guidance and without CLIP. The scripts of FLUX.1 train it with --model_type chroma."""

from __future__ import annotations

from dataclasses import replace

from library.families.flux import SHEET as FLUX
from library.families.flux import FluxVariant
from library.families.recipes import MemoryRecipe
from library.families.sheet import FileMarks, ModelFacts, PreviewDefaults

VARIANT = FluxVariant(
    ModelFacts("chroma", "chroma", "https://huggingface.co/lodestones/Chroma", None),
    PreviewDefaults(26, scale=4.0, size=1024, honoured=("flow_shift",)),
)

SHEET = replace(
    FLUX,
    name="chroma",
    path="library.families.chroma.model:Chroma",
    files=FileMarks("a Chroma", tensors=("distilled_guidance_layer.",), pipelines=("Chroma",)),
    variants={"chroma": VARIANT},
    adapter_prefixes={"t5xxl": "lora_te3"},
    scripts={},
    family_option=None,
    scripts_of="flux",
    models="",
    recipes={},
    memory_recipes={
        "chroma_lora": MemoryRecipe(
            "flux_lora",
            "chroma",
            "LoRA for Chroma",
            {"model_type": '"chroma"'},
            command={"--clip_l clip_l.safetensors ": "", "flux1-dev": "chroma1-hd"},
        ),
    },
    benchmarks={},
)
