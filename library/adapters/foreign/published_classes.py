# SPDX-License-Identifier: Apache-2.0
"""Names of the classes that parts of published models have in kohya-ss/sd-scripts: third-party networks look for them.

For each denoiser or text encoder, a rule is a regular expression on the path of a layer, whose first group is the path
of the part, the class of the part, and a second class that stands in where a network knows none of the first ones.
Those of denoisers are in library/families/<name>/targets.py.
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


def class_names(root: str, *rules: tuple[str, str] | tuple[str, str, str]) -> ClassNames:
    return ClassNames(root, tuple(ClassRule(re.compile(rule[0]), rule[1], rule[-1]) for rule in rules))


CLIP = class_names(
    "CLIPTextModel",
    (r"(.+\.layers\.\d+)\.", "CLIPEncoderLayer"),
    (r"(.+\.self_attn)\.", "CLIPAttention"),
    (r"(.+\.mlp)\.", "CLIPMLP"),
)
# Class of a text encoder -> its names in sd-scripts
ENCODER_CLASSES: dict[str, ClassNames] = {
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
    "T5EncoderModel": class_names(
        "T5EncoderModel",
        (r"(encoder\.block\.\d+)\.", "T5Block", "MT5Block"),
        (r"(encoder\.block\.\d+\.layer\.0)\.", "T5LayerSelfAttention", "MT5LayerSelfAttention"),
        (r"(encoder\.block\.\d+\.layer\.0\.SelfAttention)\.", "T5Attention"),
        (r"(encoder\.block\.\d+\.layer\.1)\.", "T5LayerFF"),
    ),
    "Gemma2Model": class_names(
        "Gemma2Model",
        (r"(layers\.\d+)\.", "Gemma2DecoderLayer"),
        (r"(layers\.\d+\.self_attn)\.", "Gemma2Attention", "CLIPAttention"),
        (r"(layers\.\d+\.mlp)\.", "Gemma2MLP", "CLIPMLP"),
    ),
    "Qwen3Model": class_names(
        "Qwen3Model",
        (r"(layers\.\d+)\.", "Qwen3DecoderLayer"),
        (r"(layers\.\d+\.self_attn)\.", "Qwen3Attention", "CLIPAttention"),
        (r"(layers\.\d+\.mlp)\.", "Qwen3MLP", "CLIPMLP"),
    ),
}
