# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 dev, Kontext, Fill and schnell."""

from __future__ import annotations

from dataclasses import dataclass

from library.families.flux.options import FluxFineTuneOptions, FluxFlowOptions, FluxOptions
from library.families.recipes import IN_BACKWARD, BenchmarkJob, MemoryRecipe
from library.families.sheet import EVERYWHERE, FileMarks, ModelFacts, PreviewDefaults, Sheet, Variant

CODE = "https://github.com/black-forest-labs/flux"


@dataclass(frozen=True)
class FluxVariant(Variant):
    """A published model of FLUX.1's design."""

    text_length: int = 512  # tokens of T5 that it was trained with
    preview_shift: float | None = None  # of the noise levels in previews; None: it follows from the picture's size


VARIANTS = {
    "dev": FluxVariant(
        ModelFacts("flux1", "flux-1-dev", CODE, None),
        PreviewDefaults(20, scale=1.0, guidance=3.5, size=1024, honoured=("guidance_scale", "flow_shift")),
    ),
    "kontext": FluxVariant(
        ModelFacts("flux1", "flux-1-kontext-dev", CODE, None),
        PreviewDefaults(20, scale=1.0, guidance=2.5, size=1024, honoured=("guidance_scale", "flow_shift")),
    ),
    "fill": FluxVariant(
        ModelFacts("flux1", "flux-1-fill-dev", CODE, None),
        PreviewDefaults(20, scale=1.0, guidance=30.0, size=1024, honoured=("guidance_scale", "flow_shift")),
    ),
    "schnell": FluxVariant(
        ModelFacts("flux1", "flux-1-schnell", CODE, None),
        PreviewDefaults(4, scale=1.0, size=1024, honoured=("flow_shift",)),
        text_length=256,
        preview_shift=1.0,
    ),
}

SHEET = Sheet(
    name="flux",
    title="FLUX.1 and Chroma",
    path="library.families.flux.model:Flux",
    option_groups={"model": FluxOptions, "objective": FluxFlowOptions, "finetune": FluxFineTuneOptions},
    files=FileMarks(
        "a FLUX.1",
        tensors=("double_blocks.0.img_mod.lin.", "single_transformer_blocks.0.attn.to_q."),
        pipelines=("Flux",),
    ),
    networks={"lora": "networks.lora_flux", "oft": "networks.oft_flux"} | EVERYWHERE,
    variants=VARIANTS,
    adapter_prefixes={"clip_l": "lora_te1", "t5xxl": "lora_te3"},
    bucket_step=16,
    scripts={"network": "flux_train_network.py", "finetune": "flux_train.py"},
    family_option="model_type",
    token_option="--t5xxl_max_token_length",
    asked_encoders={"t5xxl": "train_t5xxl"},
    models="FLUX.1 dev, Kontext, Fill, schnell, Chroma",
    page="docs/flux.md",
    recipes={"network": "configs/flux_lora.toml", "finetune": "configs/flux_full.toml"},
    memory_recipes={
        "flux_lora": MemoryRecipe("flux_lora", "flux", "LoRA for FLUX.1 dev"),
        "flux_full": MemoryRecipe("flux_full", "flux", "All weights of FLUX.1 dev", IN_BACKWARD),
    },
    benchmarks={
        "flux_lora_512": BenchmarkJob("flux", "network", 512, 1, 21.5, 45.0, 23.68, hoists=True, goal="<= 80 ms"),
        "flux_lora_1024": BenchmarkJob(
            "flux", "network", 1024, 1, 74.4, 164.7, 23.68, hoists=True, goal="<= 270 ms, <= 5 GB"
        ),
    },
)
