# SPDX-License-Identifier: Apache-2.0
"""Targets: which layers of an architecture get adapters, under which names, in which order and of which rank.

Every model family has `FamilyTargets` for the kinds of adapters that are made for all architectures
(library/families/<name>/targets.py), and `Targets` of its own for others, such as OFT. Names are fixed by the files
that people share: `lora_unet_` or `lora_te_` and the published path of the module with `_` for `.`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from library.adapters.options import SIZES_BY_BLOCK, BlockOptions
from library.adapters.target_spec import Component, TargetModule, TargetSpec
from library.errors import UserError

if TYPE_CHECKING:
    from library.adapters.foreign.published_classes import ClassNames

TextEncoders = nn.Module | Sequence[nn.Module | None] | None  # None in its place: gets no adapters
RankRule = Callable[[TargetSpec], tuple[int, float]]  # rank (0: no adapter) and alpha

DENOISER_PREFIX = "lora_unet"
ENCODER_PREFIX = "lora_te"

UNKNOWN = "a {what} of the kind {kind} has no layers that adapters are known for"
CLIP_BLOCKS = frozenset({"CLIPAttention", "CLIPMLP"})
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)

# Classes whose children have another order in files than in the class: these first, then the others
CHILD_ORDER = {
    "BasicTransformerBlock": ("attn1", "ff", "attn2"),
    "CLIPAttention": ("k_proj", "v_proj", "q_proj", "out_proj"),
}


@dataclass(frozen=True, eq=False)
class AdaptedModels:
    """The models of a run that adapters are put on."""

    text_encoder: TextEncoders
    denoiser: nn.Module | None

    @property
    def encoders(self) -> list[nn.Module | None]:
        """The text encoders in the order of the learning rates, None where one gets no adapters."""
        if self.text_encoder is None:
            return []
        return [self.text_encoder] if isinstance(self.text_encoder, nn.Module) else [*self.text_encoder]

    @property
    def denoiser_class(self) -> str:
        """Name of the denoiser's class; "NoneType" without a denoiser."""
        return type(self.denoiser).__name__


@dataclass(frozen=True)
class Selection:
    """The targets of a new network, in the order of its file.

    block_weights: learning-rate factors of the denoiser's blocks; None: the same rate for all.
    """

    targets: Sequence[TargetSpec]
    rank_alpha: RankRule
    block_weights: tuple[float, ...] | None = None


class Targets(ABC):
    """The targets that one kind of adapters, or several, have in some architectures."""

    classes: tuple[str, ...]  # of the denoisers
    fused: bool = False  # published layers may be several modules
    prefix: str = DENOISER_PREFIX  # of the names of the denoiser's layers in files

    @property
    @abstractmethod
    def options(self) -> Mapping[str, type]:
        """Groups of --network_args that choose targets and ranks."""

    @property
    @abstractmethod
    def decided_by_file(self) -> tuple[str, ...]:
        """Names of those options that an adapter file decides itself."""

    def require_models(self, models: AdaptedModels, network_module: str) -> None:
        """Raise UserError when the denoiser is not of these architectures."""
        if models.denoiser is not None and models.denoiser_class not in self.classes:
            raise UserError(
                f"--network_module {network_module} is for {' and '.join(self.classes)}; "
                f"this model is a {models.denoiser_class}"
            )

    @abstractmethod
    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        """The targets of a new network, as the options ask for. Raises UserError."""

    @abstractmethod
    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        """Every layer that an adapter file may name. Raises UserError for unknown models."""

    def block_weights(self, options: Mapping[str, Any], models: AdaptedModels) -> tuple[float, ...] | None:
        """Learning-rate factors by block for a network from a file; None: the same rate for all."""
        return None

    def new_inputs(self, models: AdaptedModels) -> list[TargetSpec]:
        """Convolutions with input channels that the model's file does not have: every network trains those whole."""
        return []


