# SPDX-License-Identifier: Apache-2.0
"""Training data: plans, batches, validation, regularisation, caches, and workers that change nothing."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.data import captions, images
from library.data import plan as plan_module
from library.data.dataset import TrainingData, _variant_seed
from library.data.encoding import LatentJob, Text, encoding_input
from library.data.loader import BatchLoader, Job, jobs_of
from library.data.plan import BatchPlan, Shuffle, each_shape, regularisation_repeats
from library.data.records import BucketRules, CaptionRules, DatasetConfig, ImageRules, Sample, SubsetConfig
from library.errors import EXIT_PROCESS_DIED, ProcessDied, UserError
from library.rng import derive_seed, python_rng
from library.trainers.run_plan import share_of
from library.types import Batch, Cond

BUCKETS = BucketRules((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
SIZES = ((64, 64), (100, 60), (60, 100), (80, 70), (130, 64))  # in buckets 64x64, 80x48, 48x80, 64x64 and 80x48
TAGS = "red, green, blue, white, black"


def subset_of(folder: Path, name: str, **options: object) -> SubsetConfig:
    return SubsetConfig(image_dir=str(folder / name), **options)  # type: ignore[arg-type]


def make_samples(subset: SubsetConfig, count: int, *, write: bool = True, **options: object) -> list[Sample]:
    """Pictures of random pixels in the subset's folder, of five shapes in turn."""
    folder = Path(subset.image_dir or "")
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        size, path = SIZES[i % len(SIZES)], folder / f"{folder.name}{i}.png"
        if write:
            rng = np.random.default_rng(derive_seed(folder.name, i))
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        samples.append(Sample(str(path), size, TAGS, subset, 0, 0, **options))  # type: ignore[arg-type]
    return samples


def dataset_of(*groups: list[Sample], **options: object) -> tuple[DatasetConfig, list[Sample]]:
    subsets = tuple(group[0].subset for group in groups)
    config = DatasetConfig(subsets, **{"buckets": BUCKETS, "batch_size": 3} | options)  # type: ignore[arg-type]
    return config, [sample for group in groups for sample in group]


def assert_same(left: Batch, right: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif isinstance(a, dict):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), field.name
        else:
            assert a == b, field.name


RANDOM_IMAGES = ImageRules(flip_aug=True, color_aug=True, random_crop=True)
RANDOM_CAPTIONS = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.2, token_warmup_step=6)


@pytest.fixture
def varied(tmp_path: Path) -> TrainingData:
    """Two datasets of different size and batch size, with everything that draws."""
    rules = {"images": RANDOM_IMAGES, "captions": RANDOM_CAPTIONS}
    first = make_samples(subset_of(tmp_path, "a", num_repeats=2, **rules), 7)
    second = make_samples(subset_of(tmp_path, "b", **rules), 6)
    small = {"buckets": BucketRules((32, 32)), "batch_size": 2}
    return TrainingData([dataset_of(first), dataset_of(second, **small)], seed=1)


# ---- plans


def test_plan_is_a_pure_function_of_seed_and_epoch(varied: TrainingData) -> None:
    plans = list(varied.plan_epoch(2))
    varied.plan_epoch(1)
    assert list(varied.plan_epoch(2)) == plans
    assert [plan[:3] for plan in varied.plan_epoch(1)] != [plan[:3] for plan in plans]


def test_plan_holds_every_sample_as_often_as_it_repeats(varied: TrainingData) -> None:
    for epoch in (1, 2, 3):
        plans = varied.plan_epoch(epoch)
        uses = Counter((plan.dataset, index) for plan in plans for index in plan.samples)
        assert uses == {(0, i): 2 for i in range(7)} | {(1, i): 1 for i in range(6)}
        assert [plan.position for plan in plans] == list(range(len(plans)))
        assert {plan.epoch for plan in plans} == {epoch} and not any(plan.validation for plan in plans)


