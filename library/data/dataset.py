# SPDX-License-Identifier: Apache-2.0
"""The training data of a run: several datasets, one plan per epoch, and what a planned batch contains.

Every draw takes its seed from (run seed, purpose, epoch, position in the epoch), so a batch is the same in any worker,
after any resume, and whether latents come from a cache or not.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from library.data import captions, images
from library.data.buckets import Bucket
from library.data.loader import BatchLoader
from library.data.parts import DatasetStats, Part, make_parts
from library.data.plan import BatchPlan, EpochPlan, plan_epoch, plan_in_order
from library.data.records import DatasetConfig, ImageRules, Sample
from library.errors import UserError
from library.rng import derive_seed, python_rng
from library.types import Batch, Cond

# ---- what a cache gives and needs ---------------------------------------------------------------------------------


class LatentSource(Protocol):
    """Cached latents."""

    def get(self, sample: Sample, bucket: Bucket, flipped: bool) -> tuple[Tensor, Tensor | None]:
        """(latents C h w, mask 1 h w float32 in [0, 1] or None)."""


class TextSource(Protocol):
    """Cached text-encoder outputs."""

    def get(self, caption: str) -> Cond:
        """The outputs for one final caption, unpadded."""


class LatentJob(NamedTuple):
    """One picture that a cache of latents must hold."""

    sample: Sample
    bucket: Bucket
    flipped: bool


class EncodingInput(NamedTuple):
    """What an image encoder gets for a LatentJob."""

    pixels: Tensor  # 3 H W float32 in [-1, 1]
    seed: int  # of the VAE posterior sample
    mask: Tensor | None  # 1 H W float32 in [0, 1]


def encoding_input(job: LatentJob, *, masked_loss: bool) -> EncodingInput:
    """Reads the picture of a LatentJob: the very pixels, seed and mask that training without a cache would use.

    Raises UserError naming the file.
    """
    rules = _still(job.sample.subset.images)
    rng = python_rng("encoding")  # nothing is drawn: a subset that draws cannot be cached
    prepared = images.prepare(job.sample, job.bucket, rng, flipped=job.flipped, masked_loss=masked_loss, rules=rules)
    return EncodingInput(_pixels(prepared.rgb), latent_seed(job.sample, job.flipped), _mask(prepared.mask))


def latent_seed(sample: Sample, flipped: bool) -> int:
    """The seed of a sample's VAE posterior: from its file name, so that it survives a move of the folder."""
    return derive_seed("vae", os.path.basename(sample.path), int(flipped))


# ---- the data -----------------------------------------------------------------------------------------------------


