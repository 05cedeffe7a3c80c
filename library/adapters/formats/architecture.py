# SPDX-License-Identifier: Apache-2.0
"""The names under which adapter files know the layers of an architecture, in three formats.

kohya:  lora_unet_double_blocks_0_img_attn_qkv                     (published path, underscores)
comfy:  diffusion_model.double_blocks.0.img_attn.qkv               (published path; encoders: text_encoders.<name>...)
peft:   transformer.transformer_blocks.0.attn.to_q, .to_k, .to_v   (path in diffusers; fused layers are several)

Each model family has a small table of its own, an `Architecture` (library/families/<name>/adapter_names.py). Whatever
works with files is given the tables. Which program reads which of the formats: docs/lora_formats.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from library.key_tables import SWAP_HALVES, ModuleName, Shapes

# Prefixes of flattened diffusers paths: OneTrainer; older FLUX trainers and OneTrainer's U-Nets; LyCORIS, SimpleTuner
FLAT_DIFFUSERS = ("lora_transformer", "lora_unet", "lycoris")
PEFT_WRAPPER = "base_model.model."
MOST_BLOCKS = 200  # larger numbers in foreign keys do not enlarge a table
# For `readers`: of most transformers, and of models that every program has
EVERY_FORMAT = frozenset({"kohya", "comfy", "peft"})
READERS = {"ComfyUI": EVERY_FORMAT - {"peft"}, "diffusers": frozenset({"peft"})}
ALL_READERS = dict.fromkeys(("ComfyUI", "Forge", "diffusers"), EVERY_FORMAT)
READS_STATES = "^lora_unet_"  # for `inputs`: transformers whose other layers have inputs of other widths


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder: the prefixes of its layers' paths in each format, and in checkpoints.

    paths: the layers for a number of blocks, as named in transformers.
    """

    kohya: str
    comfy: str
    peft: str
    paths: Callable[[int], Iterable[str]]
    aliases: tuple[str, ...] = ()  # further kohya prefixes that other trainers write
    checkpoint: tuple[str, ...] = ()  # prefixes in single-file checkpoints, in the names of transformers
    open_clip: tuple[str, ...] = ()  # ... and in the names of OpenCLIP
    open_clip_names: Mapping[str, str] = field(default_factory=dict)  # path within a block -> the same in OpenCLIP
    flat_in_comfy: bool = False  # ComfyUI knows its kohya names too
    used_blocks: int | None = None  # checkpoints may hold one block more, which no picture depends on; None: all count


@dataclass(frozen=True)
class PublishedLayer:
    """A published layer and its names. The rows of the parts, concatenated, are the rows of the layer."""

    kohya: str
    comfy: str
    parts: tuple[str, ...]  # peft
    published: str  # path in the checkpoint file of its model
    encoder: Encoder | None = None  # the text encoder that it belongs to; None: the denoiser
    swap: bool = False  # (shift, scale) in published files, (scale, shift) in diffusers: where rows = 2 x inputs
    widths: tuple[float, ...] = (1.0,)  # rows of each part, in units of the inputs

    @property
    def comfy_flat(self) -> str:
        """The name under which ComfyUI finds a layer of the denoiser in files of kohya's format."""
        return f"lora_unet_{flat(self.comfy.removeprefix('diffusion_model.'))}"

    def apart(self, part: int) -> str:
        """Flat name of a part that is not a whole layer."""
        return f"lora_unet_{flat(self.parts[part].partition('.')[2])}"

    def swaps(self, rows: int, inputs: int) -> bool:
        """Whether diffusers has the halves of this layer's rows in the opposite order."""
        return self.swap and rows == 2 * inputs


@dataclass(frozen=True)
class FileFacts:
    """What the headers of files say about their architecture."""

    version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture without "/lora"
    implementation: str  # modelspec.implementation of adapters
    prediction: str | None  # modelspec.prediction_type
    size: int  # modelspec.resolution, of both sides
    network: str  # ss_network_module
    published: str  # modelspec.implementation of checkpoints


