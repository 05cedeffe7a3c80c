# SPDX-License-Identifier: Apache-2.0
"""Under which names adapter files know the layers of each architecture: one small table per architecture.

kohya:  lora_unet_double_blocks_0_img_attn_qkv                     (published path, underscores)
comfy:  diffusion_model.double_blocks.0.img_attn.qkv               (published path; encoders: text_encoders.<name>...)
peft:   transformer.transformer_blocks.0.attn.to_q, .to_k, .to_v   (path in diffusers; fused layers are several)

Which program reads which of them: docs/lora_formats.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from library.families.flux.names import flux_names
from library.families.lumina.names import lumina_names
from library.families.sd.names import unet_module_names
from library.families.sd3.names import sd3_names
from library.key_tables import SWAP_HALVES, ModuleName, expand, named

# Before the flat paths of diffusers: OneTrainer; older FLUX trainers and OneTrainer's U-Nets; LyCORIS, SimpleTuner
FLAT_DIFFUSERS = ("lora_transformer", "lora_unet", "lycoris")
PEFT_WRAPPER = "base_model.model."
MOST_BLOCKS = 200  # what numbers in foreign keys may blow a table up to


@dataclass(frozen=True)
class PublishedLayer:
    """A published layer and its names. Rows of the parts, one after the other, are the rows of the layer."""

    kohya: str
    comfy: str
    parts: tuple[str, ...]  # peft
    published: str  # path in the part's own checkpoint file
    encoder: bool = False
    swap: bool = False  # (shift, scale) in published files, (scale, shift) in diffusers: where rows = 2 x inputs
    widths: tuple[float, ...] = (1.0,)  # rows of each part, in units of the inputs

    def apart(self, part: int) -> str:
        """Flat name of a part that is not a whole layer."""
        return f"lora_unet_{flat(self.parts[part].partition('.')[2])}"

    def swaps(self, rows: int, inputs: int) -> bool:
        """Whether the halves of this layer's rows stand in another order in diffusers."""
        return self.swap and rows == 2 * inputs


@dataclass(frozen=True)
class Encoder:
    """A text encoder: what stands before the paths of its layers in each format."""

    kohya: str
    comfy: str
    peft: str
    paths: Callable[[int], Iterable[str]]
    aliases: tuple[str, ...] = ()  # further kohya prefixes that other trainers write


@dataclass(frozen=True, eq=False)
class Architecture:
    """How adapter files of one architecture are named."""

    name: str
    title: str
    denoiser: Callable[[int], Iterable[ModuleName]]  # for so many blocks of each kind
    encoders: tuple[Encoder, ...]
    peft: str = "transformer"
    kohya_is_diffusers: bool = False  # kohya keys have the path of diffusers instead of the published one
    fused: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # number of parts -> their `widths`
    comfy_alpha: bool = True  # False: a reader of the comfy format refuses alpha, so the scale is inside lora_B
    # End of a layer's kohya name -> widths of its input in the models that are published: where names fit several
    inputs: Mapping[str, frozenset[int]] = field(default_factory=dict)
    family: str = ""  # the model family that it is of, where that has another name
    not_in_last_block: str = ""  # a layer of joint blocks that the last one has not

    def layers(self, blocks: int) -> Iterator[PublishedLayer]:
        """Every layer that an adapter may be on: encoders first, as in files."""
        for encoder in self.encoders:
            for path in encoder.paths(blocks):
                yield PublishedLayer(
                    f"{encoder.kohya}_{flat(path)}", f"{encoder.comfy}.{path}", (f"{encoder.peft}.{path}",), path,
                    encoder=True,
                )  # fmt: skip
        for name in self.denoiser(blocks):
            path = name.ours[0] if self.kohya_is_diffusers else name.published
            yield PublishedLayer(
                f"lora_unet_{flat(path)}",
                f"diffusion_model.{name.published}",
                tuple(f"{self.peft}.{own}" for own in name.ours),
                name.published,
                swap=name.op is SWAP_HALVES,
                widths=self.fused.get(len(name.ours), (1.0,) * len(name.ours)),
            )


def flat(path: str) -> str:
    return path.replace(".", "_")


TEXT_PROJECTION = "text_projection"  # of CLIP, outside of its level text_model


# ---- text encoders ------------------------------------------------------------------------------------------------


