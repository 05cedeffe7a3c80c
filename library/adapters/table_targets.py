# SPDX-License-Identifier: Apache-2.0
"""Targets of the architectures whose published layers are not the modules of diffusers: made from their name tables.

A published layer that is several Linear modules of ours is one target: its adapter has one down matrix, and up rows in
the published order. Where the two halves of a layer stand in another order, the target is two pieces of one module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from torch import nn

from library.adapters.block_ranks import plan_ranks
from library.adapters.foreign.published_classes import ClassNames
from library.adapters.options import BlockOptions, NoConvOptions, SplitOptions, T5Options
from library.adapters.target_spec import TargetModule, TargetSpec
from library.adapters.targets import (
    CLIP_BLOCKS,
    DENOISER_PREFIX,
    ENCODER_PREFIX,
    LAYERS,
    AdaptedModels,
    FamilyTargets,
    Selection,
    encoder_targets,
)
from library.key_tables import SWAP_HALVES, ModuleName
from library.log import get_logger

IDLE = ("conv_dim", "conv_alpha", "train_norm")  # options of blocks that these models have nothing for


class Ranks(Protocol):
    """Which layers get adapters, and their ranks: `TypeRanks`, or what a family has of its own."""

    def includes(self, target: TargetSpec) -> bool:
        """Whether the layer may have an adapter."""

    def rank(self, target: TargetSpec) -> int:
        """The rank of a layer that `includes`; 0: none."""


@dataclass(frozen=True)
class TableTargets(FamilyTargets):
    """The targets of an architecture with a name table, and its rules for ranks by the type of a layer.

    denoiser_targets: every layer of a denoiser that a file may name, in the order of files. ranks: (options,
    --network_dim, all targets) -> the ranks. whole_paths: as in TargetSpec. fused: as in Targets.
    """

    classes: tuple[str, ...]
    class_names: ClassNames
    rank_options: type
    denoiser_targets: Callable[[nn.Module], list[TargetSpec]]
    ranks: Callable[[Any, int, list[TargetSpec]], Ranks]
    has_t5: bool = False
    fused: bool = True
    whole_paths: bool = False

    @property
    def options(self) -> Mapping[str, type]:
        own: dict[str, type] = {"blocks": self.rank_options, "conv": NoConvOptions}
        return own | ({"split": SplitOptions} if self.fused else {}) | ({"t5": T5Options} if self.has_t5 else {})

    @property
    def decided_by_file(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self.rank_options))

    def fits(self, models: AdaptedModels) -> bool:
        return models.denoiser_class in self.classes

    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        options["conv"].warn()
        asked = "t5" in options and options["t5"].train_t5xxl
        targets = self._targets(models, split=self._splits(options), t5=asked)
        return self._selection(options["blocks"], dim, alpha, targets)

    def select_by_blocks(
        self, blocks: BlockOptions, dim: int, alpha: float, models: AdaptedModels, *, t5: bool
    ) -> Selection:
        """The layers that LoRA adapts by default, all of one rank. Raises UserError for ranks and rates by block."""
        plan_ranks(blocks, None, dim=dim, alpha=alpha)
        idle = [name for name in IDLE if getattr(blocks, name)]
        if idle:
            names = ", ".join(idle)
            get_logger().warning("--network_args: %s: no effect, this model has no such layers", names)
        return self._selection(self.rank_options(), dim, alpha, self._targets(models, t5=t5))

    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        options["conv"].warn()
        return self._targets(models, split=self._splits(options), outside=True)

    def every(self, models: AdaptedModels, *, outside: bool) -> list[TargetSpec]:
        return self._targets(models, outside=outside)

    def _splits(self, options: Mapping[str, Any]) -> bool:
        return self.fused and options["split"].split_qkv

    def _targets(
        self, models: AdaptedModels, *, split: bool = False, t5: bool = True, outside: bool = False
    ) -> list[TargetSpec]:
        """Text encoders first. outside: as for `text_targets`."""
        denoiser = [] if models.denoiser is None else self.denoiser_targets(models.denoiser)
        found = split_targets([*text_targets(models.encoders, t5=t5, outside=outside), *denoiser], split)
        return [replace(target, whole_path=True) for target in found] if self.whole_paths else found

    def _selection(self, options: Any, dim: int, alpha: float, targets: list[TargetSpec]) -> Selection:
        ranks = self.ranks(options, dim, targets)
        chosen = [target for target in targets if ranks.includes(target)]
        return Selection(chosen, lambda target: (ranks.rank(target), alpha))


T5_BLOCKS = frozenset({"T5LayerSelfAttention", "T5LayerFF"})
# Class of a language model -> those of the blocks of its layers
LANGUAGE_BLOCKS = {
    f"{kind}Model": frozenset({f"{kind}Attention", f"{kind}MLP"}) for kind in ("Gemma2", "Qwen3", "Mistral")
}


def count(model: nn.Module | None, path: str) -> int:
    """Length of the module list at `path`; 0 where there is none."""
    found = None if model is None else dict(model.named_modules()).get(path)
    return len(found) if isinstance(found, nn.ModuleList) else 0


def table_targets(names: Iterable[ModuleName], model: nn.Module | None) -> list[TargetSpec]:
    """One target for each published Linear or convolution that the model has, in the order of the table."""
    if model is None:
        return []
    modules = dict(model.named_modules())
    found: list[TargetSpec] = []
    for name in names:
        own = [TargetModule(path, modules[path]) for path in name.ours if isinstance(modules.get(path), LAYERS)]
        if own:
            pieces = _halves_swapped(own[0]) if name.op is SWAP_HALVES else tuple(own)
            own_name = f"{DENOISER_PREFIX}_{name.published.replace('.', '_')}"
            found.append(TargetSpec(own_name, pieces, "denoiser", path=name.published))
    return found


def split_targets(targets: Iterable[TargetSpec], wanted: bool) -> list[TargetSpec]:
    """The targets; if `wanted`, each module of a fused layer gets an adapter of its own."""
    return [replace(t, split=wanted and len({id(m.module) for m in t.modules}) > 1) for t in targets]


def _halves_swapped(module: TargetModule) -> tuple[TargetModule, TargetModule]:
    """Both halves in published order, which is the reverse of ours."""
    half = module.width // 2
    return (
        TargetModule(module.path, module.module, slice(half, 2 * half)),
        TargetModule(module.path, module.module, slice(0, half)),
    )


def text_targets(encoders: Sequence[nn.Module | None], *, t5: bool = True, outside: bool = False) -> list[TargetSpec]:
    """Attention and feed-forward layers of CLIP, T5 and language models; the class of an encoder decides their names.

    encoders: in the order of the learning rates, None where one gets no adapters. t5: include T5. outside: include
    CLIP's layers outside of its blocks: the projection.
    """
    found: list[TargetSpec] = []
    for index, encoder in enumerate(encoders):
        kind = type(encoder).__name__
        if encoder is None or (kind == "T5EncoderModel" and not t5):
            continue
        if kind == "T5EncoderModel":
            found += encoder_targets(encoder, f"{ENCODER_PREFIX}3", T5_BLOCKS, index)
        elif kind in LANGUAGE_BLOCKS:
            found += encoder_targets(encoder, ENCODER_PREFIX, LANGUAGE_BLOCKS[kind], index)
        else:
            number = 2 if index == 1 or _is_clip_g_alone(encoder, encoders) else 1
            found += encoder_targets(
                encoder, f"{ENCODER_PREFIX}{number}", None if outside else CLIP_BLOCKS, index, clip=True
            )
    return found


def _is_clip_g_alone(encoder: nn.Module, encoders: Sequence[nn.Module | None]) -> bool:
    """Whether a CLIP in the first place is the second one of SD3, the first one being left out.

    CLIP-L of OpenAI has its own approximation of GELU; the CLIPs of OpenCLIP have the exact one.
    """
    has_second = len(encoders) > 2 or any(type(other).__name__.startswith("CLIP") for other in encoders[1:])
    return not has_second and getattr(encoder.config, "hidden_act", None) == "gelu"
