# SPDX-License-Identifier: Apache-2.0
"""The caches of a run: their keys, and the encoders that fill them and are then freed."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from library.data.caches.latent_cache import LatentCache, LatentFolders
from library.data.caches.share import ALONE, Share, Shares
from library.data.caches.store import PackedStore, TensorStore
from library.data.caches.text_cache import TextCache, TextCaches, text_store
from library.data.dataset import TrainingData
from library.data.encoding import LatentJob, Text, reference_pixels
from library.data.joined import Joined
from library.data.manifest import FOLDER
from library.device import fits, free_memory, on_device
from library.errors import UserError
from library.families.family import ModelFamily
from library.log import get_logger
from library.trainers.options import TrainerOptions
from library.trainers.out_of_memory import encoded
from library.types import Cond

log = get_logger()


@dataclass(frozen=True)
class Wanted(Iterable[Text]):
    """One process's share of the texts of a run. Generated anew in each pass: there may be millions."""

    data: TrainingData
    more: Sequence[Text]  # prompts of previews
    share: Share

    def __iter__(self) -> Iterator[Text]:
        yield from self.data.texts_of(self.share)
        yield from (text for text in self.more if self.share.has(text.caption))


class Caches:
    """Latents and text outputs of one run.

    learning: text encoders that are trained, whose outputs cannot be cached. more_texts: prompts of previews.
    check: called before each batch; raises KeyboardInterrupt if the run should stop.
    """

    def __init__(
        self, family: ModelFamily, options: TrainerOptions, data: TrainingData, dtype: torch.dtype, *,
        learning: Collection[str], more_texts: Sequence[Text], check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.check, self.more_texts = check, more_texts
        self.family, self.options, self.data, self.dtype = family, options.cache, data, dtype
        cached = [name for name in family.encoders if name not in learning] if options.cache.texts else []
        latents = LatentFolders(options.cache.cache_dir, disk=options.cache.cache_latents_to_disk)
        texts = self._text_folder() if cached and options.cache.cache_text_encoder_outputs_to_disk else None
        folders = latents.of_all(job.sample for job in self.latent_jobs()) if options.cache.latents else []
        shares = shares_of(folder for folder in [*folders, texts] if folder is not None)
        self.latents = self._latent_cache(options, latents, shares) if options.cache.latents else None
        stores = {name: text_store(texts, shares.of(texts)) for name in cached}
        self.texts = TextCaches({n: self._text_cache(n, s, options) for n, s in stores.items()}) if cached else None

    def _latent_cache(self, options: TrainerOptions, folders: LatentFolders, shares: Shares) -> LatentCache:
        cache = options.cache
        return LatentCache(
            folders,
            self.family.latent,
            vae_fingerprint=self.family.vae_fingerprint(),
            dtype=self.dtype,
            masked_loss=options.data.masked_loss,
            scale_legacy=self.family.scale_legacy,
            skip_check=cache.skip_cache_check,
            shares=shares,
        )

    def _text_cache(self, name: str, store: TensorStore, options: TrainerOptions) -> TextCache:
        spec = self.family.references
        return TextCache(
            store,
            fingerprint=self.family.text_fingerprint(name),
            settings=name,
            dtype=self.dtype,
            skip_check=options.cache.skip_cache_check,
            sees_references=spec is not None and name in spec.seen_by,
        )

    def _text_folder(self) -> str:
        """A folder in --cache_dir, or beside the first dataset's pictures: captions are shared between datasets."""
        beside = self.options.cache_dir or os.path.join(self.data.encoding_jobs()[0].sample.folder, FOLDER)
        return os.path.join(beside, "texts")

    def latent_jobs(self) -> Sequence[LatentJob]:
        """All pictures to encode, references included."""
        return Joined([self.data.encoding_jobs(), self.data.reference_jobs()])

    def wanted(self, name: str, *, others: bool = False) -> Wanted:
        """This process's share of the texts for text encoder `name`. others: the share of the next process."""
        assert self.texts is not None
        share = self.texts.parts[name].store.share
        return Wanted(self.data, self.more_texts, share.next if others else share)

    def latents_missing(self) -> bool:
        """Whether the VAE has pictures to encode in this process."""
        return self.latents is not None and self.latents.is_missing_any(self.latent_jobs())

    def caches_text(self, name: str) -> bool:
        """Whether the outputs of text encoder `name` are cached."""
        return self.texts is not None and name in self.texts.parts

    def texts_missing(self, name: str) -> bool:
        """Whether text encoder `name`, whose outputs are cached, has captions to encode in this process."""
        assert self.texts is not None
        return self.texts.parts[name].is_missing_any(self.wanted(name))

    def lacking(self) -> Iterator[str]:
        """Records that this process does not find after all have filled their shares, one line per folder."""
        places = self.latents.lacking(self.latent_jobs()) if self.latents is not None else {}
        for folder, (count, total) in places.items():
            yield _lacking(f"{count} of {total} latents", folder)
        for name, part in self.texts.parts.items() if self.texts is not None else ():
            if isinstance(part.store, PackedStore):
                count, total = part.lacking(self.wanted(name, others=True))
                if count:
                    yield _lacking(f"{count} of {total} outputs of {name}", str(part.store.folder))

    @torch.no_grad()
    def fill_latents(self, vae: nn.Module) -> None:
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
                )

    @torch.no_grad()
    def fill_texts(self, name: str, encoder: nn.Module) -> None:
        """Encode the captions that are missing with text encoder `name`."""
        assert self.texts is not None

        def encode(texts: list[Text]) -> list[Cond]:
            self.check()
            pictures = [[reference_pixels(job) for job in text.references] for text in texts]
            tokens = self.family.tokenize_with([text.caption for text in texts], pictures)
            return self.family.split_cond(self.family.encode_part(name, encoder, tokens))

        with self._saying_what_stays(self.options.cache_text_encoder_outputs_to_disk):
            self.texts.parts[name].fill(
                self.wanted(name), encode, batch_size=self.options.text_encoder_batch_size or 16
            )

    @contextmanager
    def _saying_what_stays(self, on_disk: bool) -> Iterator[None]:
        """Add to a KeyboardInterrupt what stays in the cache: its records are complete or absent."""
        try:
            yield
        except KeyboardInterrupt:
            stays = "what was encoded stays in the cache, and the next run goes on from there"
            raise KeyboardInterrupt(stays if on_disk else "nothing was written") from None


