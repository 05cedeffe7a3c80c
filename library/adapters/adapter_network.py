# SPDX-License-Identifier: Apache-2.0
"""All adapters of a run, behind the one interface that a trainer sees.

network = LayerNetwork([layer])  # an AdapterNetwork of our own layers
network.attach(train_denoiser=True, train_text_encoder=False)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.adapters.formats.adapter_files import read_tensors, write_tensors
from library.adapters.target_spec import ReachedLayer, TargetSpec
from library.device import without_rounding
from library.errors import UserError, first_names

if TYPE_CHECKING:
    from library.adapters.readers.trained_layer import TrainedLayer

Rates = float | Sequence[float] | None  # one learning rate, or one per text encoder


@dataclass(frozen=True)
class NormReport:
    """What `scale_norms` found and did, as 0-dim tensors: reading them waits for the device, so do it seldom."""

    scaled: Tensor  # how many layers were scaled down
    mean: Tensor
    maximum: Tensor


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies for a file, in `dtype` (None: as they are). An alpha is a number of the formula and is never rounded."""
    return {
        key: without_rounding(value, dtype).clone()
        if key.endswith(".alpha")
        else value.to(device="cpu", dtype=dtype, copy=True).contiguous()
        for key, value in tensors.items()
    }


class AdapterNetwork(nn.Module, ABC):
    """All adapters of a run: what a trainer sees, for our own layers and for third-party modules alike."""

    @abstractmethod
    def attach(self, *, train_denoiser: bool, train_text_encoder: bool) -> None:
        """Put the adapters of the chosen models to work; those of the others leave the network and its file."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the models as they were before `attach`."""

    @abstractmethod
    def param_groups(
        self, *, learning_rate: float | None, unet_lr: float | None = None, text_encoder_lr: Rates = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups {"params", "lr", "name"}: text encoders first. A rate of 0 leaves a group out.

        `unet_lr` and `text_encoder_lr` (one number, or one per encoder) stand above `learning_rate`.
        """

    @abstractmethod
    def state(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The tensors of an adapter file: published key -> contiguous CPU tensor, as `in_dtype` makes them."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over an adapter file's tensors. Raises UserError naming keys that do not belong here or do not fit."""

    @abstractmethod
    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        """Detach, and add the adapters (times the multiplier) to the models' own weights, in float32 arithmetic."""

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Within it the models answer exactly as without adapters."""

    @abstractmethod
    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the adapters from now on; 1 is what is trained."""

    def set_condition(self, control: Tensor | None) -> None:
        """Control images B 3 H W in [-1, 1] that the next passes belong to; most networks look at none."""

    @abstractmethod
    def scale_norms(self, max_norm: float) -> NormReport:
        """Scale every adapter whose change of the weight has a Frobenius norm above `max_norm` down to it."""

    @abstractmethod
    def module_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Published module name -> its trainable parameters."""

    def save(self, path: str | Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write `state(dtype)` as .safetensors, or with torch for .pt and .ckpt (which hold no metadata)."""
        write_tensors(path, self.state(dtype), metadata)

    def load_file(self, path: str | Path) -> None:
        """`load` from a file. Raises UserError that names it."""
        try:
            self.load(read_tensors(path))
        except UserError as error:
            raise UserError([p if str(path) in p else f"{path}: {p}" for p in error.problems]) from None

    def exact_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs to go on exactly, by name."""
        return dict(self.named_parameters())

    def exact_state(self) -> dict[str, Tensor]:
        """Every parameter as it is, for resuming: a published file folds some together (`use_scalar`)."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.exact_tensors().items()}

    def load_exact_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `exact_state` gave. Raises UserError when it is of another network."""
        own = self.exact_tensors()
        wrong = [
            n for n in sorted({*own, *tensors}) if n not in own or n not in tensors or own[n].shape != tensors[n].shape
        ]
        if wrong:
            raise UserError(f"the state is of another network: {len(wrong)} parameters differ: {first_names(wrong)}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameters in self.module_parameters().values() for parameter in parameters)

    def layers_reached(self) -> dict[int | None, list[ReachedLayer]]:
        """Of third-party modules, what they adapt of each text encoder (by its place) and of the denoiser (None)."""
        return {}

    def targets(self) -> dict[str, TargetSpec]:
        """Published name -> what the adapter of that name is put on; empty for third-party modules."""
        return {}

    def trained(self) -> list[TrainedLayer]:
        """Each layer as a function, to be compared with what other programs make of the file."""
        return []

    def reads_weights(self, among: Iterable[nn.Module]) -> bool:
        """Whether a pass looks at the weights of some of these modules themselves. Of third-party ones that is open."""
        return True

    def reads_between_steps(self) -> bool:
        """Whether `step_taken` looks at weights of the models."""
        return False

    def is_sparse(self) -> bool:
        """Whether some parameters have no gradient in some steps, and must stay as they are then (DyLoRA)."""
        return False

    def epoch_started(self) -> None:
        """Called at the start of each epoch; some third-party modules need it."""

    def step_taken(self) -> None:
        """Called after each optimizer step, before the gradients are cleared; some adapters look at them (GGPO)."""

    def enable_gradient_checkpointing(self) -> None:
        """Called once when the models recompute activations: hooks are recomputed with their modules."""
