# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from library.families.recipes import ADAFACTOR, IN_BACKWARD, BenchmarkJob, MemoryRecipe
from library.families.sd import PUBLISHED_LAYOUT
from library.families.sd3.options import SD3FineTuneOptions, SD3FlowOptions, SD3Options
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant


def _variant(name: str) -> Variant:
    """The prediction type is what files of this architecture have always said, and what readers know."""
    facts = ModelFacts(name, f"stable-diffusion-3-{name}", "diffusers", "epsilon", PUBLISHED_LAYOUT)
    return Variant(facts, PreviewDefaults(steps=28, scale=5.0, size=1024, honoured=("flow_shift",)))


SHEET = Sheet(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    path="library.families.sd3.model:StableDiffusion3",
    option_groups={"model": SD3Options, "objective": SD3FlowOptions, "finetune": SD3FineTuneOptions},
    files=FileMarks("an SD3", tensors=("joint_blocks.", "pos_embed."), pipelines=("StableDiffusion3",)),
    networks={"lora": "networks.lora_sd3"} | EVERYWHERE,
    variants={name: _variant(name) for name in ("medium", "5-medium", "5-large")},
    adapter_prefixes={"clip_l": "lora_te1", "clip_g": "lora_te2", "t5xxl": "lora_te3"},
    bucket_step=16,
    scripts={"network": "sd3_train_network.py", "finetune": "sd3_train.py"},
    token_option="--t5xxl_max_token_length",
    side_endings=("_clip_l", "_clip_g", "_t5xxl"),
    asked_encoders={"t5xxl": "train_t5xxl"},
    models="SD3, SD3.5 medium and large",
    page="docs/sd3.md",
    recipes={"network": "configs/sd3_lora.toml", "finetune": "configs/sd3_full.toml"},
    memory_recipes={
        "sd3_medium_lora": MemoryRecipe("sd3_lora", "sd35m", "LoRA for SD3.5 medium"),
        "sd3_medium_full": MemoryRecipe(
            "sd3_full", "sd35m", "All weights of SD3.5 medium", IN_BACKWARD, ways=({}, ADAFACTOR)
        ),
        "sd3_large_lora": MemoryRecipe(
            "sd3_lora", "sd35l", "LoRA for SD3.5 large", command={"sd3.5_medium": "sd3.5_large"}
        ),
    },
    benchmarks={"sd35m_full": BenchmarkJob("sd35m", "finetune", 1024, 1, 11.25, 33.7, 4.45, goal="<= 75 ms")},
)
