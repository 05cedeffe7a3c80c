# SPDX-License-Identifier: Apache-2.0
"""What the parts of published models are called in kohya-ss/sd-scripts: third-party networks look for these classes.

Per denoiser or text encoder, a rule is a regular expression on the path of a layer, whose first group is the path of
the part, the class of the part, and a second class that stands in where a network knows none of the first ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ClassRule:
    """A part and the names of its class."""

    pattern: re.Pattern[str]
    name: str
    stand_in: str


@dataclass(frozen=True)
class ClassNames:
    """The class of a whole model and those of its parts."""

    root: str
    rules: tuple[ClassRule, ...]

    def parts(self, paths: Iterable[str], *, stand_ins: bool) -> dict[str, str]:
        """Path of a part -> name of its class, for the parts that layers at these paths are in."""
        found: dict[str, str] = {}
        for path in paths:
            for rule in self.rules:
                part = rule.pattern.match(path)
                if part is not None:
                    found[part[1]] = rule.stand_in if stand_ins else rule.name
        return found


def _names(root: str, *rules: tuple[str, str] | tuple[str, str, str]) -> ClassNames:
    return ClassNames(root, tuple(ClassRule(re.compile(rule[0]), rule[1], rule[-1]) for rule in rules))


TRANSFORMER_BLOCK = (
    (r"(.+\.transformer_blocks\.\d+)\.", "BasicTransformerBlock"),
    (r"(.+\.attn[12])\.", "CrossAttention"),
    (r"(.+\.ff)\.", "FeedForward"),
    (r"(.+\.ff\.net\.0)\.", "GEGLU"),
)
XL_BLOCK = r"((?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+)"
BLOCK = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
CLIP = _names(
    "CLIPTextModel",
    (r"(.+\.layers\.\d+)\.", "CLIPEncoderLayer"),
    (r"(.+\.self_attn)\.", "CLIPAttention"),
    (r"(.+\.mlp)\.", "CLIPMLP"),
)
FLUX = _names(
    "Flux",
    (r"(double_blocks\.\d+)\.", "DoubleStreamBlock"),
    (r"(double_blocks\.\d+\.(?:img|txt)_attn)\.", "SelfAttention"),
    (r"(double_blocks\.\d+\.(?:img|txt)_mod)\.", "Modulation"),
    (r"(single_blocks\.\d+)\.", "SingleStreamBlock"),
    (r"(single_blocks\.\d+\.modulation)\.", "Modulation"),
    (r"((?:time|vector|guidance)_in)\.", "MLPEmbedder"),
    (r"(distilled_guidance_layer)\.", "Approximator"),
    (r"(distilled_guidance_layer\.layers\.\d+)\.", "MLPEmbedder"),
    (r"(final_layer)\.", "LastLayer"),
)

# our class of a denoiser or text encoder -> its names there. SDXL's U-Net has our class of Stable Diffusion 1.x
SDXL_UNET = _names(
    "SdxlUNet2DConditionModel",
    (rf"{XL_BLOCK}\.(?:norm|proj_in|transformer_blocks|proj_out)\b", "Transformer2DModel"),
    (rf"{XL_BLOCK}\.(?:in_layers|emb_layers|out_layers|skip_connection)\b", "ResnetBlock2D"),
    (rf"{XL_BLOCK}\.op\b", "Downsample2D"),
    (rf"{XL_BLOCK}\.conv\b", "Upsample2D"),
    *TRANSFORMER_BLOCK,
)
CLASS_NAMES: dict[str, ClassNames] = {
    "UNet2DConditionModel": _names(
        "UNet2DConditionModel",
        (rf"({BLOCK}\.attentions\.\d+)\.", "Transformer2DModel"),
        (rf"({BLOCK}\.resnets\.\d+)\.", "ResnetBlock2D"),
        (rf"({BLOCK}\.downsamplers\.\d+)\.", "Downsample2D"),
        (rf"({BLOCK}\.upsamplers\.\d+)\.", "Upsample2D"),
        *TRANSFORMER_BLOCK,
    ),
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": FLUX,
    "SD3Transformer2DModel": _names(
        "MMDiT",
        (r"(joint_blocks\.\d+)\.", "MMDiTBlock"),
        (r"(joint_blocks\.\d+\.(?:x|context)_block)\.", "SingleDiTBlock"),
        (r"(joint_blocks\.\d+\.\w+\.attn2?)\.", "AttentionLinears", "SelfAttention"),
        (r"(joint_blocks\.\d+\.\w+\.mlp)\.", "MLP"),
        (r"(x_embedder)\.", "PatchEmbed"),
        (r"(t_embedder)\.", "TimestepEmbedding"),
        (r"(y_embedder)\.", "Embedder"),
        (r"(final_layer)\.", "UnPatch"),
    ),
    "Lumina2Transformer2DModel": _names(
        "NextDiT",
        (r"((?:layers|context_refiner|noise_refiner)\.\d+)\.", "JointTransformerBlock", "SingleDiTBlock"),
        (r"(\w+\.\d+\.attention)\.", "JointAttention", "SelfAttention"),
        (r"(\w+\.\d+\.feed_forward)\.", "FeedForward"),
        (r"(t_embedder)\.", "TimestepEmbedder"),
        (r"(final_layer)\.", "FinalLayer"),
    ),
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
    "T5EncoderModel": _names(
        "T5EncoderModel",
        (r"(encoder\.block\.\d+)\.", "T5Block", "MT5Block"),
        (r"(encoder\.block\.\d+\.layer\.0)\.", "T5LayerSelfAttention", "MT5LayerSelfAttention"),
        (r"(encoder\.block\.\d+\.layer\.0\.SelfAttention)\.", "T5Attention"),
        (r"(encoder\.block\.\d+\.layer\.1)\.", "T5LayerFF"),
    ),
    "Gemma2Model": _names(
        "Gemma2Model",
        (r"(layers\.\d+)\.", "Gemma2DecoderLayer"),
        (r"(layers\.\d+\.self_attn)\.", "Gemma2Attention", "CLIPAttention"),
        (r"(layers\.\d+\.mlp)\.", "Gemma2MLP", "CLIPMLP"),
    ),
}
