# SPDX-License-Identifier: Apache-2.0
"""The parts of a model of FLUX.1's design: denoiser, autoencoder and text encoders of files, folders or a pipeline.

A single file holds no configuration: every width and count is read from its shapes, so that models of other sizes load
too. Names are those of Black Forest Labs or of diffusers, with any prefix that programs put before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from library.errors import UserError
from library.families.detect import PREFIXES
from library.families.family import ModelParts
from library.families.flux.names import flux_names
from library.families.flux.options import FluxOptions
from library.families.flux.patches import keep_time_exact
from library.families.own_files import require_own_file, require_own_folder
from library.key_tables import Rule, Shapes, expand
from library.weights import kl_vae
from library.weights.loading import PIPELINE_FILES, Part, locate, own_names, part_file, read_json, shipped_config
from library.weights.sizes import below, depth, has, reading_sizes, shape_of
from library.weights.text_encoders import clip_encoder, t5_encoder
from library.weights.weight_files import WeightFile, open_weights

CLIP, T5 = "clip_l", "t5xxl"  # names of the text encoders
LATENT_TOKEN = 64  # numbers of a token: 2 x 2 latent pixels of 16 channels
FILL_TOKEN = 384  # of FLUX.1 Fill: with the masked picture's latents and the mask
PUBLISHED_DEPTHS = {3072: {"num_layers": 19, "num_single_layers": 38}}  # of FLUX.1 and of Chroma
VAE_ANSWER = {"vae": "a VAE, not a checkpoint: it belongs to --ae"}
WEIGHTS = "diffusion_pytorch_model*.safetensors"  # of a repository that is a transformer only


@dataclass(frozen=True, kw_only=True)
class FluxParts(ModelParts):
    """Where each module comes from."""

    places: Mapping[str, Path]  # file or folder of each encoder


@dataclass(frozen=True)
class Source:
    """A part that has an option of its own, or comes with the model."""

    option: str
    folder: str  # in a pipeline
    prefix: str  # in an all-in-one file

    def find(self, given: str | None, model: Path, names: Shapes) -> Path | None:
        """Its file or folder, or None."""
        if given:
            patterns = (f"{self.folder}/*", "*.safetensors*", "config.json")
            place = locate(given, self.option, patterns)
            return place / self.folder if (place / self.folder).is_dir() else place
        if model.is_dir():
            return place if (place := model / self.folder).is_dir() else None
        return model if any(name.startswith(self.prefix) for name in names) else None


AE = Source("--ae", "vae", "vae.")
CLIP_SOURCE = Source("--clip_l", "text_encoder", "text_encoders.clip_l.transformer.")
T5_SOURCE = Source("--t5xxl", "text_encoder_2", "text_encoders.t5xxl.transformer.")


@dataclass(frozen=True)
class Design:
    """What sets FLUX.1 apart from the models that are made like it."""

    family: str  # in library.families.registry; also the configuration in configs/models
    what: str  # its denoiser, for messages
    build: Callable[[Mapping[str, Any]], nn.Module]
    rules: Callable[[nn.Module], tuple[Rule, ...]]  # its published names
    patch: Callable[[nn.Module], None]
    # the part of the config that is its own and that the shapes tell
    sizes: Callable[[Shapes, Layout], dict[str, Any]]
    encoders: Mapping[str, Source]
    answers: Mapping[str, str] = field(default_factory=dict)  # what to say of the files of another family
    extras: tuple[str, ...] = ()  # as in `Part`
    depths: Mapping[int, Mapping[str, int]] = field(default_factory=lambda: PUBLISHED_DEPTHS)  # ... published_depths
    token: int = LATENT_TOKEN


def open_parts(options: FluxOptions, design: Design) -> FluxParts:
    """Read headers and configurations only; a hub id is downloaded, as far as nothing else is given for it.

    Raises UserError for files of another architecture and for parts that are neither given nor in the model.
    """
    given = {CLIP: options.clip_l, T5: options.t5xxl, "ae": options.ae}
    sources = {**design.encoders, "ae": AE}
    model = options.pretrained_model_name_or_path or ""
    wanted = [f"{source.folder}/*.safetensors" for name, source in sources.items() if not given[name]]
    path = locate(
        model, "--pretrained_model_name_or_path", (*PIPELINE_FILES, "transformer/*.safetensors", WEIGHTS, *wanted)
    )
    denoiser, config = open_denoiser(path, design)
    places = {name: source.find(given[name], path, denoiser.file.shapes) for name, source in sources.items()}
    found = {name: place for name, place in places.items() if place}
    if missing := [sources[name].option for name in places if name not in found]:
        raise UserError([f"{option} is missing: {path} has none inside" for option in missing])
    encoders = {T5: t5_encoder(found[T5], option="--t5xxl", prefixes=(sources[T5].prefix, ""))}
    if CLIP in found:
        clip = clip_encoder(found[CLIP], option="--clip_l", projection=False, prefixes=(CLIP_SOURCE.prefix, ""))
        encoders = {CLIP: clip, **encoders}
    vae = kl_vae.vae_part(found["ae"], shipped_config("flux_ae"), needed=kl_vae.FLUX, option="--ae")
    return FluxParts(path=path, denoiser=denoiser, config=config, vae=vae, encoders=encoders, places=found)


# ---- denoiser -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """One way to name the weights, as far as sizes are read from them: whole names, or starts of several."""

    double: str
    single: str
    head: str
    image: str
    text: str
    pooled: str
    guidance: str


PUBLISHED = Layout(
    "double_blocks.{}.",
    "single_blocks.{}.",
    "double_blocks.0.img_attn.norm.query_norm.scale",
    "img_in.",
    "txt_in.weight",
    "vector_in.in_layer.weight",
    "guidance_in.",
)
DIFFUSERS = Layout(
    "transformer_blocks.{}.",
    "single_transformer_blocks.{}.",
    "transformer_blocks.0.attn.norm_q.weight",
    "x_embedder.",
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "time_text_embed.guidance_embedder.",
)


def open_denoiser(path: Path, design: Design) -> tuple[Part, dict[str, Any]]:
    """The denoiser of a file or a folder, and its configuration."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    own: dict[str, Any] = {}
    answers = {**VAE_ANSWER, **design.answers}
    if path.is_dir():
        require_own_folder(path, design.family, answers)
        own = read_json(folder / "config.json")
    file = part_file(folder) if path.is_dir() else open_weights(path)
    require_own_file(file, design.family, answers)
    prefix, names = _layout_of(file)
    with reading_sizes(file.path, prefix):
        found = below(file.shapes, prefix)
        config = {**shipped_config(design.family), **sizes(found, names), **design.sizes(found, names), **own}
    if config["in_channels"] != design.token:
        raise UserError(f"{file.path} {_other_input(config['in_channels'], design.token)}")
    rules = own_names if names is DIFFUSERS else design.rules
    part = Part(
        design.what, file, prefix, partial(design.build, config), rules,
        finish=design.patch, extras=design.extras, published_depths=design.depths,
    )  # fmt: skip
    return part, config


