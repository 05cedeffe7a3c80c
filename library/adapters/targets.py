# SPDX-License-Identifier: Apache-2.0
"""Which modules of Stable Diffusion 1.x, 2.x and XL get adapters, under which names and in which order.

Names are fixed by the files that people share: `lora_unet_` or `lora_te_` and the module's path with `_` for `.`. The
U-Net's paths are those of diffusers in files of 1.x and 2.x and the published ones in files of XL, whose encoders are
`lora_te1_` and `lora_te2_`. transformers 5 dropped the level `text_model` of CLIPTextModel; names keep it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from library.adapters.block_ranks import BlockLayout
from library.adapters.target_spec import Component, TargetModule, TargetSpec
from library.errors import UserError
from library.families.sd.names import unet_module_names
from library.families.sdxl.names import sdxl_block

TextEncoders = nn.Module | Sequence[nn.Module | None] | None  # None in its place: gets no adapters

DENOISER_PREFIX = "lora_unet"
ENCODER_PREFIX = "lora_te"

UNKNOWN = "a {what} of the kind {kind} has no layers that adapters are known for"
SD_BLOCKS = BlockLayout(down=12, mid=1, up=12)
SDXL_BLOCKS = BlockLayout(down=9, mid=3, up=9, outer=1)
SD_ATTENTION = frozenset({"Transformer2DModel"})
SD_CONVOLUTION = frozenset({"ResnetBlock2D", "Downsample2D", "Upsample2D"})
CLIP_BLOCKS = frozenset({"CLIPAttention", "CLIPMLP"})

# Children whose order in files differs from the order in today's classes: these first, then the others.
CHILD_ORDER = {
    "BasicTransformerBlock": ("attn1", "ff", "attn2"),
    "CLIPAttention": ("k_proj", "v_proj", "q_proj", "out_proj"),
}
_SD_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")


def as_list(text_encoder: TextEncoders) -> list[nn.Module | None]:
    """One text encoder, several or none, as a list."""
    if text_encoder is None:
        return []
    return [text_encoder] if isinstance(text_encoder, nn.Module) else [*text_encoder]


def has_published_names(text_encoder: TextEncoders, unet: nn.Module | None) -> bool:
    """Whether files have the names of checkpoints: those of SDXL, whose U-Net is told sizes and has two encoders."""
    if unet is None:
        return len(as_list(text_encoder)) > 1
    config: Any = getattr(unet, "config", {})  # of diffusers; a plain module has none
    return config.get("addition_embed_type") == "text_time"


def block_layout(text_encoder: TextEncoders, unet: nn.Module | None) -> BlockLayout:
    """How the blocks are counted for which ranks and learning rates are given."""
    return SDXL_BLOCKS if has_published_names(text_encoder, unet) else SD_BLOCKS


def sd_targets(
    text_encoder: TextEncoders, unet: nn.Module | None, *, conv: bool = False, norm: bool = False
) -> list[TargetSpec]:
    """The default targets: Linear and 1x1 convolutions of attention; with `conv` everything in the residual blocks too.

    norm: the norms within those blocks as well. Text encoders come first.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    kinds += (nn.LayerNorm, nn.GroupNorm) if norm else ()
    return _targets(text_encoder, unet, CLIP_BLOCKS, SD_ATTENTION | SD_CONVOLUTION if conv else SD_ATTENTION, kinds)


def every_target(text_encoder: TextEncoders, unet: nn.Module | None) -> list[TargetSpec]:
    """Every layer that an adapter file may name: also those outside of the default blocks."""
    return _targets(text_encoder, unet, None, None, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm))


def _targets(
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    encoder_blocks: frozenset[str] | None,
    denoiser_blocks: frozenset[str] | None,
    kinds: tuple[type[nn.Module], ...],
) -> list[TargetSpec]:
    """Layers of `kinds` inside blocks of these classes (None: anywhere). Raises UserError for other models."""
    is_xl = has_published_names(text_encoder, unet)
    denoiser = [*(_sdxl_denoiser if is_xl else _denoiser)(unet, denoiser_blocks, kinds)]
    if unet is not None and not denoiser:
        raise UserError(UNKNOWN.format(what="denoiser", kind=type(unet).__name__))
    return [*_encoders(text_encoder, encoder_blocks, kinds, is_xl), *denoiser]


