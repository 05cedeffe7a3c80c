# SPDX-License-Identifier: Apache-2.0
"""What an architecture must be able to do. One subclass per architecture; class attributes are its data sheet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.models.options import ModelOptions
from library.objectives.base import Objective
from library.objectives.options import LossOptions
from library.types import Batch, Cond, LatentSpec, Tokens


@dataclass(frozen=True)
class ModelFacts:
    """What the metadata of a save say of the base model."""

    base_model_version: str  # ss_base_model_version: "sd_v1"
    architecture: str  # modelspec.architecture without "/lora": "stable-diffusion-v1"
    implementation: str  # modelspec.implementation
    prediction_type: str | None  # modelspec.prediction_type: "epsilon", "v"


class ModelFamily(ABC):
    """Loads, encodes, predicts and names the weights of one architecture. Holds options and headers, no modules."""

    name: ClassVar[str]
    Options: ClassVar[type[ModelOptions]]
    latent: ClassVar[LatentSpec]
    network_module: ClassVar[str]  # default of --network_module
    bucket_step: ClassVar[int]  # picture sides are multiples of it

    def __init__(self, options: Any) -> None:
        self.options = options

    # ---- loading

    @abstractmethod
    def check(self) -> None:
        """Find the files and read their headers. Raises UserError for whatever a header can tell."""

    @abstractmethod
    def load_text_encoders(
        self, dtype: torch.dtype | None, device: torch.device | str, *, keep_half: bool = False
    ) -> list[nn.Module]:
        """Frozen, in evaluation mode. dtype None: as the file has it. keep_half: as in `loading.Part.load`."""

    @abstractmethod
    def load_vae(self, dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        """Frozen, in evaluation mode. dtype None: as the file has it."""

    @abstractmethod
    def load_denoiser(
        self, dtype: torch.dtype | None, device: torch.device | str, *, keep_half: bool = False
    ) -> nn.Module:
        """Frozen, in evaluation mode. dtype None: as the file has it."""

    # ---- text

    @abstractmethod
    def tokenize(self, captions: list[str]) -> Tokens:
        """Token ids, and weights where captions are weighted. Truncated captions are named in the result."""

    @property
    @abstractmethod
    def token_limit(self) -> int:
        """Most tokens of a caption; longer ones are cut. Start, end and padding do not count."""

    @abstractmethod
    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Number of tokens of each caption, uncut, counted as `token_limit` counts."""

    @abstractmethod
    def encode_text(self, tokens: Tokens, encoders: Sequence[nn.Module]) -> Cond:
        """What `predict` reads, for the whole batch (every tensor B first). Gradient flows where an encoder learns."""

    def split_cond(self, cond: Cond) -> list[Cond]:
        """One Cond per caption, without the batch axis: what the cache holds."""
        count = len(next(iter(cond.values())))
        return [{name: tensor[i] for name, tensor in cond.items()} for i in range(count)]

    def join_conds(self, conds: list[Cond]) -> Cond:
        """The inverse: a batch, tensors of different length padded with zeros at the end."""
        return {name: nn.utils.rnn.pad_sequence([cond[name] for cond in conds], batch_first=True) for name in conds[0]}

    # ---- pictures

    @abstractmethod
    def encode_image(self, vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
        """Pixels B 3 H W in [-1, 1] -> scaled latents B C h w float32; posterior noise from each sample's own seed."""

    @abstractmethod
    def decode_latent(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Scaled latents B C h w -> pixels B 3 H W float32 in [-1, 1]."""

    @abstractmethod
    def scale_legacy(self, latents: Tensor) -> Tensor:
        """Raw VAE latents, as the cache files of sd-scripts hold them, as the model wants them."""

    # ---- training

    @abstractmethod
    def objective(self, options: Any, loss: LossOptions) -> Objective:
        """What is trained. `options`: the option group of the objective that this family has."""

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        """The denoiser's output B C h w for noised latents x_t at t (B). `batch` is None in previews."""

    @abstractmethod
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The denoiser's blocks in the order in which they run."""

    def enable_checkpointing(self, denoiser: nn.Module, encoders: Sequence[nn.Module]) -> None:
        """Recompute activations in the backward pass. `encoders`: those that learn; they are put into training mode.

        Always the non-reentrant kind: it passes keyword arguments, and gradients flow when no input needs one.
        """
        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=_recompute)  # type: ignore[operator]
        for encoder in encoders:
            encoder.train()  # transformers recomputes in training mode only
            encoder.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    # ---- files

    @abstractmethod
    def save(
        self,
        denoiser: nn.Module,
        encoders: Sequence[nn.Module],
        vae: nn.Module,
        path: Path,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Write one .safetensors file in published names, whole or not at all. dtype None: as the modules have it."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Under "vae" and "text": a hash of all that cached latents or text outputs depend on besides their inputs."""

    @abstractmethod
    def model_names(self) -> dict[str, str]:
        """What was given for "sd_model" and "vae": `library.io.metadata.file_facts` makes names and hashes of it."""

    @abstractmethod
    def facts(self) -> ModelFacts:
        """What the metadata say of the model."""


def _recompute(function: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **kwargs)
