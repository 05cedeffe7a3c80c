# SPDX-License-Identifier: Apache-2.0
"""Which modules of Stable Diffusion 1.x and 2.x get adapters, under which names and in which order.

Names are fixed by the files that people share: `lora_unet_` or `lora_te_` and the module's path with `_` for `.`.
transformers 5 dropped the level `text_model` of CLIPTextModel; names keep it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from networks.lr_weights import BlockLayout
from networks.spec import Part, TargetModule, TargetSpec

TextEncoders = nn.Module | Sequence[nn.Module | None] | None  # None in its place: gets no adapters

DENOISER_PREFIX = "lora_unet"
ENCODER_PREFIX = "lora_te"

SD_BLOCKS = BlockLayout(down=12, mid=1, up=12)
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


def sd_targets(
    text_encoder: TextEncoders, unet: nn.Module | None, *, conv: bool = False, norm: bool = False
) -> list[TargetSpec]:
    """The default targets: Linear and 1x1 convolutions of attention; with `conv` everything in the residual blocks too.

    norm: the norms within those blocks as well. Text encoders come first.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    kinds += (nn.LayerNorm, nn.GroupNorm) if norm else ()
    blocks = SD_ATTENTION | SD_CONVOLUTION if conv else SD_ATTENTION
    return [*_encoders(text_encoder, CLIP_BLOCKS, kinds), *_denoiser(unet, blocks, kinds)]


def every_target(text_encoder: TextEncoders, unet: nn.Module | None) -> list[TargetSpec]:
    """Every layer that an adapter file may name: also those outside of the default blocks."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
    return [*_encoders(text_encoder, None, kinds), *_denoiser(unet, None, kinds)]


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
    """A CLIP module path with the level `text_model` that published names have."""
    return path if path.startswith("text_model.") else f"text_model.{path}"


def encoder_targets(
    encoder: nn.Module,
    prefix: str,
    blocks: frozenset[str] | None,
    index: int,
    *,
    clip: bool = False,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> list[TargetSpec]:
    """Targets in a text encoder: the layers inside `blocks` (None: anywhere). clip: with the level `text_model`."""
    return [
        _target(prefix, published_encoder_path(path) if clip else path, module, "text_encoder", encoder=index)
        for path, module in _walk(encoder, "", blocks, kinds)
    ]


def _encoders(
    text_encoder: TextEncoders, blocks: frozenset[str] | None, kinds: tuple[type[nn.Module], ...]
) -> Iterator[TargetSpec]:
    encoders = as_list(text_encoder)
    for index, encoder in enumerate(encoders):
        prefix = ENCODER_PREFIX if len(encoders) == 1 else f"{ENCODER_PREFIX}{index + 1}"
        if encoder is not None:
            yield from encoder_targets(encoder, prefix, blocks, index, clip=True, kinds=kinds)


def _denoiser(
    unet: nn.Module | None, blocks: frozenset[str] | None, kinds: tuple[type[nn.Module], ...]
) -> Iterator[TargetSpec]:
    for path, module in _walk(unet, "", blocks, kinds):
        yield _target(DENOISER_PREFIX, path, module, "denoiser", block=sd_block(path))


def _target(
    prefix: str, path: str, module: nn.Module, part: Part, *, block: int | None = None, encoder: int = 0
) -> TargetSpec:
    name = f"{prefix}_{path.replace('.', '_')}"
    return TargetSpec(name, (TargetModule(path, module),), part, block=block, encoder=encoder)


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
