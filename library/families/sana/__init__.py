# SPDX-License-Identifier: Apache-2.0
"""SANA and SANA-1.5."""

from __future__ import annotations

from library.families.recipes import IN_BACKWARD, MemoryRecipe
from library.families.sana.options import SanaFlowOptions, SanaOptions
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant

PREVIEW = PreviewDefaults(steps=20, scale=4.5, size=1024, honoured=("flow_shift",))
SOURCE = "https://github.com/NVlabs/Sana"

SHEET = Sheet(
    name="sana",
    title="SANA",
    path="library.families.sana.model:Sana",
    option_groups={"model": SanaOptions, "objective": SanaFlowOptions},
    files=FileMarks(
        "a SANA", tensors=("attention_y_norm.weight", "caption_norm.weight", "y_embedder.y_proj."), pipelines=("Sana",)
    ),
    networks={"lora": "networks.lora_sana"} | EVERYWHERE,
    variants={
        "sana": Variant(ModelFacts("sana", "sana", SOURCE, None), PREVIEW),
        "sana1.5": Variant(ModelFacts("sana1.5", "sana-1.5", SOURCE, None), PREVIEW),
    },
    adapter_prefixes={"gemma2": "lora_te"},
    bucket_step=32,
    scripts={"network": "sana_train_network.py", "finetune": "sana_train.py"},
    lora_format="peft",
    token_option="--gemma2_max_token_length",
    models="SANA 0.6B and 1.6B, SANA-1.5 1.6B and 4.8B",
    page="docs/sana.md",
    recipes={"network": "configs/sana_lora.toml", "finetune": "configs/sana_full.toml"},
    memory_recipes={
        "sana_lora": MemoryRecipe("sana_lora", "sana", "LoRA for SANA 1.6B"),
        "sana15_lora": MemoryRecipe(
            "sana_lora",
            "sana48",
            "LoRA for SANA-1.5 4.8B",
            command={"Sana_1600M_1024px_BF16_diffusers": "SANA1.5_4.8B_1024px_diffusers"},
        ),
        "sana_full": MemoryRecipe("sana_full", "sana", "All weights of SANA 1.6B", IN_BACKWARD),
    },
)
