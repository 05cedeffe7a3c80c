# SPDX-License-Identifier: Apache-2.0
"""The metadata of saved files: facts about run, data and model, as library.io.metadata takes them."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields

from library.data.columns import columns_of
from library.data.dataset import TrainingData
from library.data.parts import DatasetStats
from library.data.records import DatasetConfig, Sample
from library.data.timetable import rows
from library.families.sheet import ModelFacts
from library.io.metadata import (
    VERSION,
    DatasetFacts,
    NetworkFacts,
    RunFacts,
    SpecFacts,
    SubsetFacts,
    build_metadata,
    file_facts,
    modelspec,
)
from library.options import changed_values
from library.trainers.options import TrainerOptions
from library.trainers.run_plan import RunPlan

# kind of file -> ending of modelspec.architecture
ENDINGS = {
    "LoRA": "/lora",
    "Checkpoint": "",
    "TextualInversion": "/textual-inversion",
    "ControlNet-LLLite": "/control-net-lllite",
}


class FileHashes:
    """Hashes of the model files for the metadata, computed in a thread: sha256 of some GB takes seconds."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """names: kind ("sd_model", "vae") -> the path or name given for it."""
        self._files = names
        self._found: dict[str, str] = {}
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        for kind, name in self._files.items():
            self._found |= file_facts(kind, name)

    def wait(self) -> dict[str, str]:
        self._thread.join()
        return self._found


def subset_facts(config: DatasetConfig, samples: Sequence[Sample]) -> tuple[SubsetFacts, ...]:
    """The facts of each subset of a dataset."""
    columns, found = columns_of(samples), []
    counts = {id(subset): count for subset, count in zip(columns.subsets, columns.counts())}
    for subset in config.subsets:
        settings = {**vars(subset.captions), **vars(subset.images), **vars(subset)}
        same = {f.name: settings[f.name] for f in fields(SubsetFacts) if f.name in settings}
        found.append(SubsetFacts(source=subset.name, img_count=counts.get(id(subset), 0), **same))
    return tuple(found)


def tag_frequency(trained: Iterable[Sample], texts: Callable[[Sample], Sequence[str]]) -> dict[str, dict[str, int]]:
    """Folder -> tag -> number of pictures with the tag in any of their possible texts.

    texts: picture -> its possible captions.
    """
    found: dict[str, Counter[str]] = {}
    for sample in trained:
        separator, tags = sample.subset.captions.caption_separator, Counter[str]()
        for text in texts(sample):
            tags |= Counter(tag for part in text.split(separator) if (tag := part.strip().lower()))
        found.setdefault(sample.subset.name, Counter()).update(tags)
    return {folder: dict(counts) for folder, counts in found.items()}


def dataset_facts(
    config: DatasetConfig, samples: Sequence[Sample], stats: DatasetStats, tags: Mapping[str, Mapping[str, int]]
) -> DatasetFacts:
    """The facts of a dataset."""
    rules = config.buckets
    return DatasetFacts(
        is_dreambooth=not any(subset.metadata_file for subset in config.subsets),
        batch_size=config.batch_size,
        num_train_images=stats.uses,
        num_reg_images=stats.reg_uses,
        resolution=rules.resolution,
        resolution_schedule=rows(config.timetable),
        enable_bucket=rules.enable_bucket,
        min_bucket_reso=rules.min_bucket_reso if rules.enable_bucket else None,
        max_bucket_reso=rules.max_bucket_reso if rules.enable_bucket else None,
        bucket_no_upscale=rules.bucket_no_upscale,
        subsets=subset_facts(config, samples),
        tag_frequency=tags,
        buckets=stats.buckets,
    )


class RunRecord:
    """Everything that the metadata of saves say about a run. `metadata` is called once per save."""

    def __init__(
        self,
        options: TrainerOptions,
        plan: RunPlan,
        datasets: Sequence[tuple[DatasetConfig, Sequence[Sample]]],
        data: TrainingData,
        model: ModelFacts,
        names: Mapping[str, str],
    ) -> None:
        self.options, self.plan, self.model = options, plan, model
        self.started_at, self.session_id = time.time(), time.time_ns() % (1 << 32)
        stats = data.stats()
        tags = [tag_frequency((sample for sample, _ in pairs), data.trained_texts) for pairs in data.trained()]
        self.datasets = tuple(dataset_facts(c, s, n, t) for (c, s), n, t in zip(datasets, stats, tags))
        self.validation_images = sum(n.validation_images for n in stats)
        self.hashes = FileHashes(names)

    def metadata(
        self, kind: str, network: NetworkFacts | None, optimizer: str, *, step: int, epoch: int
    ) -> dict[str, str]:
        """The metadata of a file of `kind` (one of ENDINGS).

        network: `Trainables.facts`; None: only modelspec.* entries.
        """
        options, model, now = changed_values(self.options, all_values=True), self.model, time.time()
        whole = kind in ("Checkpoint", "TextualInversion") and model.checkpoint_implementation is not None
        spec = SpecFacts(
            architecture=f"{model.architecture}{ENDINGS[kind]}",
            implementation=model.checkpoint_implementation or "" if whole else model.implementation,
            prediction_type=model.prediction_type,
            resolution=max((d.resolution for d in self.datasets), key=lambda r: r[0] * r[1]),
            version=VERSION,
            kind=kind,
        )
        if network is None:
            return modelspec(options, spec, self.options.metadata, now=now)
        run = RunFacts(
            options=options,
            base_model_version=model.base_model_version,
            datasets=self.datasets,
            from_dataset_config=bool(self.options.data.dataset_config),
            optimizer=optimizer,
            num_epochs=self.plan.total_epochs,
            max_train_steps=self.plan.total_steps,
            num_batches_per_epoch=math.ceil(self.plan.batches_per_epoch / self.plan.num_processes),
            num_processes=self.plan.num_processes,
            seed=self.plan.seed,
            session_id=self.session_id,
            started_at=self.started_at,
            num_validation_images=self.validation_images,
            files=self.hashes.wait(),
            network=network,
        )
        minimum = self.options.save.no_metadata
        return build_metadata(run, spec, self.options.metadata, step=step, epoch=epoch, now=now, minimum=minimum)
