# SPDX-License-Identifier: Apache-2.0
"""The caches of a run: what they are keyed by, and the encoders that fill them and are freed afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from library.data.caches.latent_cache import LatentCache, LatentFolders
from library.data.caches.text_cache import TextCache, TextCaches, text_store
from library.data.dataset import TrainingData
from library.data.encoding import Text, reference_pixels
from library.device import fits, free_memory, on_device
from library.families.family import ModelFamily
from library.log import get_logger
from library.trainers.options import TrainerOptions
from library.trainers.out_of_memory import encoded
from library.types import Cond

log = get_logger()


@dataclass(frozen=True)
class Share:
    """The part of the work that one process does."""

    rank: int = 0
    world: int = 1


class Caches:
    """Latents and text outputs of one run.

    learning: text encoders that are trained, whose outputs cannot be cached. more_texts: prompts of previews.
    check: called before each batch; raises KeyboardInterrupt where the run should stop.
    """

    def __init__(
        self, family: ModelFamily, options: TrainerOptions, data: TrainingData, dtype: torch.dtype, *,
        learning: Collection[str], more_texts: Sequence[Text], check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.check = check
        self.family, self.options, self.data, self.dtype = family, options.cache, data, dtype
        self.latents = self._latent_cache(options) if options.cache.latents else None
        cached = [name for name in family.encoders if name not in learning] if options.cache.texts else []
        self.texts = TextCaches({name: self._text_cache(name, options) for name in cached}) if cached else None
        self.wanted = list(dict.fromkeys([*data.all_texts(), *more_texts])) if cached else []

    def _latent_cache(self, options: TrainerOptions) -> LatentCache:
        cache = options.cache
        return LatentCache(
            LatentFolders(cache.cache_dir, disk=cache.cache_latents_to_disk),
            self.family.latent,
            vae_fingerprint=self.family.vae_fingerprint(),
            dtype=self.dtype,
            masked_loss=options.data.masked_loss,
            scale_legacy=self.family.scale_legacy,
            skip_check=cache.skip_cache_check,
        )

    def _text_cache(self, name: str, options: TrainerOptions) -> TextCache:
        spec = self.family.references
        folder = self._text_folder() if options.cache.cache_text_encoder_outputs_to_disk else None
        return TextCache(
            text_store(folder),
            fingerprint=self.family.text_fingerprint(name),
            settings=name,
            dtype=self.dtype,
            skip_check=options.cache.skip_cache_check,
            sees_references=spec is not None and name in spec.seen_by,
        )

    def _text_folder(self) -> str:
        """--cache_dir, or beside the first dataset's pictures: captions are shared between datasets."""
        sample = self.data.encoding_jobs()[0].sample
        beside = os.path.join(sample.subset.image_dir or os.path.dirname(sample.path), ".trainyard")
        return self.options.cache_dir or beside

    def latents_missing(self) -> bool:
        """True when the VAE has pictures to encode."""
        jobs = self.data.encoding_jobs() + self.data.reference_jobs()
        return self.latents is not None and bool(self.latents.missing(jobs))

    def caches_text(self, name: str) -> bool:
        """True when the outputs of text encoder `name` are cached."""
        return self.texts is not None and name in self.texts.parts

    def texts_missing(self, name: str) -> bool:
        """True when text encoder `name`, whose outputs are cached, has captions to encode."""
        assert self.texts is not None
        return bool(self.texts.parts[name].missing(self.wanted))

    @torch.no_grad()
    def fill_latents(self, vae: nn.Module, share: Share) -> None:
        """Encode the pictures that are missing."""
        assert self.latents is not None
        device = next(vae.parameters()).device

        def encode(pixels: Tensor, seeds: list[int]) -> Tensor:
            self.check()
            return self.family.encode_image(vae, on_device(pixels, device), seeds)

        def encode_reference(pixels: Tensor, seeds: list[int]) -> Tensor:
            self.check()
            return self.family.encode_reference(vae, on_device(pixels, device))

        with self._saying_what_stays(self.options.cache_latents_to_disk):
            for jobs, way in ((self.data.encoding_jobs(), encode), (self.data.reference_jobs(), encode_reference)):
                self.latents.fill(
                    jobs,
                    partial(encoded, way),
                    batch_size=self.options.vae_batch_size,
                    workers=max(1, (os.cpu_count() or 1) // 2),
                    rank=share.rank,
                    world=share.world,
                )

    @torch.no_grad()
    def fill_texts(self, name: str, encoder: nn.Module, share: Share) -> None:
        """Encode the captions that are missing with text encoder `name`."""
        assert self.texts is not None

        def encode(texts: list[Text]) -> list[Cond]:
            self.check()
            pictures = [[reference_pixels(job) for job in text.references] for text in texts]
            tokens = self.family.tokenize_with([text.caption for text in texts], pictures)
            return self.family.split_cond(self.family.encode_part(name, encoder, tokens))

        with self._saying_what_stays(self.options.cache_text_encoder_outputs_to_disk):
            self.texts.parts[name].fill(
                self.wanted,
                encode,
                batch_size=self.options.text_encoder_batch_size or 16,
                rank=share.rank,
                world=share.world,
            )

    @contextmanager
    def _saying_what_stays(self, on_disk: bool) -> Iterator[None]:
        """Say what Ctrl-C leaves behind: an entry of the cache is whole or not there."""
        try:
            yield
        except KeyboardInterrupt:
            stays = "what was encoded stays in the cache, and the next run goes on from there"
            raise KeyboardInterrupt(stays if on_disk else "nothing was written") from None


# ---- the encoders of a run -------------------------------------------------------------------------------------------


class LoadsEncoder(Protocol):
    """Loads a text encoder; without `device`, where the training is."""

    def __call__(self, name: str, device: str | None = None) -> nn.Module: ...


def encoders_that_stay(caches: Caches, load: LoadsEncoder, share: Share) -> dict[str, nn.Module]:
    """Fill the text caches. Returns the text encoders that the steps need: those whose outputs are not cached."""
    encoders: dict[str, nn.Module] = {}
    for name in caches.family.encoders:
        if not caches.caches_text(name):
            encoders[name] = load(name)
        elif caches.texts_missing(name):
            fill_texts(caches, name, load, share)
    return encoders


def fill_texts(caches: Caches, name: str, load: LoadsEncoder, share: Share) -> None:
    """Encode the captions that are not cached yet; on the CPU where the encoder does not fit on the card."""
    if fits(lambda: caches.fill_texts(name, load(name), share)):
        free_memory()
        return
    log.warning(f"{name} does not fit on the card: it encodes the captions on the CPU, once")
    caches.fill_texts(name, load(name, "cpu"), share)
    free_memory()


def vae_that_stays(caches: Caches, load: Callable[[], nn.Module], share: Share, *, previews: bool) -> nn.Module | None:
    """Fill the latent cache. Returns the VAE where the steps need it, and in main memory where only previews do."""
    vae = load() if caches.latents is None or previews or caches.latents_missing() else None
    if caches.latents is None:
        return vae
    if vae is not None:
        caches.fill_latents(vae, share)
    return vae.to("cpu") if vae is not None and previews else None
