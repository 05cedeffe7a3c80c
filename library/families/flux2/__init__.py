# SPDX-License-Identifier: Apache-2.0
"""FLUX.2: klein base 4B and 9B, and dev."""

from __future__ import annotations

from dataclasses import dataclass

from library.families.flux2.options import Flux2FlowOptions, Flux2Options
from library.families.recipes import IN_BACKWARD, MemoryRecipe
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant

CODE = "https://github.com/black-forest-labs/flux2"
KLEIN_PREVIEW = PreviewDefaults(50, scale=4.0, size=1024, honoured=("flow_shift",))

# replacements in the command of a recipe's header
KLEIN_9B = {"flux-2-klein-base-4b": "flux-2-klein-base-9b", "qwen_3_4b": "qwen_3_8b"}


@dataclass(frozen=True, kw_only=True)
class Flux2Variant(Variant):
    """A published model of FLUX.2."""

    title: str
    width: int  # of its states
    encoder: str  # its text encoder


VARIANTS = {
    "klein-4b": Flux2Variant(
        ModelFacts("flux2", "flux-2-klein-4b", CODE, None), KLEIN_PREVIEW,
        title="klein 4B", width=3072, encoder="Qwen3 4B",
    ),
    "klein-9b": Flux2Variant(
        ModelFacts("flux2", "flux-2-klein-9b", CODE, None), KLEIN_PREVIEW,
        title="klein 9B", width=4096, encoder="Qwen3 8B",
    ),
    "dev": Flux2Variant(
        ModelFacts("flux2", "flux-2-dev", CODE, None),
        PreviewDefaults(50, scale=1.0, guidance=4.0, size=1024, honoured=("guidance_scale", "flow_shift")),
        title="dev", width=6144, encoder="Mistral Small 3.2 24B",
    ),
}  # fmt: skip

SHEET = Sheet(
    name="flux2",
    title="FLUX.2",
    path="library.families.flux2.model:Flux2",
    option_groups={"model": Flux2Options, "objective": Flux2FlowOptions},
    files=FileMarks(
        "a FLUX.2", tensors=("double_stream_modulation_img.", "double_stream_modulation_txt."), pipelines=("Flux2",)
    ),
    networks={"lora": "networks.lora_flux2"} | EVERYWHERE,
    variants=VARIANTS,
    adapter_prefixes={"text_encoder": "lora_te"},
    bucket_step=16,
    scripts={"network": "flux2_train_network.py", "finetune": "flux2_train.py"},
    token_option="--text_encoder_max_token_length",
    asked_encoders={"text_encoder": ""},
    models="FLUX.2 klein base 4B and 9B, dev",
    page="docs/flux2.md",
    recipes={"network": "configs/flux2_lora.toml", "finetune": "configs/flux2_full.toml"},
    memory_recipes={
        "flux2_klein4b_lora": MemoryRecipe("flux2_lora", "klein4b", "LoRA for FLUX.2 klein base 4B"),
        "flux2_klein4b_full": MemoryRecipe("flux2_full", "klein4b", "All weights of FLUX.2 klein base 4B", IN_BACKWARD),
        "flux2_klein9b_lora": MemoryRecipe("flux2_lora", "klein9b", "LoRA for FLUX.2 klein base 9B", command=KLEIN_9B),
    },
)