def test_batches_have_one_size_and_are_full_but_for_the_last_of_a_bucket(varied: TrainingData) -> None:
    plans = list(varied.plan_epoch(1))
    sizes: dict[tuple, list[int]] = {}
    for plan in plans:
        sizes.setdefault((plan.dataset, plan.bucket), []).append(len(plan.samples))
    for (dataset, _), counts in sizes.items():
        batch_size = (3, 2)[dataset]
        assert sum(count < batch_size for count in counts) <= 1 and max(counts) <= batch_size
    assert {bucket for dataset, bucket in sizes if dataset == 1} == {(32, 32)}


def test_datasets_are_mixed(varied: TrainingData) -> None:
    orders = [[plan.dataset for plan in varied.plan_epoch(epoch)] for epoch in range(1, 9)]
    assert sum(order != sorted(order) for order in orders) > 4


def test_slices_keep_positions(varied: TrainingData) -> None:
    plans = varied.plan_epoch(1)
    assert list(plans[3:]) == list(plans)[3:]
    assert list(plans[1::2]) == list(plans)[1::2]
    assert plans[-1] == list(plans)[-1] and len(plans[100:]) == 0


def test_order_differs_between_seeds(tmp_path: Path) -> None:
    data = dataset_of(make_samples(subset_of(tmp_path, "a"), 40, write=False), batch_size=1)
    orders = [[plan.samples for plan in TrainingData([data], seed=seed).plan_epoch(1)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_epochs_count_from_one(varied: TrainingData) -> None:
    with pytest.raises(ValueError, match="count from 1"):
        varied.plan_epoch(0)


def test_stats(tmp_path: Path) -> None:
    train = make_samples(subset_of(tmp_path, "a", num_repeats=3), 5, write=False)
    reg = make_samples(subset_of(tmp_path, "r", is_reg=True, num_repeats=4), 5, write=False)
    data = TrainingData([dataset_of(train, reg)], seed=1)
    stats = data.stats()[0]
    assert (stats.images, stats.uses, stats.validation_images, stats.batch_size) == (5, 15, 0, 3)
    assert (stats.reg_images, stats.reg_uses) == (4, 16)
    assert stats.reg_unused == (reg[4].path,)
    assert stats.buckets == (((48, 80), 3 + 4), ((64, 64), 6 + 8), ((80, 48), 6 + 4))
    counted = Counter(plan.bucket for plan in data.plan_epoch(1))
    assert counted == {reso: -(-uses // 3) for reso, uses in stats.buckets}
    assert stats.batches == len(data.plan_epoch(1))


# ---- repeats without number


def test_a_computed_order_is_an_order(varied: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every use once, in the batches of the listed order, another order in each epoch and for each seed."""
    listed = varied.plan_epoch(1)
    monkeypatch.setattr(plan_module, "LISTED", 0)
    first, second = varied.plan_epoch(1), varied.plan_epoch(2)

    def uses(plans: Sequence[BatchPlan]) -> Counter:
        return Counter((plan.dataset, i) for plan in plans for i in plan.samples)

    def shapes(plans: Sequence[BatchPlan]) -> Counter:
        return Counter((plan.dataset, plan.bucket, len(plan.samples)) for plan in plans)

    assert uses(first) == uses(listed) and shapes(first) == shapes(listed)
    assert {shape[1:] for shape in shapes(listed)} == {(p.bucket, len(p.samples)) for p in each_shape(first)}
    assert [plan.position for plan in first] == list(range(len(listed)))
    assert [plan[:3] for plan in first] != [plan[:3] for plan in second] and list(first) == list(varied.plan_epoch(1))
    assert list(first[2:]) == list(first)[2:] and list(first[1::2]) == list(first)[1::2]
    for count in (1, 2, 3, 7, 64, 1000):
        shuffle = Shuffle(count, seed=count)
        assert sorted(shuffle[i] for i in range(count)) == list(range(count))


def test_a_plan_does_not_grow_with_repeats(tmp_path: Path) -> None:
    samples = make_samples(subset_of(tmp_path, "a", num_repeats=3_000_000), 5, write=False)
    reg = make_samples(subset_of(tmp_path, "r", is_reg=True), 2, write=False)
    tracemalloc.start()
    data = TrainingData([dataset_of(samples, reg)], seed=1)
    plans = data.plan_epoch(1)
    own = share_of(plans, 1, 4)
    taken = [own[i] for i in (*range(300), len(own) - 1)] + [own[1000:][0]]
    assert len(each_shape(plans)) == 3
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(plans) == data.stats()[0].batches == 10_000_000 and taken[-1] == own[1000] == plans[4001]
    counted = Counter(i for plan in taken for i in plan.samples)
    assert len(counted) == 7 and min(counted.values()) > 50


def test_more_repeats_than_can_be_counted(tmp_path: Path) -> None:
    samples = make_samples(subset_of(tmp_path, "a", num_repeats=10**30), 2, write=False)
    with pytest.raises(UserError, match="a: num_repeats is too large"):
        TrainingData([dataset_of(samples)], seed=1)


# ---- regularisation


def literal_regularisation(repeats: list[int], wanted: int) -> list[int]:
    """Image after image with its repeats, then one more use each, until there are enough."""
    used, n, first = [0] * len(repeats), 0, True
    while n < wanted and repeats:
        for i, own in enumerate(repeats):
            used[i] += own if first else 1
            n += own if first else 1
            if n >= wanted:
                break
        first = False
    return used


@pytest.mark.parametrize("repeats", [[1, 1, 1], [2, 2, 2], [3], [1, 5, 2, 1], [], [4, 4, 4, 4]])
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 7, 8, 9, 10, 23])
def test_regularisation_repeats(repeats: list[int], wanted: int) -> None:
    found = regularisation_repeats(np.array(repeats, dtype=np.int64), wanted)
    assert found.tolist() == literal_regularisation(repeats, wanted)


def test_regularisation_images_match_the_training_images_and_carry_their_weight(tmp_path: Path) -> None:
    train = make_samples(subset_of(tmp_path, "a", num_repeats=4), 3)
    reg = make_samples(subset_of(tmp_path, "r", is_reg=True), 5)
    data = TrainingData([dataset_of(train, reg)], seed=1, prior_loss_weight=0.25)
    weights: Counter = Counter()
    for plan in data.plan_epoch(1):
        batch = data.load(plan, step=0)
        for name, weight in zip(batch.names, batch.loss_weights.tolist()):
            weights[Path(name).parent.name, weight] += 1
    assert weights == {("a", 1.0): 12, ("r", 0.25): 12}


# ---- batches


def test_batch_contents(tmp_path: Path) -> None:
    subset = subset_of(tmp_path, "a", custom_attributes={"diff_output_preservation": True})
    samples = make_samples(subset, 1) + make_samples(subset_of(tmp_path, "b"), 1)
    config = DatasetConfig((subset, samples[1].subset), BUCKETS, batch_size=2, network_multiplier=0.5)
    data = TrainingData([(config, samples)], seed=1)
    batch = data.load(BatchPlan(0, (64, 64), (0, 1), 1, 0), step=0)
    assert batch.names == [sample.path for sample in samples] and batch.captions == [TAGS, TAGS]
    assert batch.pixels is not None and batch.pixels.dtype == torch.float32 and batch.pixels.shape == (2, 3, 64, 64)
    pixels = images.load_image(samples[0].path, alpha=False).rgb  # 64x64 already
    assert np.array_equal(((batch.pixels[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8), pixels)
    assert batch.pixels.min() == -1.0 and batch.pixels.max() == 1.0
    assert batch.latent_seeds == [derive_seed("vae", "a0.png", 0), derive_seed("vae", "b0.png", 0)]
    assert batch.keep_prior == [True, False] and batch.network_multiplier == 0.5
    assert batch.masks is None and batch.cond is None and batch.latents is None
    for sizes in (batch.original_sizes, batch.target_sizes):
        assert sizes is not None and sizes.tolist() == [[64.0, 64.0]] * 2


def test_sizes_are_height_then_width(tmp_path: Path) -> None:
    data = TrainingData([dataset_of(make_samples(subset_of(tmp_path, "a"), 2))], seed=1)
    plan = next(plan for plan in data.plan_epoch(1) if plan.samples == (1,))  # 100x60
    assert plan.bucket == (80, 48)
    batch = data.load(plan, step=0)
    assert batch.pixels is not None and batch.original_sizes is not None and batch.target_sizes is not None
    assert batch.original_sizes.tolist() == [[60.0, 100.0]]
    assert batch.target_sizes.tolist() == [[plan.bucket[1], plan.bucket[0]]]
    assert batch.pixels.shape[2:] == (plan.bucket[1], plan.bucket[0])


def test_draws_follow_seed_epoch_and_position(varied: TrainingData) -> None:
    plan = varied.plan_epoch(2)[1]
    batch = varied.load(plan, step=3)
    sample_rules = RANDOM_CAPTIONS
    for place in range(batch.size):
        rng = python_rng(1, "caption", 2, plan.position, place)
        assert batch.captions[place] == captions.final_caption(TAGS, sample_rules, rng, epoch=2, step=3, total_steps=0)
        rng = python_rng(1, "augment", 2, plan.position, place)
        flipped = rng.random() < 0.5
        assert batch.latent_seeds[place] == derive_seed("vae", Path(batch.names[place]).name, int(flipped))
    assert_same(varied.load(plan, step=3), batch)


def test_masks_of_a_batch(tmp_path: Path) -> None:
    """A masked sample beside one without a mask, which counts everywhere."""
    plain = make_samples(subset_of(tmp_path, "a"), 1)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.repeat([[0], [255]], 32, axis=0).repeat(64, axis=1).astype(np.uint8)).save(
        tmp_path / "masks/m.png"
    )
    masked = make_samples(subset_of(tmp_path, "b"), 1, mask_path=str(tmp_path / "masks/m.png"))
    datasets = [dataset_of(plain, masked)]
    plan = BatchPlan(0, (64, 64), (0, 1), 1, 0)
    assert TrainingData(datasets, seed=1).load(plan, step=0).masks is None
    masks = TrainingData(datasets, seed=1, masked_loss=True).load(plan, step=0).masks
    assert masks is not None and masks.shape == (2, 1, 64, 64) and masks.dtype == torch.float32
    assert masks[0].min() == 1.0 and masks[1, 0, :32].max() == 0.0 and masks[1, 0, 32:].min() == 1.0


def test_alpha_mask_needs_no_masked_loss(tmp_path: Path) -> None:
    samples = make_samples(subset_of(tmp_path, "a", images=ImageRules(alpha_mask=True)), 1)
    pixels = np.dstack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 51, np.uint8)])
    Image.fromarray(pixels).save(samples[0].path)
    masks = TrainingData([dataset_of(samples)], seed=1).load(BatchPlan(0, (64, 64), (0,), 1, 0), step=0).masks
    assert masks is not None and torch.equal(masks, torch.full((1, 1, 64, 64), 0.2))


# ---- workers


@pytest.fixture
def reference(varied: TrainingData) -> list[Batch]:
    return [varied.load(plan, step=3 + i // 2) for i, plan in enumerate(varied.plan_epoch(1))]


@pytest.mark.parametrize("ways", [{}, {"workers": 1}, {"workers": 2}, {"in_thread": True}], ids=str)
def test_workers_change_nothing(varied: TrainingData, reference: list[Batch], ways: dict[str, Any]) -> None:
    plans = varied.plan_epoch(1)
    with BatchLoader(varied, **ways) as loader:
        batches = list(loader.run(jobs_of(plans, step_of_first=3, accumulation=2)))
        middle = list(loader.run(jobs_of(plans[4:], step_of_first=5, accumulation=2)))
    assert len(batches) == len(reference) == len(plans) and len(middle) == len(plans) - 4
    for batch, expected in zip(batches + middle, reference + reference[4:]):
        assert_same(batch, expected)
    assert multiprocessing.active_children() == []


def test_position_in_the_run_counts_through_all_epochs(varied: TrainingData) -> None:
    """What noise, timesteps and dropout are keyed by: the same whichever process loads the batch."""
    count = len(varied.plan_epoch(1))
    for world in (1, 2, 3):
        found = [
            varied.load(plan, step=0).position
            for epoch in (1, 2)
            for rank in range(world)
            for plan in varied.plan_epoch(epoch)[rank::world]
        ]
        assert sorted(found) == list(range(2 * count))


def test_workers_serve_all_epochs(varied: TrainingData, reference: list[Batch]) -> None:
    """They are asked for batches of the next epoch before the last one of this epoch is used."""
    asked: list[int] = []

    def jobs() -> Iterator[Job]:
        for epoch in (1, 2):
            asked.append(epoch)
            first_step, accumulation = (3, 2) if epoch == 1 else (0, 1)
            yield from jobs_of(varied.plan_epoch(epoch), step_of_first=first_step, accumulation=accumulation)

    with varied.loader(workers=2) as loader:
        run = loader.run(jobs())
        first = [next(run)]
        pids = {child.pid for child in multiprocessing.active_children()}
        first += [next(run) for _ in reference[2:]]
        assert asked == [1, 2]
        first.append(next(run))
        second = list(run)
    assert len(pids) == 2 and multiprocessing.active_children() == []
    for batch, expected in zip(first, reference, strict=True):
        assert_same(batch, expected)
    assert_same(second[2], varied.load(varied.plan_epoch(2)[2], step=2))


def test_workers_end_when_a_run_is_left(varied: TrainingData) -> None:
    with varied.loader(workers=2) as loader:
        for _ in loader.run(jobs_of(varied.plan_epoch(1))):
            assert len(multiprocessing.active_children()) == 2
            break
        assert multiprocessing.active_children() == []
        with pytest.raises(RuntimeError, match="boom"):
            for _ in loader.run(jobs_of(varied.plan_epoch(1))):
                raise RuntimeError("boom")
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups of that kind")
def test_signals_to_workers(
    varied: TrainingData, reference: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends a process group leaves them alone; one that is killed ends the run with one line and its own code.

    What it had in the folder for temporary files is this process's to remove.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    before = signal.getsignal(signal.SIGCHLD)
    with (
        varied.loader(workers=2) as loader,
        pytest.raises(ProcessDied, match=r"killed \(SIGKILL\): .*main memory") as told,
    ):
        run = loader.run(jobs_of(varied.plan_epoch(1), step_of_first=3, accumulation=2))
        assert_same(next(run), reference[0])
        assert signal.getsignal(signal.SIGCHLD) == before
        workers = multiprocessing.active_children()
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(worker.pid, number)
        assert_same(next(run), reference[1])
        assert multiprocessing.active_children() == workers
        for worker in workers:
            worker.kill()
        list(run)
    assert [str(path) for path in tmp_path.glob("pymp-*")] == [get_temp_dir()]
    assert told.value.code == EXIT_PROCESS_DIED


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(varied: TrainingData, workers: int) -> None:
    """Where the dropout of a network draws from them, a resumed run must find them as they were."""
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    with varied.loader(workers=workers) as loader:
        list(loader.run(jobs_of(varied.plan_epoch(1))))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before[1:]


def test_one_run_at_a_time(varied: TrainingData) -> None:
    with varied.loader() as loader:
        run = loader.run(jobs_of(varied.plan_epoch(1)))
        next(run)
        with pytest.raises(ValueError, match="in progress"):
            next(loader.run(jobs_of(varied.plan_epoch(1))))
        run.close()
        next(loader.run(jobs_of(varied.plan_epoch(1))))
    with pytest.raises(ValueError, match="closed"):
        next(loader.run(jobs_of(varied.plan_epoch(1))))


@pytest.mark.parametrize("ways", [{}, {"workers": 2}, {"in_thread": True}], ids=str)
def test_unreadable_picture_is_one_line(varied: TrainingData, tmp_path: Path, ways: dict[str, Any]) -> None:
    (tmp_path / "a" / "a0.png").write_bytes(b"gone")
    with BatchLoader(varied, **ways) as loader, pytest.raises(UserError) as caught:
        list(loader.run(jobs_of(varied.plan_epoch(1))))
    reason = "cannot be read as a picture (not in a picture format, or empty)"
    assert caught.value.problems == [f"{tmp_path / 'a' / 'a0.png'}: {reason}"]


def test_data_survives_a_pickle(varied: TrainingData) -> None:
    """Platforms without fork send the data to their workers this way."""
    copied = pickle.loads(pickle.dumps(varied))
    plan = varied.plan_epoch(1)[0]
    assert copied.plan_epoch(1)[0] == plan
    assert_same(copied.load(plan, step=0), varied.load(plan, step=0))


def test_token_warmup_follows_the_step(tmp_path: Path) -> None:
    rules = CaptionRules(token_warmup_step=0.5, token_warmup_min=1)
    samples = make_samples(subset_of(tmp_path, "a", captions=rules), 1)
    data = TrainingData([dataset_of(samples)], seed=1).prepared(total_steps=8)
    plans = [data.plan_epoch(epoch)[0] for epoch in range(1, 7)]
    with data.loader() as loader:
        lengths = [len(batch.captions[0].split(", ")) for batch in loader.run(jobs_of(plans))]
        later = loader.run(jobs_of(plans, step_of_first=3, accumulation=3))
        late = [len(batch.captions[0].split(", ")) for batch in later]
    assert lengths == [1, 2, 3, 4, 5, 5]  # 1 + step (5 - 1) / 4
    assert late == [4, 4, 4, 5, 5, 5]


# ---- validation


def test_validation_is_split_off_per_subset_and_never_varies(tmp_path: Path) -> None:
    rules = {"images": RANDOM_IMAGES, "captions": dataclasses.replace(RANDOM_CAPTIONS, caption_dropout_rate=1.0)}
    first = make_samples(subset_of(tmp_path, "a", num_repeats=3, **rules), 10)
    second = make_samples(subset_of(tmp_path, "b", **rules), 5)
    reg = make_samples(subset_of(tmp_path, "r", is_reg=True), 5)
    split = {"validation_split": 0.2, "validation_seed": 7}
    data = TrainingData([dataset_of(first, second, reg, **split)], seed=1)
    everything = first + second + reg

    held_out = [everything[i].path for plan in data.validation_plans() for i in plan.samples]
    expected = [first[i].path for i in captions.split_validation(10, 0.2, 7)[1]]
    expected += [second[i].path for i in captions.split_validation(5, 0.2, 7)[1]]
    assert sorted(held_out) == sorted(expected) and len(held_out) == 3
    trained = Counter(everything[i].path for plan in data.plan_epoch(1) for i in plan.samples)
    assert not set(trained) & set(held_out)
    assert trained[next(s.path for s in first if s.path not in held_out)] == 3
    assert data.stats()[0].validation_images == 3 and data.stats()[0].uses == 8 * 3 + 4

    plans = list(data.validation_plans())
    assert all(plan.validation and plan.epoch == 0 for plan in plans)
    other = TrainingData([dataset_of(first, second, reg, **split)], seed=99)
    for plan in plans:
        batch = data.load(plan, step=0)
        assert_same(batch, other.load(plan, step=1000))
        assert batch.captions == [TAGS] * batch.size


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 13, 25])
@pytest.mark.parametrize("split", [0.01, 0.1, 0.2, 1 / 3, 0.5, 0.66])
def test_no_picture_is_trained_and_validated(tmp_path: Path, count: int, split: float) -> None:
    """In one dataset or several, by whatever name of its folder, with repeats, seeds and regularisation."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    subset = subset_of(tmp_path, "a", num_repeats=3)
    samples = make_samples(subset, count, write=False)
    linked = [dataclasses.replace(s, path=s.path.replace("/a/", "/link/")) for s in samples[: count // 2 + 1]]
    again = subset_of(tmp_path, "link", num_repeats=2)
    linked = [dataclasses.replace(sample, subset=again) for sample in linked]
    reg = subset_of(tmp_path, "a", is_reg=True)
    others = make_samples(subset_of(tmp_path, "b"), 30, write=False)
    data = TrainingData(
        [
            dataset_of(samples, linked, others, validation_split=split),
            dataset_of(samples, others, validation_split=split, validation_seed=5, buckets=BucketRules((32, 32))),
            dataset_of(linked, others, [dataclasses.replace(sample, subset=reg) for sample in samples]),
        ],
        seed=count,
    )
    used = [(sample.path.replace("/link/", "/a/"), validation) for _, sample, validation in data._used_samples()]
    trained, held = ({path for path, validation in used if validation == kind} for kind in (False, True))
    assert not trained & held and len(trained | held) == count + 30
    assert {sample.path.replace("/link/", "/a/") for pairs in data.trained() for sample, _ in pairs} == trained


def test_validation_seed_defaults_to_the_run_seed(tmp_path: Path) -> None:
    samples = make_samples(subset_of(tmp_path, "a"), 20, write=False)

    def held_out(seed: int) -> set[int]:
        data = TrainingData([dataset_of(samples, validation_split=0.5)], seed=seed)
        return {i for plan in data.validation_plans() for i in plan.samples}

    assert held_out(3) == set(captions.split_validation(20, 0.5, 3)[1]) != held_out(4)


# ---- caches


class Pooled:
    """A cache of "latents": pictures averaged over 8x8 pixels, filled from the encoding jobs, read-only afterwards."""

    def __init__(self, jobs: list[LatentJob], *, masked_loss: bool = False) -> None:
        self.items = {}
        for job in jobs:
            encoded = encoding_input(job, masked_loss=masked_loss)
            mask = None if encoded.mask is None else torch.nn.functional.avg_pool2d(encoded.mask, 8)
            latent = torch.nn.functional.avg_pool2d(encoded.pixels, 8)
            self.items[job.sample.path, job.bucket, job.flipped] = (latent, mask, encoded.seed)

    def get(self, job: LatentJob) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.items[job.sample.path, job.bucket, job.flipped][:2]


class Lengths:
    """A cache of "text outputs": as many ones as the caption has characters."""

    def __init__(self, texts: list[Text]) -> None:
        self.items = {text: {"hidden": torch.ones(len(text.caption))} for text in texts}

    def get(self, text: Text) -> Cond:
        return self.items[text]


def pad(conds: list[Cond]) -> Cond:
    return {"hidden": torch.nn.utils.rnn.pad_sequence([cond["hidden"] for cond in conds], batch_first=True)}


def test_cached_latents_are_those_of_the_uncached_pixels(tmp_path: Path) -> None:
    subset = subset_of(tmp_path, "a", images=ImageRules(flip_aug=True, alpha_mask=True), num_repeats=2)
    samples = make_samples(subset, 10)
    for sample in samples[::2]:
        with Image.open(sample.path) as image:
            image.putalpha(image.convert("L"))
            image.save(sample.path)
    data = TrainingData([dataset_of(samples, validation_split=0.2)], seed=1)
    jobs = data.encoding_jobs()
    assert len(jobs) == len({(job.sample.path, job.flipped) for job in jobs}) == 8 * 2 + 2
    cache = Pooled(jobs)
    cached = data.prepared(latents=cache)
    flips = set()
    for plan in [*data.plan_epoch(1), *data.plan_epoch(2), *data.validation_plans()]:
        batch, expected = cached.load(plan, step=0), data.load(plan, step=0)
        assert batch.pixels is None and batch.latents is not None and expected.pixels is not None
        assert torch.equal(batch.latents, torch.nn.functional.avg_pool2d(expected.pixels, 8))
        assert (batch.masks is None) == (expected.masks is None)
        if batch.masks is not None and expected.masks is not None:
            assert torch.equal(batch.masks, torch.nn.functional.avg_pool2d(expected.masks, 8))
        assert_same(
            dataclasses.replace(batch, latents=None, masks=None), dataclasses.replace(expected, pixels=None, masks=None)
        )
        known = {(name, seed): flipped for (name, _, flipped), (_, _, seed) in cache.items.items()}
        flips |= {known[key] for key in zip(batch.names, batch.latent_seeds)}
    assert flips == {False, True}


def test_cached_texts_cover_every_epoch(tmp_path: Path) -> None:
    rules = CaptionRules(shuffle_caption=True, caption_dropout_rate=0.2, caption_tag_dropout_rate=0.3, keep_tokens=1)
    varying = make_samples(subset_of(tmp_path, "a", captions=rules), 6)
    fixed = make_samples(subset_of(tmp_path, "b", captions=CaptionRules(caption_prefix="P")), 2)
    data = TrainingData([dataset_of(varying, fixed, validation_split=0.5)], seed=1, text_variants=4)
    texts = [text.caption for text in dict.fromkeys(data.texts_of())]
    assert len(texts) == len(set(texts)) <= 3 * 4 + 3
    assert {"", TAGS, f"P {TAGS}"} <= set(texts)  # dropped; of the validation; without variants
    cached = data.prepared(texts=Lengths([*data.texts_of()]), join=pad)
    seen = set()
    for epoch in range(1, 30):
        for plan in cached.plan_epoch(epoch):
            batch = cached.load(plan, step=0)
            assert batch.cond is not None
            assert batch.cond["hidden"].sum(1).tolist() == [len(text) for text in batch.captions]
            seen |= set(batch.captions)
    for plan in cached.validation_plans():
        seen |= set(cached.load(plan, step=0).captions)
    assert seen == set(texts)


def test_cached_texts_come_as_often_as_uncached_ones(tmp_path: Path) -> None:
    """Four lines and a dropout of the whole caption, where fewer variants are kept than there are outcomes."""
    rules = CaptionRules(enable_wildcard=True, shuffle_caption=True, keep_tokens=1, caption_dropout_rate=0.2)
    text = "l0, a, b, c, d\nl1\nl2, {a|b|c|d}, e, f\nl1"
    samples = make_samples(subset_of(tmp_path, "a", captions=rules, num_repeats=8), 25)
    samples = [dataclasses.replace(sample, caption=text) for sample in samples]
    data = TrainingData([dataset_of(samples, batch_size=25)], seed=1, text_variants=8)
    cached = data.prepared(texts=Lengths([*data.texts_of()]), join=pad)
    for source in (data, cached):
        lines: Counter[str] = Counter()
        for epoch in range(1, 6):
            for plan in source.plan_epoch(epoch):
                found = [source._caption(samples[i], plan, place, 0) for place, i in enumerate(plan.samples)]
                lines.update(caption.split(", ")[0] for caption in found)
        for line, share in {"": 0.2, "l0": 0.2, "l1": 0.4, "l2": 0.2}.items():
            assert lines[line] / lines.total() == pytest.approx(share, abs=0.05)
    for sample in samples:  # no line is missing for any picture
        variants = captions.caption_variants(text, rules, 8, _variant_seed(sample))
        assert {variant.split(", ")[0] for variant in variants} == {"l0", "l1", "l2"}


def test_caches_refuse_what_they_cannot_serve(tmp_path: Path) -> None:
    rules = {"images": ImageRules(random_crop=True), "captions": CaptionRules(token_warmup_step=5)}
    samples = make_samples(subset_of(tmp_path, "a", **rules), 1)
    data = TrainingData([dataset_of(samples)], seed=1)
    assert data.cache_problems(latents=False, texts=False) == []
    both = data.cache_problems(latents=True, texts=True)
    assert len(both) == 2 and "random_crop" in both[0] and "token_warmup_step" in both[1]
    assert all(line.startswith(f"subset {tmp_path / 'a'}: ") for line in both)
    with pytest.raises(UserError, match="token_warmup_step"):
        data.prepared(texts=Lengths([]), join=pad)


# ---- bad input


def test_all_pictures_without_a_bucket_are_named_at_once(tmp_path: Path) -> None:
    narrow = BucketRules((64, 64), enable_bucket=True, bucket_no_upscale=True)
    datasets = []
    for name in "ab":
        samples = make_samples(subset_of(tmp_path, name), 2, write=False)
        samples[1] = dataclasses.replace(samples[1], size=(500, 20))
        datasets.append(dataset_of(samples, buckets=narrow))
    with pytest.raises(UserError) as caught:
        TrainingData(datasets, seed=1)
    assert [Path(problem.split(":")[0]).name for problem in caught.value.problems] == ["a1.png", "b1.png"]


@pytest.mark.parametrize(
    ("subset", "options"),
    [({"is_reg": True}, {}), ({"num_repeats": 0}, {}), ({}, {"validation_split": 1.0})],
)
def test_no_training_picture_left(tmp_path: Path, subset: dict, options: dict) -> None:
    samples = make_samples(subset_of(tmp_path, "a", **subset), 4, write=False)
    with pytest.raises(UserError, match="no training picture is left"):
        TrainingData([dataset_of(samples, **options)], seed=1)