@dataclass(frozen=True, eq=False)
class Architecture:
    """How adapter files of one architecture name its layers, and what the LoRA tools need to know about it."""

    name: str
    title: str
    denoiser: Callable[[int], Iterable[ModuleName]]  # its layers, for a number of blocks of each kind
    encoders: tuple[Encoder, ...]
    facts: Callable[[Collection[str], bool], FileFacts]  # (tensor names of a checkpoint, v-prediction is assumed)
    new_layers: re.Pattern[str]  # kohya names of the denoiser's layers that an extracted LoRA has
    conv_layers: re.Pattern[str] | None = None  # ... with a rank for convolutions
    peft: str = "transformer"  # empty: our names say it themselves, where a denoiser is two models of diffusers
    kohya_is_diffusers: bool = False  # kohya keys have the path of diffusers instead of the published one
    # Program of library.adapters.readers -> formats whose names it takes. One that is not there has no such model
    readers: Mapping[str, frozenset[str]] = field(default_factory=lambda: READERS)
    fused: Mapping[int, tuple[float, ...]] = field(default_factory=dict)  # number of parts -> their `widths`
    comfy_alpha: bool = True  # False: a reader of the comfy format refuses alpha, so the scale is inside lora_B
    numbered_oft: bool = False  # kohya's OFT files number the rotations of a layer, also where it has one
    # End of a layer's kohya name -> widths of its input in the published models: where names fit several
    inputs: Mapping[str, frozenset[int]] = field(default_factory=dict)
    family: str = ""  # its model family, where that has another name
    variants: tuple[str, ...] = ()  # other names of models with the same layers
    # Whether a checkpoint of the family, by names and shapes, is of this architecture: where a family has several
    holds: Callable[[Shapes], bool] = lambda shapes: True
    not_in_last_block: str = ""  # a layer that all joint blocks but the last one have
    comfy_path: Callable[[str], str] = lambda published: published  # published path of a layer -> ComfyUI's

    def layers(self, blocks: int) -> Iterator[PublishedLayer]:
        """Every layer that an adapter may be on: encoders first, as in files."""
        for encoder in self.encoders:
            for path in encoder.paths(blocks):
                yield PublishedLayer(
                    f"{encoder.kohya}_{flat(path)}", f"{encoder.comfy}.{path}", (f"{encoder.peft}.{path}",), path,
                    encoder=encoder,
                )  # fmt: skip
        for name in self.denoiser(blocks):
            path = name.ours[0] if self.kohya_is_diffusers else name.published
            yield PublishedLayer(
                f"lora_unet_{flat(path)}",
                f"diffusion_model.{self.comfy_path(name.published)}",
                tuple(f"{self.peft}.{own}" if self.peft else own for own in name.ours),
                name.published,
                swap=name.op is SWAP_HALVES,
                widths=self.fused.get(len(name.ours), (1.0,) * len(name.ours)),
            )


Tables = Sequence[Architecture]  # in the order that decides about files that hold adapters of text encoders only


def table_named(tables: Tables, name: str) -> Architecture | None:
    """The table of an architecture, by its name or that of one of its variants."""
    return next((table for table in tables if name == table.name or name in table.variants), None)


def beginning(*starts: str) -> re.Pattern[str]:
    """Kohya names of a denoiser's layers that begin with one of `starts`."""
    return re.compile(f"lora_unet_({'|'.join(starts)}).*")


def flat(path: str) -> str:
    return path.replace(".", "_")


# ---- from a path in a file to a layer -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerPart:
    """What a path of a file stands for: a layer, or one part of it (as peft has it)."""

    layer: PublishedLayer
    part: int | None = None

    def is_comfy(self, path: str) -> bool:
        """Whether `path`, by which this was found, is a name of the comfy format: a path with dots of a whole layer.

        Or the flat form of such a path, where ComfyUI has other names than published files.
        """
        return self.part is None and ("." in path or path == self.layer.comfy_flat != self.layer.kohya)


@dataclass(frozen=True)
class NameIndex:
    """Every spelling of every layer of an architecture."""

    architecture: Architecture
    places: Mapping[str, LayerPart]

    def find(self, path: str) -> LayerPart | None:
        """The layer for a path, which may have prefixes of other programs. None when there is none."""
        path = unwrapped(path).removeprefix("model.diffusion_model.")
        for prefix in ("", "diffusion_model.", f"{self.architecture.peft}."):
            found = self.places.get(prefix + path)
            if found is not None:
                return found
        return None


def unwrapped(path: str) -> str:
    """A path without the prefix of PEFT's wrapper, which SimpleTuner leaves behind the name of the model."""
    before, wrapper, after = path.partition(PEFT_WRAPPER)
    return before + after if wrapper and "." not in before.removesuffix(".") else path


def blocks_in(paths: Iterable[str]) -> int:
    """Number of blocks that a table needs for these paths."""
    numbers = (int(number) for path in paths for number in re.findall(r"\d+", path))
    return 1 + max((n for n in numbers if n < MOST_BLOCKS), default=0)


@functools.lru_cache(maxsize=48)
def index_of(architecture: Architecture, blocks: int) -> NameIndex:
    """The index for a number of blocks. Own spellings override aliases."""
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
                own = flat(path.partition(".")[2])
                if layer.comfy != f"diffusion_model.{layer.published}":
                    aliases[layer.comfy_flat] = whole
                aliases |= {f"{prefix}_{own}": place for prefix in FLAT_DIFFUSERS}
    for encoder in architecture.encoders:
        for path in encoder.paths(blocks):
            whole = places[f"{encoder.kohya}_{flat(path)}"]
            aliases |= {f"{prefix}_{flat(path)}": whole for prefix in encoder.aliases}
    return NameIndex(architecture, aliases | places)
