# SPDX-License-Identifier: Apache-2.0
"""What the encoders do before the training: they fill the caches, and those with no more work are freed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn

from library.device import fits, free_memory
from library.log import get_logger
from library.trainers.caching import Caches, Share

log = get_logger()


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
