# SPDX-License-Identifier: Apache-2.0
"""The training data of a run: its datasets, the plan of each epoch, and the contents of each planned batch.

Every random draw is seeded by (run seed, purpose, epoch, position in the epoch), so a batch is the same in any worker,
after a resume, and with or without cached latents.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from library.data import captions, images
from library.data.buckets import Bucket
from library.data.caches.share import ALL, Share
from library.data.encoding import (
    LatentJob,
    LatentSource,
    Text,
    TextSource,
    latent_seed,
    mask_of,
    pixels_of,
    reference_pixels,
    without_draws,
)
from library.data.joined import Joined, Made
from library.data.loader import BatchLoader
from library.data.parts import DatasetStats, Part, make_parts
from library.data.plan import BatchPlan, EpochPlan, each_shape, plan_epoch, plan_in_order
from library.data.records import DatasetConfig, Sample
from library.data.shards.samples import ShardSamples
from library.data.timetable import Stage, entry_at
from library.errors import raise_problems
from library.rng import python_rng
from library.types import Batch, Cond, ReferenceSpec

# ---- the data -----------------------------------------------------------------------------------------------------


class TrainingData:
    """All datasets of a run.

    seed: the run's seed. masked_loss: masks come from mask pictures (alpha_mask subsets have masks with or without it).
    text_variants: texts per caption that are cached where captions vary. references: how the model takes reference
    pictures. `prepared` adds what is known later.

    Raises UserError naming all pictures that fit no bucket, and if no training picture is left.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]],
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        masked_loss: bool = False,
        text_variants: int = 8,
        references: ReferenceSpec | None = None,
    ):
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.masked_loss = masked_loss
        self.text_variants = text_variants
        self.total_steps = 0
        self.latents: LatentSource | None = None
        self.texts: TextSource | None = None
        self.join: Callable[[list[Cond]], Cond] | None = None
        self.seen = references is not None and bool(references.seen_by)  # text encoders look at the references
        self.shown = self.seen  # and do so in the steps, so that each batch needs the pictures
        found = make_parts(datasets, seed, references)
        configs = [config for config, _ in datasets]
        self.shares = tuple(sorted({0.0, *(entry.share for config in configs for entry in config.timetable)}))
        self.stages: tuple[Stage, ...] = ()  # of the run, known when its length is
        self._parts = [part for sizes in found for part in sizes]
        self._main = [sizes[config.main_size] for config, sizes in zip(configs, found)]  # at their largest size
        self._stages = [
            [sizes[entry_at(c.timetable, share) if c.timetable else 0] for c, sizes in zip(configs, found)]
            for share in self.shares
        ]

    def prepared(
        self,
        *,
        total_steps: int | None = None,
        stages: tuple[Stage, ...] | None = None,
        latents: LatentSource | None = None,
        texts: TextSource | None = None,
        join: Callable[[list[Cond]], Cond] | None = None,
        shown: bool | None = None,
    ) -> TrainingData:
        """A copy with the length of the run (optimizer steps, for token warm-up given as a fraction) and filled caches.

        stages: those of the run, one for each of `shares`. join: pads the outputs of several captions into a batch;
        required with `texts`. shown: whether batches contain the pixels of reference pictures even if their latents are
        cached, for text encoders to look at. Raises UserError if a cache does not work with the datasets' options.
        """
        raise_problems(self.cache_problems(latents=latents is not None, texts=texts is not None))
        if texts is not None and join is None:
            raise ValueError("texts needs join")
        new = copy.copy(self)
        new.total_steps = self.total_steps if total_steps is None else total_steps
        new.stages = self.stages if stages is None else stages
        new.latents = self.latents if latents is None else latents
        new.texts = self.texts if texts is None else texts
        new.join = self.join if join is None else join
        new.shown = self.shown if shown is None else shown
        return new

    def cache_problems(self, *, latents: bool, texts: bool) -> list[str]:
        """Options of subsets that do not work with a cache of latents or of text outputs, one line each."""
        lines: list[str] = []
        for part in self._main:
            for subset in part.config.subsets:
                reasons = [images.uncacheable_latents(subset.images) if latents else None]
                reasons += [captions.uncacheable(subset.captions) if texts else None]
                lines += [f"subset {subset.name}: {reason}" for reason in reasons if reason is not None]
        return list(dict.fromkeys(lines))

    # ---- plans

    def plan_epoch(self, epoch: int, *, stage: int | None = None) -> EpochPlan:
        """The batches of an epoch (counted from 1) in order: a pure function of (seed, epoch).

        stage: whose sizes they have; by default that which the run is in.
        """
        if epoch < 1:
            raise ValueError("epochs count from 1")
        number = self._stage_of(epoch) if stage is None else stage
        return plan_epoch([part.train for part in self._stages[number]], seed=self.seed, epoch=epoch, stage=number)

    def _stage_of(self, epoch: int) -> int:
        """Number of the stage that an epoch (counted from 1) belongs to."""
        return max((stage.number for stage in self.stages if stage.first_epoch < epoch), default=0)

    def each_shape(self) -> list[BatchPlan]:
        """One batch of each (shape, number of samples) of each stage."""
        epochs = [each_shape(self.plan_epoch(1, stage=number)) for number in range(len(self._stages))]
        return [plan for plans in epochs for plan in plans]

    def stage_sizes(self, stage: int) -> list[DatasetConfig]:
        """Each dataset with its resolution and batch size in a stage."""
        return [part.config for part in self._stages[stage]]

    def _batches_before(self, epoch: int) -> int:
        """Number that the micro-batches of an epoch (counted from 1) begin with, over the whole run."""
        if self.stages:
            return self.stages[self._stage_of(epoch)].batches_before(epoch - 1)
        return self.batches_per_epoch[0] * (epoch - 1)

    @property
    def batches_per_epoch(self) -> tuple[int, ...]:
        """Micro-batches of an epoch of each stage, over all processes."""
        return tuple(sum(part.stats.batches for part in parts) for parts in self._stages)

    def validation_plans(self) -> EpochPlan:
        """The batches of one validation: always the same, without augmentation, shuffle or dropout."""
        return plan_in_order([part.validation for part in self._main])

    def stats(self) -> tuple[DatasetStats, ...]:
        """Statistics of each dataset, at its largest size."""
        return tuple(part.stats for part in self._main)

    def trained(self) -> list[Sequence[tuple[Sample, Bucket]]]:
        """The pictures that any epoch trains on, each once, per dataset."""
        return [_trained(part) for part in self._main]

    @property
    def wants_masks(self) -> bool:
        """Whether the loss may be masked."""
        return self.masked_loss or any(s.images.alpha_mask for part in self._main for s in part.config.subsets)

    def trained_texts(self, sample: Sample) -> list[str]:
        """The captions that a picture may have in training; variants that only reorder parts are left out."""
        rules = sample.subset.captions
        possible = captions.possible_texts(sample.caption, rules)
        if self.texts is None or possible == [""] or not (rules.enable_wildcard or rules.caption_tag_dropout_rate > 0):
            return possible
        return list(captions.caption_variants(sample.caption, rules, self.text_variants, _variant_seed(sample)))

    # ---- contents of the caches

    def encoding_jobs(self) -> Sequence[LatentJob]:
        """Every (picture, bucket, flipped) that training and validation use, each once, dataset by dataset."""
        if not self._may_repeat():
            return Joined([_jobs(part) for part in self._parts])
        found: dict[tuple, LatentJob] = {}
        for part, sample, validation in self._used_samples():
            for flipped in _flips(sample, validation):
                job = LatentJob(sample, part.bucket(sample), flipped)
                rules = sample.subset.images
                how = (sample.mask_path, rules.resize_interpolation, rules.alpha_mask)
                found.setdefault((sample.path, job.bucket, flipped, how), job)
        return list(found.values())

    def _may_repeat(self) -> bool:
        """Whether two samples may be of the same file: impossible if all are in shards and each shard is named once."""
        sources = [
            source
            for part in self._parts
            for source in (part.samples.parts if isinstance(part.samples, Joined) else [part.samples])
        ]
        shards = [index.shard.path for s in sources if isinstance(s, ShardSamples) for index in s.indexes]
        return len(set(shards)) < len(shards) or not all(isinstance(source, ShardSamples) for source in sources)

    def reference_jobs(self) -> list[LatentJob]:
        """Every reference picture at every size that training and validation use, each once."""
        found: dict[LatentJob, None] = {}
        used = self._used_samples() if any(part.has_references for part in self._parts) else ()
        for part, sample, validation in used:
            for flipped in _flips(sample, validation):
                found |= dict.fromkeys(part.references(sample, flipped=flipped))
        return list(found)

    def texts_of(self, share: Share = ALL) -> Iterator[Text]:
        """Yield every final text that training and validation use when text outputs are cached, sample by sample.

        share: only captions that are this process's work. A text may occur several times.
        """
        for part, sample, validation in self._used_samples(self._parts if self.seen else self._main):
            if share.has(sample.caption):
                for flipped in _flips(sample, validation) if self.seen else (False,):
                    shown = self._shown(part, sample, flipped)
                    yield from (Text(caption, shown) for caption in self._captions_of(sample, validation))

    def _captions_of(self, sample: Sample, validation: bool) -> list[str]:
        """The final captions of a sample."""
        rules = sample.subset.captions
        if validation:
            return [_validation_caption(sample)]
        texts = captions.caption_variants(sample.caption, rules, self.text_variants, _variant_seed(sample))
        drops = rules.caption_dropout_rate > 0 or rules.caption_dropout_every_n_epochs > 0
        return [*texts, ""] if drops else [*texts]

    def _shown(self, part: Part, sample: Sample, flipped: bool) -> tuple[LatentJob, ...]:
        """The reference pictures of a sample that text encoders see."""
        return part.references(sample, flipped=flipped) if self.seen else ()

    def _used_samples(self, parts: Sequence[Part] | None = None) -> Iterator[tuple[Part, Sample, bool]]:
        """(dataset, sample, is for validation) of every sample that an epoch or validation uses, by default at all
        sizes of the datasets."""
        for part in self._parts if parts is None else parts:
            for pool, validation in ((part.train, False), (part.validation, True)):
                for index in np.unique(pool.samples).tolist():
                    yield part, part.samples[index], validation

    # ---- batches

    def loader(self, *, workers: int = 0, pin_memory: bool = False) -> BatchLoader:
        """A loader of plans: `with data.loader(...) as loader: for batch in loader.run(jobs_of(plans))`.

        workers: most processes that load. Where no picture is opened, a thread takes less time than a process needs to
        hand a batch over.
        """
        return BatchLoader(self, workers=workers, in_thread=workers > 0 and self.is_cached, pin_memory=pin_memory)

    @property
    def is_cached(self) -> bool:
        """Whether batches are read from caches alone. Control images are not cached; shards may contain some."""
        subsets = [subset for part in self._parts for subset in part.config.subsets]
        opened = any(subset.conditioning_data_dir or subset.shard_pattern for subset in subsets)
        return self.latents is not None and not self.shown and not opened

    def load(self, plan: BatchPlan, *, step: int) -> Batch:
        """Load the batch of a plan. step: the optimizer step it is for, on which token warm-up depends.

        Raises UserError naming the file that cannot be read.
        """
        part = (self._main if plan.validation else self._stages[plan.stage])[plan.dataset]
        items = [self._item(part, part.samples[index], plan, place, step) for place, index in enumerate(plan.samples)]
        samples = [item.sample for item in items]
        texts = [item.caption for item in items]
        cond = None
        if self.texts is not None and self.join is not None:
            shown = [self._shown(part, item.sample, item.flipped) for item in items]
            cond = self.join([self.texts.get(Text(text, pictures)) for text, pictures in zip(texts, shown)])
        weights = [self.prior_loss_weight if sample.subset.is_reg else 1.0 for sample in samples]
        return Batch(
            names=[sample.path for sample in samples],
            captions=texts,
            loss_weights=torch.tensor(weights, dtype=torch.float32),
            pixels=_stack([item.pixels for item in items]),
            latents=_stack([item.latents for item in items]),
            latent_seeds=[latent_seed(item.sample, item.flipped) for item in items],
            references=_columns([item.references for item in items]),
            reference_pixels=_columns([item.reference_pixels for item in items]),
            cond=cond,
            masks=_stack_masks([item.mask for item in items]),
            original_sizes=_sizes([(sample.size[1], sample.size[0]) for sample in samples]),
            crop_top_lefts=_sizes([item.crop_top_left for item in items]),
            target_sizes=_sizes([(plan.bucket[1], plan.bucket[0])] * len(items)),
            control=_stack([item.control for item in items]),
            network_multiplier=part.config.network_multiplier,
            keep_prior=[bool(s.subset.custom_attributes.get("diff_output_preservation", False)) for s in samples],
            position=plan.position if plan.validation else self._batches_before(plan.epoch) + plan.position,
        )

    def _item(self, part: Part, sample: Sample, plan: BatchPlan, place: int, step: int) -> _Item:
        """One sample of a batch."""
        rng = python_rng(self.seed, "augment", plan.epoch, plan.position, place)
        bucket = part.bucket(sample)
        rules = without_draws(sample.subset.images) if plan.validation else sample.subset.images
        flipped = images.draw_flip(rules, rng)
        caption = _validation_caption(sample) if plan.validation else self._caption(sample, plan, place, step)
        if self.latents is not None:
            latents, mask = self.latents.get(LatentJob(sample, bucket, flipped))
            if not images.wants_mask(sample, masked_loss=self.masked_loss):
                mask = None
            told = images.fixed_conditioning(bucket, sample.size, flipped=flipped)
            control = _control(images.prepare_control(sample, bucket, flipped=flipped))
            shown = self._references(part, sample, flipped)
            return _Item(sample, caption, flipped, None, latents, mask, told, control, *shown)
        prepared = images.prepare(
            sample, bucket, rng, flipped=flipped, masked_loss=self.masked_loss, rules=rules, with_control=True
        )
        pixels, mask, control = pixels_of(prepared.rgb), mask_of(prepared.mask), _control(prepared.control)
        told = prepared.crop_top_left
        shown = self._references(part, sample, flipped)
        return _Item(sample, caption, flipped, pixels, None, mask, told, control, *shown)

    def _references(self, part: Part, sample: Sample, flipped: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(latents, pixels) of a sample's reference pictures, empty where the steps do not need them."""
        jobs, cache = part.references(sample, flipped=flipped), self.latents
        latents = [cache.get(job)[0] for job in jobs] if cache is not None else []
        return latents, [reference_pixels(job) for job in jobs] if cache is None or self.shown else []

    def _caption(self, sample: Sample, plan: BatchPlan, place: int, step: int) -> str:
        rng = python_rng(self.seed, "caption", plan.epoch, plan.position, place)
        rules = sample.subset.captions
        if self.texts is None:
            return captions.final_caption(
                sample.caption, rules, rng, epoch=plan.epoch, step=step, total_steps=self.total_steps
            )
        seed_parts = _variant_seed(sample)
        return captions.cached_caption(sample.caption, rules, self.text_variants, seed_parts, rng, epoch=plan.epoch)


def _flips(sample: Sample, validation: bool) -> tuple[bool, ...]:
    """Whether a sample is trained mirrored: not, and also, with flip_aug."""
    return (False, True) if sample.subset.images.flip_aug and not validation else (False,)


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
    references: list[Tensor]
    reference_pixels: list[Tensor]


def _trained(part: Part) -> Sequence[tuple[Sample, Bucket]]:
    """The pictures of a dataset that any epoch trains."""
    indices = np.sort(part.train.samples)

    def pair(number: int) -> tuple[Sample, Bucket]:
        sample = part.samples[int(indices[number])]
        return sample, part.bucket(sample)

    return Made(len(indices), pair)


def _jobs(part: Part) -> Sequence[LatentJob]:
    """The pictures of a dataset that are encoded; the mirrored one follows the plain one."""
    train = np.sort(part.train.samples)
    flips = np.concatenate([part.flips[train], np.zeros(len(part.validation.samples), dtype=bool)])
    ends = np.cumsum(1 + flips.astype(np.int64))
    indices = np.concatenate([train, np.sort(part.validation.samples)])

    def job(number: int) -> LatentJob:
        place = int(np.searchsorted(ends, number, side="right"))
        sample = part.samples[int(indices[place])]
        return LatentJob(sample, part.bucket(sample), bool(flips[place]) and number == ends[place] - 1)

    return Made(int(ends[-1]) if len(ends) else 0, job)


# ---- small helpers ------------------------------------------------------------------------------------------------


def _variant_seed(sample: Sample) -> tuple[str, str, str]:
    """Seed of the cached variants of a caption. The run's seed is not in it: it chooses among the same variants."""
    return ("caption", os.path.basename(sample.path), sample.caption)


def _validation_caption(sample: Sample) -> str:
    rules = captions.validation_rules(sample.subset.captions)
    rng = python_rng("validation", *_variant_seed(sample))
    return captions.compose(sample.caption, rules, rng, step=0, total_steps=0)


def _sizes(pairs: Sequence[tuple[float, float]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.float32)


def _control(control: np.ndarray | None) -> Tensor | None:
    """H W 3 uint8 as 3 H W float32 in [-1, 1]."""
    return None if control is None else pixels_of(control)


def _columns(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """One tensor of the first ones of all samples, one of the second ones, and so on: their shapes agree."""
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One batch tensor, or None when the samples have none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """The masks of a batch, ones for samples without a mask; None when no sample has one."""
    like = next((mask for mask in masks if mask is not None), None)
    if like is None:
        return None
    return torch.stack([torch.ones_like(like) if mask is None else mask for mask in masks])
