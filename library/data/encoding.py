# SPDX-License-Identifier: Apache-2.0
"""What the encoders of a model are given: pictures for the VAE, captions for the text encoders, and where their cached
outputs come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from library.data import images
from library.data.buckets import Bucket, covering
from library.data.records import ImageRules, Sample
from library.rng import derive_seed, python_rng
from library.types import Cond, ReferenceSpec, Size


class LatentJob(NamedTuple):
    """A picture that the VAE encodes at a size."""

    sample: Sample
    bucket: Bucket
    flipped: bool = False
    reference: bool = False  # encoded without a draw, and cached under a key of its own


class Text(NamedTuple):
    """A final caption as text encoders get it, with the reference pictures for those that look at pictures."""

    caption: str
    references: tuple[LatentJob, ...] = ()

    @property
    def order(self) -> tuple[str, list[str]]:
        """Sort key: equal in every process."""
        return self.caption, [f"{job.sample.path} {job.flipped}" for job in self.references]


class LatentSource(Protocol):
    """Cached latents."""

    def get(self, job: LatentJob) -> tuple[Tensor, Tensor | None]:
        """(latents C h w, mask 1 h w float32 in [0, 1] or None)."""


class TextSource(Protocol):
    """Cached text-encoder outputs."""

    def get(self, text: Text) -> Cond:
        """The outputs for one text, unpadded."""


class EncodingInput(NamedTuple):
    """What the VAE gets for a LatentJob."""

    pixels: Tensor  # 3 H W float32 in [-1, 1]
    seed: int  # of the VAE posterior sample
    mask: Tensor | None  # 1 H W float32 in [0, 1]


def encoding_input(job: LatentJob, *, masked_loss: bool) -> EncodingInput:
    """The pixels, seed and mask of a LatentJob: the very ones that training without a cache would use.

    Raises UserError naming the file that cannot be read.
    """
    rules = without_draws(job.sample.subset.images)
    rng = python_rng("encoding")  # nothing is drawn: a subset that draws cannot be cached
    prepared = images.prepare(job.sample, job.bucket, rng, flipped=job.flipped, masked_loss=masked_loss, rules=rules)
    return EncodingInput(pixels_of(prepared.rgb), latent_seed(job.sample, job.flipped), mask_of(prepared.mask))


def latent_seed(sample: Sample, flipped: bool) -> int:
    """The seed of a sample's VAE posterior: from its file name, so that it survives a move of the folder."""
    return derive_seed("vae", os.path.basename(sample.path), int(flipped))


def without_draws(rules: ImageRules) -> ImageRules:
    """The rules without augmentation."""
    return ImageRules(resize_interpolation=rules.resize_interpolation, alpha_mask=rules.alpha_mask)


# ---- reference pictures -------------------------------------------------------------------------------------------


def reference_jobs(
    samples: Sequence[Sample], target: Size, spec: ReferenceSpec | None, *, flipped: bool = False
) -> tuple[LatentJob, ...]:
    """The reference pictures of a training picture of size `target`, each at the size that the family gives it.

    flipped: mirrored, as the training picture is.
    """
    if spec is None:
        return ()
    sizes = [(sample, spec.size(sample.size, target)) for sample in samples]
    return tuple(LatentJob(sample, covering(sample.size, size), flipped, reference=True) for sample, size in sizes)


def reference_pixels(job: LatentJob) -> Tensor:
    """The pixels of a reference picture, 3 H W float32 in [-1, 1]. Raises UserError naming the file."""
    return encoding_input(job, masked_loss=False).pixels


# ---- arrays as tensors --------------------------------------------------------------------------------------------


def pixels_of(rgb: np.ndarray) -> Tensor:
    """H W 3 uint8 as 3 H W float32 in [-1, 1]."""
    return torch.from_numpy(rgb.transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1.0


def mask_of(mask: np.ndarray | None) -> Tensor | None:
    """H W uint8 as 1 H W float32 in [0, 1]."""
    return None if mask is None else torch.from_numpy(mask[None].astype(np.float32)) / 255.0