def _other_input(found: int, wanted: int) -> str:
    """What to say of a model whose tokens have another number of inputs."""
    numbers = f"({found} numbers per token, not {wanted})"
    if (found, wanted) == (FILL_TOKEN, LATENT_TOKEN):
        return f"is a FLUX.1 Fill model {numbers}: add --model_type fill"
    if (found, wanted) == (LATENT_TOKEN, FILL_TOKEN):
        return f"is not a FLUX.1 Fill model {numbers}: leave --model_type fill out"
    return f"is a control or edit model {numbers}: it cannot be trained here"


def _layout_of(file: WeightFile) -> tuple[str, Layout]:
    """The prefix of the names, and which names they are."""
    for prefix in ("", *PREFIXES):
        for names in (PUBLISHED, DIFFUSERS):
            if has(file.shapes, prefix + names.image):
                return prefix, names
    raise UserError(f"{file.path} is incomplete: it lacks {PUBLISHED.image}weight")


def sizes(shapes: Shapes, names: Layout) -> dict[str, Any]:
    """The part of the config that the shapes tell in every design. Raises SizeError naming what is not there."""
    width, tokens = shape_of(shapes, f"{names.image}weight", 2)
    (head,) = shape_of(shapes, names.head, 1)
    return {
        "in_channels": tokens,
        "num_layers": depth(shapes, names.double),
        "num_single_layers": depth(shapes, names.single),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape_of(shapes, names.text, 2)[1],
        "axes_dims_rope": rotary_axes(head),
    }


def flux_sizes(shapes: Shapes, names: Layout) -> dict[str, Any]:
    """What the shapes tell of CLIP-L's pooled output and of the guidance."""
    return {
        "pooled_projection_dim": shape_of(shapes, names.pooled, 2)[1],
        "guidance_embeds": has(shapes, names.guidance),
    }


def rotary_axes(head: int) -> list[int]:
    """Dimensions of a head for index, row and column: 16, 56, 56 of 128, and that proportion in small models."""
    side = 2 * (7 * head // 32)
    return [head - 2 * side, side, side]


def build_flux(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(dict(config))


def denoiser_rules(module: nn.Module) -> tuple[Rule, ...]:
    """The published names of a FLUX.1 or Chroma transformer."""
    config: Any = module.config
    names = flux_names(config.num_layers, config.num_single_layers, config.get("approximator_layers", 0))
    return expand(names, module.state_dict())


FLUX = Design(
    "flux",
    "FLUX.1 transformer",
    build_flux,
    denoiser_rules,
    keep_time_exact,
    flux_sizes,
    encoders={CLIP: CLIP_SOURCE, T5: T5_SOURCE},
)
