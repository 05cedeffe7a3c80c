# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in Anima, and the --network_args that choose them with patterns for published paths."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.families.anima.names import ADAPTER, anima_names
from library.options import option

CLASSES = ("AnimaDenoiser",)
USUALLY_OUT = re.compile(r".*(_modulation|_norm|_embedder|final_layer).*")
INSIDE_ADAPTER = f"{ADAPTER}.blocks."
CLASS_NAMES = class_names(
    "Anima",
    (r"(blocks\.\d+)\.", "Block"),
    (r"(blocks\.\d+\.(?:self|cross)_attn)\.", "Attention", "SelfAttention"),
    (r"(blocks\.\d+\.mlp)\.", "GPT2FeedForward", "FeedForward"),
    (r"(llm_adapter\.blocks\.\d+)\.", "LLMAdapterTransformerBlock"),
    (r"(x_embedder)\.", "PatchEmbed"),
    (r"(t_embedder\.1)\.", "TimestepEmbedding"),
    (r"(final_layer)\.", "FinalLayer"),
)


def path_patterns(value: Any) -> tuple[re.Pattern[str], ...]:
    """Parse a regular expression or a Python list of them, quoted or not. Raises ValueError that says what is wrong."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        found = value  # one pattern without quotes
    items = found if isinstance(found, (list, tuple)) else [found]
    if any(not isinstance(item, str) for item in items):
        raise ValueError(f"expects a regular expression or a list of them, got {value!r}")
    try:
        return tuple(re.compile(item) for item in items)
    except re.error as error:
        raise ValueError(f"expects a regular expression or a list of them, got {value!r} ({error})") from None


@dataclass(frozen=True)
class AnimaLayerOptions:
    """Which layers get adapters: patterns match the whole published path, such as blocks.0.self_attn.q_proj."""

    train_llm_adapter: bool = option(False, help="Adapters in the blocks of the LLM adapter too.")
    exclude_patterns: tuple[re.Pattern[str], ...] = option(
        (), help="Regular expressions, a Python list: layers without adapters.", parse=path_patterns
    )
    include_patterns: tuple[re.Pattern[str], ...] = option(
        (), help="Regular expressions: layers with adapters although they are left out otherwise.", parse=path_patterns
    )


@dataclass(frozen=True)
class PatternRanks:
    """Rank `dim` for every layer that the patterns select."""

    dim: int
    options: AnimaLayerOptions

    def includes(self, target: TargetSpec) -> bool:
        """Whether the layer has an adapter."""
        path, options = target.path, self.options
        if path.startswith(ADAPTER) and not (options.train_llm_adapter and path.startswith(INSIDE_ADAPTER)):
            return False
        left_out = _matches((USUALLY_OUT, *options.exclude_patterns), path)
        return not left_out or _matches(options.include_patterns, path)

    def rank(self, target: TargetSpec) -> int:
        """The rank, the same for all layers."""
        return self.dim


def _matches(patterns: Sequence[re.Pattern[str]], path: str) -> bool:
    return any(pattern.fullmatch(path) for pattern in patterns)


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    names = anima_names(count(model, "transformer.transformer_blocks"), count(model, "text_conditioner.blocks"))
    return table_targets(names, model)


def layer_rules(options: AnimaLayerOptions, dim: int, targets: list[TargetSpec]) -> PatternRanks:
    return PatternRanks(dim, options)


TARGETS = TableTargets(
    CLASSES, CLASS_NAMES, AnimaLayerOptions, denoiser_targets, layer_rules, whole_paths=True, fused=False
)
