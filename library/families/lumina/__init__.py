# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0."""

from __future__ import annotations

from library.families.lumina.options import LuminaFlowOptions, LuminaOptions
from library.families.recipes import IN_BACKWARD, BenchmarkJob, MemoryRecipe
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant

LUMINA2 = Variant(
    # "epsilon": sd-scripts writes it so and its readers expect it; the model predicts x0 - noise
    ModelFacts("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "epsilon"),
    PreviewDefaults(
        steps=36,
        scale=3.5,
        size=1024,
        cfg_trunc_ratio=0.25,
        renorm_cfg=1.0,
        honoured=("cfg_trunc_ratio", "renorm_cfg", "flow_shift"),
    ),
)

SHEET = Sheet(
    name="lumina",
    title="Lumina-Image 2.0",
    path="library.families.lumina.model:Lumina",
    option_groups={"model": LuminaOptions, "objective": LuminaFlowOptions},
    files=FileMarks("a Lumina-Image-2.0", tensors=("cap_embedder.", "time_caption_embed."), pipelines=("Lumina2",)),
    networks={"lora": "networks.lora_lumina"} | EVERYWHERE,
    variants={"lumina2": LUMINA2},
    adapter_prefixes={"gemma2": "lora_te"},
    bucket_step=16,
    scripts={"network": "lumina_train_network.py", "finetune": "lumina_train.py"},
    token_option="--gemma2_max_token_length",
    models="Lumina-Image 2.0",
    page="docs/lumina.md",
    recipes={"network": "configs/lumina_lora.toml", "finetune": "configs/lumina_full.toml"},
    memory_recipes={
        "lumina_lora": MemoryRecipe("lumina_lora", "lumina", "LoRA for Lumina-Image 2.0"),
        "lumina_full": MemoryRecipe("lumina_full", "lumina", "All weights of Lumina-Image 2.0", IN_BACKWARD),
    },
    benchmarks={"lumina_lora": BenchmarkJob("lumina", "network", 1024, 1, 22.0, 48.0, 5.22)},
)
