# SPDX-License-Identifier: Apache-2.0
"""The caches of a run: what they are keyed by, and filling them with the family's encoders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.data.dataset import TrainingData
from library.data.latent_cache import LatentCache, LatentFolders
from library.data.text_cache import TextCache, text_store
from library.models.family import ModelFamily
from library.trainers.options import TrainerOptions
from library.types import Cond


@dataclass(frozen=True)
class Share:
    """Which part of the work one process does."""

    rank: int = 0
    world: int = 1


class Caches:
    """Latents and text outputs of one run; None where the options ask for no cache."""

    def __init__(self, family: ModelFamily, options: TrainerOptions, data: TrainingData, dtype: torch.dtype) -> None:
        cache = options.cache
        self.family, self.options, self.data = family, cache, data
        prints = family.fingerprints() if cache.latents or cache.texts else {}
        self.latents: LatentCache | None = None
        self.texts: TextCache | None = None
        if cache.latents:
            self.latents = LatentCache(
                LatentFolders(cache.cache_dir, disk=cache.cache_latents_to_disk),
                family.latent,
                vae_fingerprint=prints["vae"],
                dtype=dtype,
                masked_loss=options.data.masked_loss,
                scale_legacy=family.scale_legacy,
                skip_check=cache.skip_cache_check,
            )
        if cache.texts:
            folder = self._text_folder(options) if cache.cache_text_encoder_outputs_to_disk else None
            self.texts = TextCache(
                text_store(folder),
                fingerprint=prints["text"],
                settings="",
                dtype=dtype,
                skip_check=cache.skip_cache_check,
            )

    def _text_folder(self, options: TrainerOptions) -> str:
        """--cache_dir, or beside the first dataset's pictures: captions are shared between datasets."""
        sample = self.data.encoding_jobs()[0].sample
        beside = os.path.join(sample.subset.image_dir or os.path.dirname(sample.path), ".trainyard")
        return options.cache.cache_dir or beside

    def latents_missing(self) -> bool:
        """True when the VAE has pictures to encode."""
        return self.latents is not None and bool(self.latents.missing(self.data.encoding_jobs()))

    def texts_missing(self) -> bool:
        """True when the text encoders have captions to encode."""
        return self.texts is not None and bool(self.texts.missing(self.data.all_captions()))

    @torch.no_grad()
    def fill_latents(self, vae: nn.Module, share: Share) -> None:
        """Encode the pictures that are missing."""
        assert self.latents is not None
        device = next(vae.parameters()).device

        def encode(pixels: Tensor, seeds: list[int]) -> Tensor:
            with torch.no_grad():
                return self.family.encode_image(vae, pixels.to(device), seeds)

        self.latents.fill(
            self.data.encoding_jobs(),
            encode,
            batch_size=self.options.vae_batch_size,
            workers=max(1, (os.cpu_count() or 1) // 2),
            rank=share.rank,
            world=share.world,
        )

    @torch.no_grad()
    def fill_texts(self, encoders: Sequence[nn.Module], share: Share) -> None:
        """Encode the captions that are missing."""
        assert self.texts is not None

        def encode(captions: list[str]) -> list[Cond]:
            return self.family.split_cond(self.family.encode_text(self.family.tokenize(captions), encoders))

        self.texts.fill(
            self.data.all_captions(),
            encode,
            batch_size=self.options.text_encoder_batch_size or 16,
            rank=share.rank,
            world=share.world,
        )
