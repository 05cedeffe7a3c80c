# SPDX-License-Identifier: Apache-2.0
"""All adapters of a run, behind the one interface that a trainer sees.

network = LayerNetwork([layer])  # an AdapterNetwork of our own layers
network.attach(train_denoiser=True, train_text_encoder=False)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.adapters.formats.adapter_files import write_tensors
from library.adapters.target_spec import ReachedLayer, TargetSpec
from library.device import without_rounding
from library.errors import UserError, first_names
from library.optim.working_copy import FindCopy

if TYPE_CHECKING:
    from library.adapters.readers.trained_layer import TrainedLayer

Rates = float | Sequence[float] | None  # one learning rate, or one per text encoder


@dataclass(frozen=True)
class NormReport:
    """The result of `scale_norms` as 0-dim tensors, since reading them synchronises with the device."""

    scaled: Tensor  # how many layers were scaled down
    mean: Tensor
    maximum: Tensor


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of tensors for a file, in `dtype` (None: as they are). Alphas are never rounded."""
    return {
        key: without_rounding(value, dtype).clone()
        if key.endswith(".alpha")
        else value.to(device="cpu", dtype=dtype, copy=True).contiguous()
        for key, value in tensors.items()
    }


class AdapterNetwork(nn.Module, ABC):
    """All adapters of a run, as a trainer sees them: our own layers or those of a third-party module."""

    @abstractmethod
    def attach(self, *, train_denoiser: bool, train_text_encoder: bool) -> None:
        """Activate the adapters of the chosen models; those of the others are removed from the network and its file."""

    @abstractmethod
    def detach(self) -> None:
        """Undo `attach`."""

    @abstractmethod
    def param_groups(
        self, *, learning_rate: float | None, unet_lr: float | None = None, text_encoder_lr: Rates = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups {"params", "lr", "name"}: text encoders first. Groups with a rate of 0 are left out.

        `unet_lr` and `text_encoder_lr` (one number, or one per encoder) override `learning_rate`.
        """

    @abstractmethod
    def state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors of an adapter file: published key -> contiguous CPU tensor, as `in_dtype` makes them."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of an adapter file. Raises UserError naming keys that are unknown or do not fit."""

    @abstractmethod
    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        """Detach, and add the adapters (times the multiplier) to the models' own weights, in float32 arithmetic."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the models compute exactly as without adapters."""

    @abstractmethod
    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of the adapters; 1 is the trained one."""

    def set_condition(self, control: Tensor | None) -> None:
        """Set the control images, B 3 H W in [-1, 1], of the next passes. Most networks ignore them."""

    @abstractmethod
    def scale_norms(self, max_norm: float) -> NormReport:
        """Scale down every adapter whose change of the weight has a Frobenius norm above `max_norm`."""

    @abstractmethod
    def module_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Published module name -> its trainable parameters."""

    def save(self, path: str | Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write `state(dtype)` as .safetensors, or with torch for .pt and .ckpt (which hold no metadata)."""
        write_tensors(path, self.state(dtype), metadata)

    def exact_tensors(self) -> dict[str, Tensor]:
        """The tensors that an exact resume needs, by name."""
        return dict(self.named_parameters())

    def exact_state(self) -> dict[str, Tensor]:
        """Copies of `exact_tensors`. A published file would not do: it folds some together (`use_scalar`)."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.exact_tensors().items()}

    def load_exact_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `exact_state` returned. Raises UserError when it belongs to another network."""
        own = self.exact_tensors()
        wrong = [
            n for n in sorted({*own, *tensors}) if n not in own or n not in tensors or own[n].shape != tensors[n].shape
        ]
        if wrong:
            raise UserError(f"the state is of another network: {len(wrong)} parameters differ: {first_names(wrong)}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def layers_reached(self) -> dict[int | None, list[ReachedLayer]]:
        """Layers that a third-party module may adapt, by place of the text encoder, or None for the denoiser."""
        return {}

    def targets(self) -> dict[str, TargetSpec]:
        """Published name -> target of the adapter of that name; empty for third-party modules."""
        return {}

    def trained(self) -> list[TrainedLayer]:
        """The layers as functions, for comparing them with what other programs make of the file."""
        return []

    def reads_weights(self, among: Iterable[nn.Module]) -> bool:
        """Whether a forward pass reads the weights of some of these modules. Assumed of third-party networks."""
        return True

    def reads_between_steps(self) -> bool:
        """Whether `step_taken` reads weights of the models."""
        return False

    def is_sparse(self) -> bool:
        """Whether some parameters have no gradient in some steps and must not change in those (DyLoRA)."""
        return False

    def epoch_started(self) -> None:
        """Called at the start of each epoch; some third-party modules need it."""

    def step_taken(self) -> None:
        """Called after each optimizer step, before the gradients are cleared; some adapters read them (GGPO)."""

    def use_copies(self, find: FindCopy) -> None:
        """Compute training passes with the parameters' working copies, as far as the adapters can."""

    def enable_gradient_checkpointing(self) -> None:
        """Called once when the models recompute activations; hooks need nothing for it."""