class TrainingData:
    """All datasets of a run.

    seed: the run's seed. masked_loss: masks come from mask pictures (alpha_mask subsets have masks with or without it).
    text_variants: texts per caption that are cached where captions vary. What is known later comes with `prepared`.

    Raises UserError with all pictures that fit no bucket, and when no training picture is left.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]],
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        masked_loss: bool = False,
        text_variants: int = 8,
    ):
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.masked_loss = masked_loss
        self.text_variants = text_variants
        self.total_steps = 0
        self.latents: LatentSource | None = None
        self.texts: TextSource | None = None
        self.join: Callable[[list[Cond]], Cond] | None = None
        self._parts = make_parts(datasets, seed)

    def prepared(
        self,
        *,
        total_steps: int | None = None,
        latents: LatentSource | None = None,
        texts: TextSource | None = None,
        join: Callable[[list[Cond]], Cond] | None = None,
    ) -> TrainingData:
        """The same data with the length of the run (optimizer steps, for token warm-up in fractions) and filled caches.

        join: pads the outputs of several captions into those of a batch; needed with `texts`.
        Raises UserError where a cache cannot serve the datasets' options.
        """
        problems = self.cache_problems(latents=latents is not None, texts=texts is not None)
        if problems:
            raise UserError(problems)
        if texts is not None and join is None:
            raise ValueError("texts needs join")
        new = copy.copy(self)
        new.total_steps = self.total_steps if total_steps is None else total_steps
        new.latents = self.latents if latents is None else latents
        new.texts = self.texts if texts is None else texts
        new.join = self.join if join is None else join
        return new

    def cache_problems(self, *, latents: bool, texts: bool) -> list[str]:
        """Options of subsets that a cache of latents or of text outputs cannot serve, one line each."""
        lines: list[str] = []
        for part in self._parts:
            for subset in part.config.subsets:
                reasons = [images.uncacheable_latents(subset.images) if latents else None]
                reasons += [captions.uncacheable(subset.captions) if texts else None]
                lines += [f"subset {subset.name}: {reason}" for reason in reasons if reason is not None]
        return list(dict.fromkeys(lines))

    # ---- plans

    def plan_epoch(self, epoch: int) -> EpochPlan:
        """The batches of an epoch (they count from 1) in order: a pure function of (seed, epoch)."""
        if epoch < 1:
            raise ValueError("epochs count from 1")
        return plan_epoch([part.train for part in self._parts], seed=self.seed, epoch=epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of an epoch, of all processes."""
        return sum(part.stats.batches for part in self._parts)

    def validation_plans(self) -> EpochPlan:
        """The batches of one validation: always the same, without augmentation, shuffle or dropout."""
        return plan_in_order([part.validation for part in self._parts])

    def stats(self) -> tuple[DatasetStats, ...]:
        """Each dataset in numbers."""
        return tuple(part.stats for part in self._parts)

    def trained(self) -> list[list[tuple[Sample, Bucket]]]:
        """Pictures that any epoch trains, once each, per dataset."""
        found: list[list[tuple[Sample, Bucket]]] = []
        for part in self._parts:
            samples = (part.samples[index] for index in np.unique(part.train.entries).tolist())
            found.append([(sample, part.bucket(sample)) for sample in samples])
        return found

    def trained_texts(self, sample: Sample) -> list[str]:
        """What a picture's caption may be in training; whatever varies only the order of its parts is left out."""
        rules = sample.subset.captions
        possible = captions.possible_texts(sample.caption, rules)
        if self.texts is None or possible == [""] or not (rules.enable_wildcard or rules.caption_tag_dropout_rate > 0):
            return possible
        return list(captions.caption_variants(sample.caption, rules, self.text_variants, _variant_seed(sample)))

    # ---- what a cache must hold

    def encoding_jobs(self) -> list[LatentJob]:
        """Every (picture, bucket, flipped) that training and validation use, once each, dataset by dataset."""
        found: dict[tuple, LatentJob] = {}
        for part, sample, validation in self._used_samples():
            flips = (False, True) if sample.subset.images.flip_aug and not validation else (False,)
            for flipped in flips:
                job = LatentJob(sample, part.bucket(sample), flipped)
                rules = sample.subset.images
                how = (sample.mask_path, rules.resize_interpolation, rules.alpha_mask)
                found.setdefault((sample.path, job.bucket, flipped, how), job)
        return list(found.values())

    def all_captions(self) -> list[str]:
        """Every final text that training and validation use when text outputs are cached, once each."""
        found: dict[str, None] = {}
        for _, sample, validation in self._used_samples():
            rules = sample.subset.captions
            if validation:
                found[_validation_caption(sample)] = None
                continue
            texts = captions.caption_variants(sample.caption, rules, self.text_variants, _variant_seed(sample))
            found |= dict.fromkeys(texts)
            if rules.caption_dropout_rate > 0 or rules.caption_dropout_every_n_epochs > 0:
                found[""] = None
        return list(found)

    def _used_samples(self) -> Iterator[tuple[Part, Sample, bool]]:
        """(dataset, sample, for validation) of every sample that some epoch or validation uses."""
        for part in self._parts:
            for pool, validation in ((part.train, False), (part.validation, True)):
                for index in np.unique(pool.samples).tolist():
                    yield part, part.samples[index], validation

    # ---- batches

    def loader(self, *, workers: int = 0, persistent: bool = False, pin_memory: bool = False) -> BatchLoader:
        """Loads plans: `with data.loader(...) as loader: for batch in loader.run(plans, step_of_first=...)`."""
        return BatchLoader(self, workers=workers, persistent=persistent, pin_memory=pin_memory)

    def load(self, plan: BatchPlan, *, step: int) -> Batch:
        """The batch of a plan. `step` is the optimizer step that it is for: token warm-up depends on it.

        Raises UserError naming the file that cannot be read.
        """
        part = self._parts[plan.dataset]
        items = [self._item(part, part.samples[index], plan, place, step) for place, index in enumerate(plan.samples)]
        samples = [item.sample for item in items]
        texts = [item.caption for item in items]
        cond = None
        if self.texts is not None and self.join is not None:
            cond = self.join([self.texts.get(text) for text in texts])
        weights = [self.prior_loss_weight if sample.subset.is_reg else 1.0 for sample in samples]
        return Batch(
            names=[sample.path for sample in samples],
            captions=texts,
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            pixels=_stack([item.pixels for item in items]),
            latents=_stack([item.latents for item in items]),
            latent_seeds=[latent_seed(item.sample, item.flipped) for item in items],
            cond=cond,
            masks=_stack_masks([item.mask for item in items]),
            original_sizes=_sizes([(sample.size[1], sample.size[0]) for sample in samples]),
            crop_top_lefts=_sizes([item.crop_top_left for item in items]),
            target_sizes=_sizes([(plan.bucket[1], plan.bucket[0])] * len(items)),
            control=_stack([item.control for item in items]),
            network_multiplier=part.config.network_multiplier,
            keep_prior=[bool(s.subset.custom_attributes.get("diff_output_preservation", False)) for s in samples],
            position=plan.position if plan.validation else self.batches_per_epoch * (plan.epoch - 1) + plan.position,
        )

    def _item(self, part: Part, sample: Sample, plan: BatchPlan, place: int, step: int) -> _Item:
        """One sample of a batch."""
        rng = python_rng(self.seed, "augment", plan.epoch, plan.position, place)
        bucket = part.bucket(sample)
        rules = _still(sample.subset.images) if plan.validation else sample.subset.images
        flipped = images.draw_flip(rules, rng)
        caption = _validation_caption(sample) if plan.validation else self._caption(sample, plan, place, step)
        if self.latents is not None:
            latents, mask = self.latents.get(sample, bucket, flipped)
            if not images.wants_mask(sample, masked_loss=self.masked_loss):
                mask = None
            told = images.fixed_conditioning(bucket, sample.size, flipped=flipped)
            control = _control(images.prepare_control(sample, bucket, flipped=flipped))
            return _Item(sample, caption, flipped, None, latents, mask, told, control)
        prepared = images.prepare(
            sample, bucket, rng, flipped=flipped, masked_loss=self.masked_loss, rules=rules, with_control=True
        )
        pixels, mask, control = _pixels(prepared.rgb), _mask(prepared.mask), _control(prepared.control)
        return _Item(sample, caption, flipped, pixels, None, mask, prepared.crop_top_left, control)

    def _caption(self, sample: Sample, plan: BatchPlan, place: int, step: int) -> str:
        rng = python_rng(self.seed, "caption", plan.epoch, plan.position, place)
        rules = sample.subset.captions
        if self.texts is None:
            return captions.final_caption(
                sample.caption, rules, rng, epoch=plan.epoch, step=step, total_steps=self.total_steps
            )
        seed_parts = _variant_seed(sample)
        return captions.cached_caption(sample.caption, rules, self.text_variants, seed_parts, rng, epoch=plan.epoch)