def clip_paths(blocks: int) -> Iterator[str]:
    for i in range(blocks):
        block = f"text_model.encoder.layers.{i}"
        yield from (f"{block}.self_attn.{name}_proj" for name in ("k", "v", "q", "out"))
        yield from (f"{block}.{name}" for name in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"))
    yield "text_model.final_layer_norm"


def clip_with_projection_paths(blocks: int) -> Iterator[str]:
    yield from clip_paths(blocks)
    yield TEXT_PROJECTION


def t5_paths(blocks: int) -> Iterator[str]:
    for i in range(blocks):
        block = f"encoder.block.{i}.layer"
        yield from (f"{block}.0.{name}" for name in ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"))
        yield from (f"{block}.{name}" for name in ("0.SelfAttention.o", "0.layer_norm", "1.layer_norm"))
        yield from (f"{block}.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))
    yield "encoder.final_layer_norm"


def gemma2_paths(blocks: int) -> Iterator[str]:
    for i in range(blocks):
        yield from (f"layers.{i}.self_attn.{name}_proj" for name in "qkvo")
        yield from (f"layers.{i}.mlp.{name}_proj" for name in ("gate", "up", "down"))


# ---- denoisers ----------------------------------------------------------------------------------------------------

RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
TRANSFORMER = (
    *(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
UNET_OUTSIDE = ("conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_norm_out", "conv_out")
LABELS = ("add_embedding.linear_1", "add_embedding.linear_2")
UNET_SIDES = (("down", 2, "downsamplers"), ("up", 3, "upsamplers"))  # residual blocks of a level, what ends it


@dataclass(frozen=True)
class UnetShape:
    """How many transformer blocks each attention of a U-Net has, level by level; 0 is a level without attention."""

    down: tuple[int, ...]
    middle: int
    up: tuple[int, ...]
    outside: tuple[str, ...] = UNET_OUTSIDE

    def paths(self) -> Iterator[str]:
        """Its layers, as diffusers names them."""
        yield from self.outside
        for (side, resnets, sampler), depths in zip(UNET_SIDES, (self.down, self.up), strict=True):
            for i, depth in enumerate(depths):
                block = f"{side}_blocks.{i}"
                yield from (f"{block}.resnets.{j}.{name}" for j in range(resnets) for name in RESNET)
                if depth:
                    yield from (f"{block}.attentions.{j}.{name}" for j in range(resnets) for name in _attention(depth))
                if i < len(depths) - 1:
                    yield f"{block}.{sampler}.0.conv"
        yield from (f"mid_block.resnets.{j}.{name}" for j in range(2) for name in RESNET)
        yield from (f"mid_block.attentions.0.{name}" for name in _attention(self.middle))


SD_UNET = UnetShape((1, 1, 1, 0), 1, (0, 1, 1, 1))
SDXL_UNET = UnetShape((0, 2, 10), 10, (10, 2, 0), (*UNET_OUTSIDE, *LABELS))


def _attention(depth: int) -> tuple[str, ...]:
    inner = (f"transformer_blocks.{i}.{name}" for i in range(depth) for name in TRANSFORMER)
    return ("norm", "proj_in", *inner, "proj_out")


@functools.cache
def unet_names(shape: UnetShape) -> tuple[ModuleName, ...]:
    """Published and own names. The published ones follow the module tree, so a tree of empty modules is made."""
    paths = [*shape.paths()]
    tree = nn.Module()
    for path in paths:
        here = tree
        for step in path.split("."):
            if step not in dict(here.named_children()):
                here.add_module(step, nn.Module())
            here = here.get_submodule(step)
    return tuple(named(rule.published, *rule.ours) for rule in expand(unet_module_names(tree), paths))


def flux_denoiser(blocks: int) -> list[ModuleName]:
    return [n for n in flux_names(blocks, blocks, guidance_layers=blocks) if not n.published.endswith(".scale")]


def sd3_denoiser(blocks: int) -> list[ModuleName]:
    """A file does not say how many blocks the model has, so `PublishedLayer.swaps` finds the last one by its shape."""
    last = ".context_block.adaLN_modulation.1"
    return [replace(n, op=SWAP_HALVES) if n.published.endswith(last) else n for n in sd3_names(blocks)]


# ---- the table ----------------------------------------------------------------------------------------------------


READS_TEXT = "attn2_to_[kv]$"
READS_STATES = "^lora_unet_"  # the other inputs of these models are of other widths


def _sd(name: str, title: str, clip: str, text: int) -> Architecture:
    encoder = Encoder("lora_te", f"text_encoders.{clip}.transformer", "text_encoder", clip_paths, ("lora_te1",))
    inputs = {READS_TEXT: frozenset({text}), "self_attn_[qkv]_proj$": frozenset({text})}
    return Architecture(
        name, title, lambda blocks: unet_names(SD_UNET), (encoder,), peft="unet", kohya_is_diffusers=True,
        inputs=inputs, family="sd",
    )  # fmt: skip


CLIP_L = Encoder("lora_te1", "text_encoders.clip_l.transformer", "text_encoder", clip_with_projection_paths)
CLIP_G = Encoder("lora_te2", "text_encoders.clip_g.transformer", "text_encoder_2", clip_with_projection_paths)
T5_OF_SD3 = Encoder("lora_te3", "text_encoders.t5xxl.transformer", "text_encoder_3", t5_paths)
T5_OF_FLUX = replace(T5_OF_SD3, peft="text_encoder_2", aliases=("lora_te2",))
GEMMA2 = Encoder("lora_te", "text_encoders.gemma2_2b.transformer.model", "text_encoder", gemma2_paths)

# In this order, which decides about files that have text encoders only.
ARCHITECTURES = (
    _sd("sd1", "Stable Diffusion 1.x", "clip_l", 768),
    _sd("sd2", "Stable Diffusion 2.x", "clip_h", 1024),
    Architecture(
        "flux", "FLUX.1 or Chroma", flux_denoiser, (CLIP_L, T5_OF_FLUX), fused={4: (1.0, 1.0, 1.0, 4.0)},
        inputs={READS_STATES: frozenset({3072})}, family="chroma",
    ),
    Architecture(
        "sdxl", "Stable Diffusion XL", lambda blocks: unet_names(SDXL_UNET), (CLIP_L, CLIP_G), peft="unet",
        inputs={READS_TEXT: frozenset({2048}), "te1_.+self_attn_[qkv]_proj$": frozenset({768})},
    ),
    Architecture(
        "sd3", "Stable Diffusion 3 or 3.5", sd3_denoiser, (CLIP_L, CLIP_G, T5_OF_SD3),
        inputs={READS_STATES: frozenset({1536, 2432})}, not_in_last_block="context_block_attn_proj",
    ),
    Architecture(
        "lumina", "Lumina-Image 2.0", lambda blocks: lumina_names(blocks, blocks), (GEMMA2,),
        fused={3: (1.0, 1 / 3, 1 / 3)}, comfy_alpha=False, inputs={READS_STATES: frozenset({2304})},
    ),
)  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def of_family(family: str) -> tuple[str, ...] | None:
    """The architectures of a model family; None when it has no table here."""
    return tuple(a.name for a in ARCHITECTURES if family in (a.name, a.family)) or None


# ---- from a path in a file to a layer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPart:
    """What a path of a file stands for: a layer, or one part of it (as peft has it)."""

    layer: PublishedLayer
    part: int | None = None

    def is_comfy(self, path: str) -> bool:
        """Whether the place was found by a name of the comfy format: a whole layer by a path with dots."""
        return self.part is None and "." in path


@dataclass(frozen=True)
class NameIndex:
    """Every spelling of every layer of an architecture."""

    architecture: Architecture
    places: Mapping[str, LayerPart]

    def find(self, path: str) -> LayerPart | None:
        """The layer for a path, with whatever other programs write before it."""
        path = unwrapped(path).removeprefix("model.diffusion_model.")
        for prefix in ("", "diffusion_model.", f"{self.architecture.peft}."):
            found = self.places.get(prefix + path)
            if found is not None:
                return found
        return None


def unwrapped(path: str) -> str:
    """A path without what PEFT's wrapper puts before it, which SimpleTuner leaves behind the name of the model."""
    before, wrapper, after = path.partition(PEFT_WRAPPER)
    return before + after if wrapper and "." not in before.removesuffix(".") else path


def blocks_in(paths: Iterable[str]) -> int:
    """How many blocks a table needs for these paths."""
    numbers = (int(number) for path in paths for number in re.findall(r"\d+", path))
    return 1 + max((n for n in numbers if n < MOST_BLOCKS), default=0)


@functools.lru_cache(maxsize=48)
def index_of(architecture: Architecture, blocks: int) -> NameIndex:
    """The index for so many blocks. Own spellings win over aliases."""
    places: dict[str, LayerPart] = {}
    aliases: dict[str, LayerPart] = {}
    for layer in architecture.layers(blocks):
        whole = LayerPart(layer, None)
        places |= {layer.kohya: whole, layer.comfy: whole}
        for i, path in enumerate(layer.parts):
            place = LayerPart(layer, i)
            places[path] = place
            if layer.encoder:
                aliases[path.replace(".text_model.", ".")] = place  # as transformers 5 has it
            else:
                own = flat(path.removeprefix(f"{architecture.peft}."))
                aliases |= {f"{prefix}_{own}": place for prefix in FLAT_DIFFUSERS}
    for encoder in architecture.encoders:
        for path in encoder.paths(blocks):
            whole = places[f"{encoder.kohya}_{flat(path)}"]
            aliases |= {f"{prefix}_{flat(path)}": whole for prefix in encoder.aliases}
    return NameIndex(architecture, aliases | places)