def sd_block(path: str) -> int | None:
    """Index among the 25 blocks of a Stable Diffusion U-Net, from a module path; None outside of them."""
    if path.startswith("mid_block."):
        return SD_BLOCKS.down
    found = _SD_BLOCK.match(path)
    if found is None:
        return None
    side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
    within = 2 if kind in ("downsamplers", "upsamplers") else index
    return (1 if side == "down" else SD_BLOCKS.down + SD_BLOCKS.mid) + 3 * level + within


def published_encoder_path(path: str) -> str:
    """A CLIP module path with the level `text_model` that published names have; the projection is outside of it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def encoder_targets(
    encoder: nn.Module,
    prefix: str,
    blocks: frozenset[str] | None,
    index: int,
    *,
    clip: bool = False,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> list[TargetSpec]:
    """Targets in a text encoder: the layers inside `blocks` (None: anywhere). clip: with the level `text_model`.

    Raises UserError when it has none: then it is of a kind that adapters do not know.
    """
    found = [
        _target(prefix, published_encoder_path(path) if clip else path, module, "text_encoder", encoder=index)
        for path, module in _walk(encoder, "", blocks, kinds)
    ]
    if not found:
        raise UserError(UNKNOWN.format(what="text encoder", kind=type(encoder).__name__))
    return found


def _encoders(
    text_encoder: TextEncoders, blocks: frozenset[str] | None, kinds: tuple[type[nn.Module], ...], numbered: bool
) -> Iterator[TargetSpec]:
    encoders = as_list(text_encoder)
    for index, encoder in enumerate(encoders):
        prefix = f"{ENCODER_PREFIX}{index + 1}" if numbered or len(encoders) > 1 else ENCODER_PREFIX
        if encoder is not None:
            yield from encoder_targets(encoder, prefix, blocks, index, clip=True, kinds=kinds)


def _denoiser(
    unet: nn.Module | None, blocks: frozenset[str] | None, kinds: tuple[type[nn.Module], ...]
) -> Iterator[TargetSpec]:
    for path, module in _walk(unet, "", blocks, kinds):
        yield _target(DENOISER_PREFIX, path, module, "denoiser", block=sd_block(path))


def _sdxl_denoiser(
    unet: nn.Module | None, blocks: frozenset[str] | None, kinds: tuple[type[nn.Module], ...]
) -> list[TargetSpec]:
    """In the order of the published names, within a block in ours."""
    if unet is None:
        return []
    table = {name.ours[0]: (place, name.published) for place, name in enumerate(unet_module_names(unet))}
    found = []
    for path, module in _walk(unet, "", blocks, kinds):
        steps = path.split(".")
        own = next(own for i in range(len(steps), 0, -1) if (own := ".".join(steps[:i])) in table)
        place, start = table[own]
        published = start + path[len(own) :]
        target = _target(DENOISER_PREFIX, published, module, "denoiser", block=sdxl_block(published))
        found.append((place, target))
    return [target for _, target in sorted(found, key=lambda pair: pair[0])]


def _target(
    prefix: str, path: str, module: nn.Module, part: Component, *, block: int | None = None, encoder: int = 0
) -> TargetSpec:
    name = f"{prefix}_{path.replace('.', '_')}"
    return TargetSpec(name, (TargetModule(path, module),), part, block=block, encoder=encoder, path=path)


def _walk(
    module: nn.Module | None, path: str, blocks: frozenset[str] | None, kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of the layers of `kinds` inside modules whose class is in `blocks` (None: anywhere)."""
    if module is None:
        return
    inside = None if blocks is None or type(module).__name__ in blocks else blocks
    first = CHILD_ORDER.get(type(module).__name__, ())
    children = dict(module.named_children())
    for name in (*(n for n in first if n in children), *(n for n in children if n not in first)):
        child, child_path = children[name], f"{path}.{name}" if path else name
        if inside is None and isinstance(child, kinds):
            if getattr(child, "weight", None) is not None:  # a norm may have none
                yield child_path, child
        else:
            yield from _walk(child, child_path, inside, kinds)
