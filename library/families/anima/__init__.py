# SPDX-License-Identifier: Apache-2.0
"""Anima."""

from __future__ import annotations

from library.families.anima.options import (
    NOT_FOR_NETWORKS,
    RATES,
    AnimaFineTuneOptions,
    AnimaFlowOptions,
    AnimaOptions,
)
from library.families.options import Answered
from library.families.recipes import IN_BACKWARD, MemoryRecipe
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant

ANIMA = Variant(
    # "epsilon": sd-scripts writes it and its readers expect it; the model predicts noise - x0
    ModelFacts("anima", "anima-preview", "https://huggingface.co/circlestone-labs/Anima", "epsilon"),
    PreviewDefaults(steps=30, scale=4.0, size=1024, honoured=("flow_shift",)),
)

SHEET = Sheet(
    name="anima",
    title="Anima",
    path="library.families.anima.model:Anima",
    option_groups={
        "model": AnimaOptions,
        "objective": AnimaFlowOptions,
        "finetune": AnimaFineTuneOptions,
        "answered": Answered.named(RATES, NOT_FOR_NETWORKS),
    },
    files=FileMarks(
        "an Anima",
        tensors=("llm_adapter.", "blocks.0.adaln_modulation_self_attn.", "text_conditioner.", "time_embed.t_embedder."),
        pipelines=("Anima",),
    ),
    networks={"lora": "networks.lora_anima"} | EVERYWHERE,
    variants={"anima": ANIMA},
    adapter_prefixes={"qwen3": "lora_te"},
    bucket_step=16,
    scripts={"network": "anima_train_network.py", "finetune": "anima_train.py"},
    token_option="--t5_max_token_length",
    models="Anima",
    page="docs/anima.md",
    recipes={"network": "configs/anima_lora.toml", "finetune": "configs/anima_full.toml"},
    memory_recipes={
        "anima_lora": MemoryRecipe("anima_lora", "anima", "LoRA for Anima"),
        "anima_full": MemoryRecipe("anima_full", "anima", "All weights of Anima", IN_BACKWARD),
    },
)