# ---- several processes ----------------------------------------------------------------------------------------------


def shares_of(folders: Iterable[str]) -> Shares:
    """Divide the work on each folder between the processes that see the same folder.

    Each process writes a marker file and looks for the markers of the others. Collective: all processes must call this,
    with the same or with different folders.
    """
    state = PartialState()
    rank, world = state.process_index, state.num_processes
    if world == 1:
        return ALONE
    run = [uuid.uuid4().hex]
    broadcast_object_list(run)
    own = {folder: Path(folder, f".{run[0]}.{rank}.writer") for folder in folders}
    writable = {folder for folder, marker in own.items() if _touched(marker)}
    state.wait_for_everyone()
    # looked up by name: the listing of a network folder may be outdated
    seen = {f: [r for r in range(world) if m.with_name(f".{run[0]}.{r}.writer").exists()] for f, m in own.items()}
    state.wait_for_everyone()
    for folder in writable:
        own[folder].unlink(missing_ok=True)
    return Shares({f: Share(r.index(rank), len(r)) if f in writable else Share(writes=False) for f, r in seen.items()})


def _touched(marker: Path) -> bool:
    """Make an empty file. False if the folder cannot be written."""
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return True
    except OSError:
        return False


@contextmanager
def filled_by_all(caches: Caches) -> Iterator[None]:
    """Context manager around filling the caches. On exit it waits for all processes.

    Raises the same UserError in all processes if one cannot fill its share or does not find what another wrote.
    """
    problems: list[str] = []
    try:
        yield
    except UserError as error:
        if PartialState().num_processes == 1:
            raise
        problems = error.problems
    if PartialState().num_processes == 1:
        return
    PartialState().wait_for_everyone()
    found = gather_object(problems or list(caches.lacking()))
    if found:
        raise UserError(dict.fromkeys(found))


def _lacking(what: str, folder: str) -> str:
    ways = "fill it there with tools/cache_latents.py or tools/cache_text_encoder_outputs.py, or give a --cache_dir"
    return f"{platform.node()} lacks {what} in {folder}: {ways} that can be written and that all machines see"


# ---- the encoders of a run -------------------------------------------------------------------------------------------


class LoadsEncoder(Protocol):
    """Loads a text encoder; by default on the device of the training."""

    def __call__(self, name: str, device: str | None = None) -> nn.Module: ...


def encoders_that_stay(caches: Caches, load: LoadsEncoder) -> dict[str, nn.Module]:
    """Fill the text caches. Returns the text encoders that training needs: those whose outputs are not cached."""
    encoders: dict[str, nn.Module] = {}
    for name in caches.family.encoders:
        if not caches.caches_text(name):
            encoders[name] = load(name)
        elif caches.texts_missing(name):
            fill_texts(caches, name, load)
    return encoders


def fill_texts(caches: Caches, name: str, load: LoadsEncoder) -> None:
    """Encode the captions that are not cached yet; on the CPU if the encoder does not fit on the card."""
    if fits(lambda: caches.fill_texts(name, load(name))):
        free_memory()
        return
    log.warning(f"{name} does not fit on the card: it encodes the captions on the CPU, once")
    caches.fill_texts(name, load(name, "cpu"))
    free_memory()


def vae_that_stays(caches: Caches, load: Callable[[], nn.Module], *, previews: bool) -> nn.Module | None:
    """Fill the latent cache. Returns the VAE if training needs it, or previews (then in main memory), else None."""
    vae = load() if caches.latents is None or previews or caches.latents_missing() else None
    if caches.latents is None:
        return vae
    if vae is not None:
        caches.fill_latents(vae)
    return vae.to("cpu") if vae is not None and previews else None