class _Item(NamedTuple):
    """One sample of a batch, loaded."""

    sample: Sample
    caption: str
    flipped: bool
    pixels: Tensor | None
    latents: Tensor | None
    mask: Tensor | None
    crop_top_left: tuple[float, float]
    control: Tensor | None


# ---- small helpers ------------------------------------------------------------------------------------------------


def _still(rules: ImageRules) -> ImageRules:
    """The image rules of validation samples: nothing is drawn."""
    return ImageRules(resize_interpolation=rules.resize_interpolation, alpha_mask=rules.alpha_mask)


def _variant_seed(sample: Sample) -> tuple[str, str, str]:
    """Not from the run's seed: another seed chooses among the same cached variants."""
    return ("caption", os.path.basename(sample.path), sample.caption)


def _validation_caption(sample: Sample) -> str:
    rules = captions.validation_rules(sample.subset.captions)
    rng = python_rng("validation", *_variant_seed(sample))
    return captions.compose(sample.caption, rules, rng, step=0, total_steps=0)


def _pixels(rgb: np.ndarray) -> Tensor:
    """H W 3 uint8 as 3 H W float32 in [-1, 1]."""
    return torch.from_numpy(rgb.transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1.0


def _control(control: np.ndarray | None) -> Tensor | None:
    """H W 3 uint8 as 3 H W float32 in [-1, 1]."""
    return None if control is None else _pixels(control)


def _mask(mask: np.ndarray | None) -> Tensor | None:
    """H W uint8 as 1 H W float32 in [0, 1]."""
    return None if mask is None else torch.from_numpy(mask[None].astype(np.float32)) / 255.0


def _sizes(pairs: Sequence[tuple[float, float]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float32)


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One batch tensor, or None when the samples have none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Samples without a mask count everywhere: ones. None when no sample of the batch has one."""
    like = next((mask for mask in masks if mask is not None), None)
    if like is None:
        return None
    return torch.stack([torch.ones_like(like) if mask is None else mask for mask in masks])


__all__ = [
    "BatchLoader",
    "BatchPlan",
    "DatasetStats",
    "EncodingInput",
    "EpochPlan",
    "LatentJob",
    "LatentSource",
    "TextSource",
    "TrainingData",
    "encoding_input",
    "latent_seed",
]