class FamilyTargets(Targets):
    """The targets of an architecture for every kind of adapters that adds to the weights."""

    class_names: ClassNames  # what sd-scripts calls the parts of the published denoiser

    @abstractmethod
    def fits(self, models: AdaptedModels) -> bool:
        """Whether the models are of this architecture."""

    @abstractmethod
    def select_by_blocks(
        self, blocks: BlockOptions, dim: int, alpha: float, models: AdaptedModels, *, t5: bool
    ) -> Selection:
        """`select` for kinds of adapters without options for this architecture. t5: T5 gets adapters too."""

    @abstractmethod
    def every(self, models: AdaptedModels, *, outside: bool) -> list[TargetSpec]:
        """Every layer that an adapter can be on.

        outside: also the layers of text encoders that are outside of their blocks, where files may name them.
        """


@dataclass(frozen=True)
class AnyFamily(Targets):
    """The targets of several families: the denoiser decides which ones."""

    families: tuple[FamilyTargets, ...]
    otherwise: FamilyTargets  # for models that none of the families fits
    groups: Mapping[str, type]  # `options`

    @property
    def options(self) -> Mapping[str, type]:
        return self.groups

    @property
    def decided_by_file(self) -> tuple[str, ...]:
        return SIZES_BY_BLOCK

    def require_models(self, models: AdaptedModels, network_module: str) -> None:
        """Any models will do: what has no targets is refused when they are looked for."""

    def of(self, models: AdaptedModels) -> FamilyTargets:
        """The targets of the family that the models are of."""
        return next((family for family in self.families if family.fits(models)), self.otherwise)

    def knows(self, denoiser: nn.Module) -> bool:
        """Whether the denoiser's class is that of one of the families."""
        return any(type(denoiser).__name__ in family.classes for family in (*self.families, self.otherwise))

    def select(self, options: Mapping[str, Any], dim: int, alpha: float, models: AdaptedModels) -> Selection:
        t5 = "t5" in options and options["t5"].train_t5xxl
        return self.of(models).select_by_blocks(options["blocks"], dim, alpha, models, t5=t5)

    def in_file(self, options: Mapping[str, Any], models: AdaptedModels) -> list[TargetSpec]:
        return self.of(models).every(models, outside=True)

    def block_weights(self, options: Mapping[str, Any], models: AdaptedModels) -> tuple[float, ...] | None:
        return self.of(models).block_weights(options, models)

    def new_inputs(self, models: AdaptedModels) -> list[TargetSpec]:
        return self.of(models).new_inputs(models)


# ---- walking through models ---------------------------------------------------------------------------------------


def published_encoder_path(path: str) -> str:
    """A CLIP module path with the level `text_model`, which transformers 5 dropped and published names keep.

    The projection is outside of that level.
    """
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def encoder_targets(
    encoder: nn.Module,
    prefix: str,
    blocks: frozenset[str] | None,
    index: int,
    *,
    clip: bool = False,
    kinds: tuple[type[nn.Module], ...] = LAYERS,
) -> list[TargetSpec]:
    """Targets in a text encoder: the layers inside `blocks` (None: anywhere). clip: with the level `text_model`.

    Raises UserError when it has none: adapters do not know its architecture.
    """
    found = [
        module_target(prefix, published_encoder_path(path) if clip else path, module, "text_encoder", encoder=index)
        for path, module in walk(encoder, "", blocks, kinds)
    ]
    if not found:
        raise UserError(UNKNOWN.format(what="text encoder", kind=type(encoder).__name__))
    return found


def module_target(
    prefix: str, path: str, module: nn.Module, part: Component, *, block: int | None = None, encoder: int = 0
) -> TargetSpec:
    """A target of one whole module, named by its published path."""
    name = f"{prefix}_{path.replace('.', '_')}"
    return TargetSpec(name, (TargetModule(path, module),), part, block=block, encoder=encoder, path=path)


def walk(
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
            yield from walk(child, child_path, inside, kinds)
