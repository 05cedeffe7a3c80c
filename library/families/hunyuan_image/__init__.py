# SPDX-License-Identifier: Apache-2.0
"""HunyuanImage-2.1, base and distilled."""

from __future__ import annotations

from dataclasses import dataclass

from library.families.hunyuan_image.options import HunyuanImageFlowOptions, HunyuanImageOptions
from library.families.recipes import IN_BACKWARD, MemoryRecipe
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant

QWEN, BYT5 = "qwen25_vl", "byt5"  # the text encoders, and their states in a Cond: (B, length, width)
CODE = "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1"
# "diffusers" and "epsilon": sd-scripts writes these into adapters, and its readers expect them
FACTS = ModelFacts("hunyuan-image-2.1", "hunyuan-image-2.1", "diffusers", "epsilon", CODE)


@dataclass(frozen=True)
class HunyuanImageVariant(Variant):
    """A published model of HunyuanImage-2.1."""

    preview_shift: float = 5.0  # shift of the noise levels in previews, at every size


VARIANTS = {
    "base": HunyuanImageVariant(FACTS, PreviewDefaults(50, scale=3.5, size=2048, honoured=("flow_shift",))),
    "distilled": HunyuanImageVariant(
        FACTS,
        PreviewDefaults(8, scale=1.0, guidance=3.25, size=2048, honoured=("guidance_scale", "flow_shift")),
        preview_shift=4.0,
    ),
}

SHEET = Sheet(
    name="hunyuan_image",
    title="HunyuanImage-2.1",
    path="library.families.hunyuan_image.model:HunyuanImage",
    option_groups={"model": HunyuanImageOptions, "objective": HunyuanImageFlowOptions},
    files=FileMarks("a HunyuanImage-2.1", tensors=("byt5_in.", "context_embedder_2."), pipelines=("HunyuanImage",)),
    networks={"lora": "networks.lora_hunyuan_image"} | EVERYWHERE,
    variants=VARIANTS,
    adapter_prefixes={},
    asked_encoders={QWEN: "", BYT5: ""},  # never trained: no program has names for their layers
    bucket_step=32,
    scripts={"network": "hunyuan_image_train_network.py", "finetune": "hunyuan_image_train.py"},
    token_option="--text_encoder_max_token_length",
    models="HunyuanImage-2.1, base and distilled",
    page="docs/hunyuan_image.md",
    recipes={"network": "configs/hunyuan_image_lora.toml", "finetune": "configs/hunyuan_image_full.toml"},
    memory_recipes={
        "hunyuan_image_lora": MemoryRecipe("hunyuan_image_lora", "hunyuan_image", "LoRA for HunyuanImage-2.1"),
        "hunyuan_image_full": MemoryRecipe(
            "hunyuan_image_full", "hunyuan_image", "All weights of HunyuanImage-2.1", IN_BACKWARD
        ),
    },
)
