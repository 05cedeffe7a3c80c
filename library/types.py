# SPDX-License-Identifier: Apache-2.0
"""Small objects that the packages exchange. Shapes: B batch, C channels, H W pixels, h w latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Size = tuple[int, int]  # (width, height) in pixels

# Outputs of text encoders for one caption or a batch of captions: what is cached, and what `predict` reads.
Cond = dict[str, "Tensor"]


@dataclass(frozen=True)
class LatentSpec:
    """Form of a family's latents: all that library.data needs to know of a model."""

    name: str  # cache key and file suffix, e.g. "sd"
    channels: int  # C of a latent
    factor: int  # pixels per latent pixel along one side
    npz_suffix: str  # suffix of sd-scripts' cache file of a picture, e.g. "_sd.npz"
    npz_sized_keys: bool = False  # array names carry "_<h>x<w>" (all but SD and SDXL)


@dataclass(frozen=True)
class ReferenceSpec:
    """How a family takes reference pictures: those that a prompt edits, or takes subjects and styles from."""

    most: int  # of a sample
    # ((width, height) of the file, that of the training picture) -> (width, height) at which it is encoded
    size: Callable[[Size, Size], Size]
    seen_by: frozenset[str] = frozenset()  # text encoders that look at the pictures, too
    roles: tuple[str, ...] = ()  # of each picture, in their order, where all of them are needed: ("picture", "mask")
    scale: float | None = None  # default scale of guidance by the picture, apart from the text; None: there is none


@dataclass(frozen=True)
class Tokens:
    """Token ids of a batch of captions: encoder name -> (B, chunks, 77) int64 for CLIP, (B, length) for others.

    `weights` alike, float. `lengths`: encoder name -> number of tokens of each caption before its padding, with start
    and end tokens. They stay on the host: the shapes of a pass depend on them, and nobody waits for the device then.
    """

    ids: dict[str, Tensor]
    lengths: dict[str, tuple[int, ...]]
    weights: dict[str, Tensor] | None = None
    truncated: tuple[int, ...] = ()  # indices of captions that were longer than the limit
    pictures: dict[str, Tensor] = field(default_factory=dict)  # what encoders that look at pictures read of them

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens with every tensor on `device`, copied without waiting."""
        from library.device import on_device

        move = lambda tensors: {name: on_device(tensor, device) for name, tensor in tensors.items()}
        weights = None if self.weights is None else move(self.weights)
        return replace(self, ids=move(self.ids), weights=weights, pictures=move(self.pictures))

    def mask(self, name: str, length: int, device: torch.device | str, *, more: int = 0) -> Tensor:
        """(B, length) bool on `device`: True at the tokens of a caption and `more` tokens of its padding."""
        import torch

        from library.device import on_device

        ends = on_device(torch.tensor(self.lengths[name]).unsqueeze(1) + more, device)
        return torch.arange(length, device=device) < ends


@dataclass
class Batch:
    """One micro-batch. All its samples have the same pixel size and come from one dataset."""

    names: list[str]  # file of each sample, for messages
    captions: list[str]  # final text, after shuffle, dropout, wildcards
    loss_weights: Tensor  # B float32: 1, or prior_loss_weight for regularisation images
    pixels: Tensor | None = None  # B 3 H W float32 in [-1, 1]; None when latents are cached
    latents: Tensor | None = None  # B C h w, scaled as the model wants them
    latent_seeds: list[int] = field(default_factory=list)  # seed of the VAE posterior sample, per sample
    # Reference pictures: the first ones of all samples, the second ones ... Those of a batch agree in number and sizes.
    references: tuple[Tensor, ...] = ()  # B C h w each, scaled as the model wants them; what `predict` reads
    reference_pixels: tuple[Tensor, ...] = ()  # B 3 H W each, in [-1, 1]; empty when nothing has to encode them
    cond: Cond | None = None  # cached text-encoder outputs, padded to one length
    masks: Tensor | None = None  # B 1 H' W' float32 in [0, 1], where the loss counts (pixel or latent resolution)
    original_sizes: Tensor | None = None  # B 2 float32 (height, width) of the file
    crop_top_lefts: Tensor | None = None  # B 2 float32 (top, left)
    target_sizes: Tensor | None = None  # B 2 float32 (height, width) of the bucket
    control: Tensor | None = None  # B 3 H W float32 in [-1, 1], the control image
    network_multiplier: float = 1.0
    keep_prior: list[bool] = field(default_factory=list)  # custom_attributes.diff_output_preservation
    seed: int | None = None  # of what a family draws in training, the same for every pass; None: nothing is drawn
    position: int = 0  # of the micro-batch in the run, over all processes: what its draws are keyed by
    share: float = 1.0  # of the loss of its step; the shares of a step, over all processes, add up to 1

    @property
    def size(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`, copied without waiting."""
        from library.device import on_device

        return self._mapped(lambda tensor: on_device(tensor, device))

    def part(self, rows: slice) -> Batch:
        """The batch of some of its samples; `cond` keeps the padding of the whole batch."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: _rows(value, rows) for name, value in own.items()})

    def pin_memory(self) -> Batch:
        """The same batch with every tensor in page-locked memory; torch's DataLoader calls this.

        Where the system refuses it, a tensor stays as it is, and its copy to the device waits.
        """

        def pin(tensor: Tensor) -> Tensor:
            try:
                return tensor.pin_memory()
            except RuntimeError:
                return tensor

        return self._mapped(pin)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to every tensor."""
        import torch

        def mapped(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return change(value)
            if isinstance(value, dict):
                return {name: mapped(entry) for name, entry in value.items()}
            return tuple(map(mapped, value)) if isinstance(value, tuple) else value

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Noised:
    """Clean latents with noise, and the target. `t` is what `predict` takes; `weight` multiplies the sample's loss."""

    x_t: Tensor  # B C h w
    t: Tensor  # B (DDPM: int64 0..999; flow: float32 sigma in 0..1)
    noise: Tensor  # B C h w
    target: Tensor  # B C h w
    weight: Tensor  # B float32

    def part(self, rows: slice) -> Noised:
        """The same for some of its samples."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Position:
    """How far a run is. `step` counts optimizer steps; `batch` is the next micro-batch of `epoch` (0-based)."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def like(values: Tensor, x: Tensor) -> Tensor:
    """`values` (B) with as many axes as `x` (B ...), so that they broadcast over each sample: (B 1 1 1) for B C h w."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def _rows(value: Any, rows: slice) -> Any:
    """`value[rows]` of a field with one entry per sample; numbers and None unchanged."""
    if isinstance(value, dict):
        return {key: entry[rows] for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(entry[rows] for entry in value)
    return value if value is None or isinstance(value, (int, float)) else value[rows]


# pixels (B 3 H W, [-1, 1]) and one seed per sample -> scaled latents (B C h w)
EncodeImages = Callable[["Tensor", "list[int]"], "Tensor"]
