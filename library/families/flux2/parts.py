# SPDX-License-Identifier: Apache-2.0
"""The parts of FLUX.2: denoiser, text encoder and autoencoder, each from its own file or folder or from the model's.

Files are found and read as for FLUX.1 (library/families/flux/parts.py). The shapes in a single file tell everything
that differs between the configurations of the models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError
from library.families.family import ModelParts
from library.families.flux.parts import WEIGHTS, Design, Layout, Source, open_denoiser
from library.families.flux.patches import keep_time_exact
from library.families.flux2 import VARIANTS, Flux2Variant
from library.families.flux2.names import flux2_names
from library.families.flux2.options import Flux2Options
from library.key_tables import Rule, Shapes, expand
from library.weights.flux2_vae import vae_part
from library.weights.language_models import language_encoder
from library.weights.loading import PIPELINE_FILES, locate, read_json
from library.weights.sizes import has, shape_of

ENCODER = "text_encoder"  # its name, and that of its states in a Cond
LATENT_CHANNELS = 128  # width of a token
# published names of the distilled models, for few steps and no guidance
DISTILLED = re.compile(r"flux[-_.]?2[-_]klein[-_](4b|9b)(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class TextStates:
    """How a model uses its text encoder: its kind, the layers that are read, and the chat around a caption."""

    kind: str  # of library.weights.language_models
    prefixes: tuple[str, ...]  # of its names in all-in-one files
    layers: tuple[int, ...]  # layers whose states are concatenated; those above the last are not loaded
    before: str
    after: str


KLEIN_TEXT = TextStates(
    "qwen3",
    ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer."),
    (9, 18, 27),
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
DEV_TEXT = TextStates(
    "mistral",
    ("text_encoders.mistral3_24b.transformer.",),
    (10, 20, 30),
    "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing on "
    "object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]",
    "[/INST]",
)


@dataclass(frozen=True, kw_only=True)
class Flux2Parts(ModelParts):
    """Where each module comes from."""

    text: TextStates
    encoder_path: Path


def open_parts(options: Flux2Options) -> Flux2Parts:
    """Read headers and configurations only. Of a hub id, only parts that no other option gives are downloaded.

    Raises UserError for files of another kind, for distilled models and for missing parts.
    """
    given = {"text_encoder": options.text_encoder, "ae": options.ae}
    sources = {
        "text_encoder": Source("--text_encoder", "text_encoder", "text_encoders."),
        "ae": Source("--ae", "vae", "vae."),
    }
    model = options.pretrained_model_name_or_path or ""
    wanted = [f"{source.folder}/*.safetensors" for name, source in sources.items() if not given[name]]
    files = (*PIPELINE_FILES, "transformer/*.safetensors", WEIGHTS, *wanted)
    path = locate(model, "--pretrained_model_name_or_path", files)
    denoiser, config = open_denoiser(path, FLUX2)
    refuse_distilled(model, path, variant_of(config))
    places = {name: source.find(given[name], path, denoiser.file.shapes) for name, source in sources.items()}
    encoder_path, ae = places["text_encoder"], places["ae"]
    if encoder_path is None or ae is None:
        missing = [sources[name].option for name, place in places.items() if place is None]
        raise UserError([f"{option} is missing: {path} has none inside" for option in missing])
    text = DEV_TEXT if config["guidance_embeds"] else KLEIN_TEXT
    encoder = language_encoder(
        text.kind, encoder_path, option="--text_encoder", prefixes=(*text.prefixes, ""), layers=text.layers[-1]
    )
    return Flux2Parts(
        path=path, denoiser=denoiser, config=config, vae=vae_part(ae, option="--ae"), encoders={ENCODER: encoder},
        text=text, encoder_path=encoder_path,
    )  # fmt: skip


def variant_of(config: Mapping[str, Any]) -> Flux2Variant:
    """The published model with this configuration, or the one most like it."""
    if config["guidance_embeds"]:
        return VARIANTS["dev"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return VARIANTS["klein-9b" if width == VARIANTS["klein-9b"].width else "klein-4b"]


def refuse_distilled(model: str, path: Path, variant: Flux2Variant) -> None:
    """Raise UserError for distilled klein models, recognised by model_index.json or by their published names.

    The shapes of their weights are those of the base models. model: the user's path or hub id.
    """
    indices = [folder / "model_index.json" for folder in (path, path.parent) if path.is_dir()]
    said = any(read_json(index).get("is_distilled") for index in indices if index.is_file())
    if said or (variant is not VARIANTS["dev"] and DISTILLED.search(Path(model).name)):
        size = variant.title.removeprefix("klein ")
        raise UserError(
            f"{path} is FLUX.2 {variant.title}, which is distilled to few steps: training breaks that. Train its base "
            f"model, black-forest-labs/FLUX.2-klein-base-{size}; a LoRA of that works on both"
        )


# ---- denoiser -------------------------------------------------------------------------------------------------------


def flux2_sizes(shapes: Shapes, names: Layout) -> dict[str, Any]:
    """Configuration of guidance, time and feed-forward layers from the shapes. Positions have four equal axes."""
    (head,) = shape_of(shapes, names.head, 1)
    published = has(shapes, "time_in.")
    time = "time_in.in_layer" if published else "time_guidance_embed.timestep_embedder.linear_1"
    inner = "double_blocks.0.img_mlp.2" if published else "transformer_blocks.0.ff.linear_out"
    width, hidden = shape_of(shapes, f"{inner}.weight", 2)
    return {
        "axes_dims_rope": [head // 4] * 4,
        "timestep_guidance_channels": shape_of(shapes, f"{time}.weight", 2)[1],
        "mlp_ratio": hidden / width,
        "guidance_embeds": has(shapes, "guidance_in.", "time_guidance_embed.guidance_embedder."),
    }


def build_flux2(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    module: Any = Flux2Transformer2DModel.from_config(dict(config))
    return module


def denoiser_rules(module: nn.Module) -> tuple[Rule, ...]:
    """The published names of a FLUX.2 transformer."""
    config: Any = module.config
    return expand(flux2_names(config.num_layers, config.num_single_layers), module.state_dict())


FLUX2 = Design(
    "flux2",
    "FLUX.2 transformer",
    build_flux2,
    denoiser_rules,
    partial(keep_time_exact, name="time_guidance_embed"),
    flux2_sizes,
    encoders={},
    depths={
        3072: {"num_layers": 5, "num_single_layers": 20},
        4096: {"num_layers": 8, "num_single_layers": 24},
        6144: {"num_layers": 8, "num_single_layers": 48},
    },
    token=LATENT_CHANNELS,
)
