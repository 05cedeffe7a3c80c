# SPDX-License-Identifier: Apache-2.0
"""Targets of adapters in Lumina-Image 2.0, and the --network_args that choose them and their ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from library.adapters.foreign.published_classes import class_names
from library.adapters.options import rank_list
from library.adapters.table_targets import TableTargets, count, table_targets
from library.adapters.target_spec import TargetSpec
from library.adapters.type_ranks import TypeRanks, short_name
from library.families.lumina.adapter_names import CONTEXT, FINAL, LAYERS, NOISE
from library.families.lumina.names import lumina_names
from library.options import at_least, option

CLASSES = ("Lumina2Transformer2DModel",)
KINDS = {
    "all": (CONTEXT, NOISE, LAYERS, FINAL),
    "transformer": (LAYERS,),
    "refiners": (CONTEXT, NOISE),
    "noise_refiner": (NOISE,),
    "context_refiner": (CONTEXT,),
}
EMBEDDERS = ("x_embedder", "t_embedder", "cap_embedder")
# as files have it: the MLP of a block is feed_forward there, so "mlp" is the timestep embedder only
TYPES = {"attn_dim": ("attention",), "mlp_dim": ("mlp",), "mod_dim": ("modulation",), "refiner_dim": ("refiner",)}
CLASS_NAMES = class_names(
    "NextDiT",
    (r"((?:layers|context_refiner|noise_refiner)\.\d+)\.", "JointTransformerBlock", "SingleDiTBlock"),
    (r"(\w+\.\d+\.attention)\.", "JointAttention", "SelfAttention"),
    (r"(\w+\.\d+\.feed_forward)\.", "FeedForward"),
    (r"(t_embedder)\.", "TimestepEmbedder"),
    (r"(final_layer)\.", "FinalLayer"),
)


@dataclass(frozen=True)
class LuminaRankOptions:
    """Ranks by the type of a layer, and which blocks learn. Rank 0: no adapter; the first that fits counts."""

    attn_dim: int | None = option(None, help="Rank of attention.", check=at_least(0))
    mlp_dim: int | None = option(
        None,
        help="Rank of layers with mlp in their name: the timestep embedder (blocks have feed_forward).",
        check=at_least(0),
    )
    mod_dim: int | None = option(None, help="Rank of modulation.", check=at_least(0))
    refiner_dim: int | None = option(None, help="Rank of the other layers in the refiner blocks.", check=at_least(0))
    embedder_dims: tuple[int, ...] | None = option(
        None, help="Ranks of x_embedder, t_embedder, cap_embedder, with commas.",
        parse=rank_list(len(EMBEDDERS)), check=at_least(0),
    )  # fmt: skip
    train_blocks: str | None = option(None, help="The kind of blocks that gets adapters.", choices=tuple(KINDS))


def denoiser_targets(model: nn.Module) -> list[TargetSpec]:
    """Every layer that an adapter file may name."""
    targets = table_targets(lumina_names(count(model, "layers"), count(model, "noise_refiner")), model)
    return sorted(targets, key=lambda target: short_name(target).startswith(EMBEDDERS))  # in files these come last


def rank_rules(options: LuminaRankOptions, dim: int, targets: list[TargetSpec]) -> TypeRanks:
    """The ranks that the options ask for."""
    return TypeRanks(
        dim,
        KINDS[options.train_blocks or "all"],
        types=tuple((words, getattr(options, name)) for name, words in TYPES.items()),
        outside=dict(zip(EMBEDDERS, options.embedder_dims or ())),
    )


TARGETS = TableTargets(CLASSES, CLASS_NAMES, LuminaRankOptions, denoiser_targets, rank_rules)
