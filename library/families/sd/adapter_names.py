# SPDX-License-Identifier: Apache-2.0
"""Names of the layers of Stable Diffusion 1.x and 2.x in adapter files, and of U-Nets in general."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from library.adapters.formats.architecture import ALL_READERS, Architecture, Encoder, FileFacts
from library.families.detect import context_dim
from library.families.file_facts import file_facts
from library.families.sd import SHEET
from library.families.sd.names import unet_module_names
from library.families.text_encoder_names import CLIP_L_IN_CHECKPOINTS, OPEN_CLIP_NAMES, clip_paths
from library.key_tables import ModuleName, Shapes, expand, named

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


READS_TEXT = "attn2_to_[kv]$"
# The layers of a new LoRA, by kohya name
ATTENTION = re.compile(r"lora_unet_.*(_transformer_blocks_\d+_.*|_proj_(in|out))")
CONVOLUTIONS = re.compile(
    r"lora_unet_(.*_(resnets|downsamplers|upsamplers)_.*|(input_blocks_(?!0_)|middle_block_|output_blocks_)\d.*)"
)
SD2_WIDTH = 1024  # of the text states that the U-Net reads
SD_UNET = UnetShape((1, 1, 1, 0), 1, (0, 1, 1, 1))
CLIP_L = Encoder(
    "lora_te", "text_encoders.clip_l.transformer", "text_encoder", clip_paths, ("lora_te1",),
    checkpoint=CLIP_L_IN_CHECKPOINTS,
)  # fmt: skip
CLIP_H = Encoder(
    "lora_te", "text_encoders.clip_h.transformer", "text_encoder", clip_paths, ("lora_te1",),
    open_clip=("cond_stage_model.model.",), open_clip_names=OPEN_CLIP_NAMES, used_blocks=23,
)  # fmt: skip


def sd1_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    return file_facts(SHEET, "sd1")


def sd2_facts(names: Collection[str], v_prediction: bool) -> FileFacts:
    return file_facts(SHEET, "sd2 v", size=768) if v_prediction else file_facts(SHEET, "sd2")


def is_published(shapes: Shapes) -> bool:
    """Whether a checkpoint is a single file in published names."""
    return "model.diffusion_model.input_blocks.0.0.weight" in shapes


def is_sd2(shapes: Shapes) -> bool:
    """Whether a checkpoint is of 2.x: by the width of the text states, or by its text encoder, which is OpenCLIP's."""
    return context_dim(shapes) == SD2_WIDTH or any("cond_stage_model.model." in name for name in shapes)


SD1 = Architecture(
    "sd1", "Stable Diffusion 1.x", lambda blocks: unet_names(SD_UNET), (CLIP_L,), sd1_facts, ATTENTION, CONVOLUTIONS,
    peft="unet", readers=ALL_READERS, kohya_is_diffusers=True, family="sd",
    inputs={READS_TEXT: frozenset({768}), "self_attn_[qkv]_proj$": frozenset({768})},
    holds=lambda shapes: is_published(shapes) and not is_sd2(shapes),
)  # fmt: skip
SD2 = Architecture(
    "sd2", "Stable Diffusion 2.x", lambda blocks: unet_names(SD_UNET), (CLIP_H,), sd2_facts, ATTENTION, CONVOLUTIONS,
    peft="unet", readers=ALL_READERS, kohya_is_diffusers=True, family="sd",
    inputs={READS_TEXT: frozenset({1024}), "self_attn_[qkv]_proj$": frozenset({1024})},
    holds=lambda shapes: is_published(shapes) and is_sd2(shapes),
)  # fmt: skip
TABLES = (SD1, SD2)
