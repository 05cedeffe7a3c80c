# SPDX-License-Identifier: Apache-2.0
"""The latent cache: only what changed is encoded again, and a cached run sees what an uncached one would."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.data.buckets import Bucket
from library.data.caches import legacy_npz, store
from library.data.caches.latent_cache import LatentCache, LatentFolders
from library.data.caches.share import Share, Shares
from library.data.dataset import TrainingData
from library.data.encoding import LatentJob, encoding_input, latent_seed
from library.data.file_hashes import FileHashes, FileState, state_of
from library.data.records import BucketRules, DatasetConfig, ImageRules, Sample, SubsetConfig
from library.errors import UserError
from library.rng import derive_seed, torch_generator
from library.types import LatentSpec
from library.weights import kl_vae
from tests.damage import damaged_copies
from tests.data.test_store import small_disk  # noqa: F401 - a fixture

SPEC = LatentSpec("sd", channels=4, factor=8, npz_suffix="_sd.npz")
SIZED = LatentSpec("flux", channels=4, factor=8, npz_suffix="_flux.npz", npz_sized_keys=True)
PLAIN = ImageRules()
FORK = multiprocessing.get_context("fork")
AN_HOUR_AGO = time.time_ns() - 3600 * 10**9


def tiny_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(derive_seed("tiny vae"))
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.18215,
    )
    return vae.eval()


class Encoder:
    """Stands for a VAE: mean of 8x8 pixels, first channel twice, plus noise from the seed. Counts what it encodes."""

    def __init__(self) -> None:
        self.count = 0
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor, seeds: list[int]) -> Tensor:
        assert pixels.dtype == torch.float32 and len(seeds) == len(pixels)
        self.count += len(pixels)
        self.batches.append(len(pixels))
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        small = torch.cat([small, small[:, :1]], 1)
        noise = [torch.randn(small.shape[1:], generator=torch_generator("posterior", seed)) for seed in seeds]
        return small + 0.1 * torch.stack(noise)


def make_picture(path: Path, seed: int, size: tuple[int, int] = (64, 48), alpha: bool = False) -> None:
    """A picture of noise, written an hour ago."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 4 if alpha else 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(AN_HOUR_AGO, AN_HOUR_AGO))


def sample_of(path: Path, subset: SubsetConfig, **values: object) -> Sample:
    stat = path.stat()
    with Image.open(path) as image:
        size = image.size
    return Sample(str(path), size, "", subset, stat.st_mtime_ns, stat.st_size, **values)  # type: ignore[arg-type]


def make_samples(folder: Path, count: int, rules: ImageRules = PLAIN, alpha: bool = False) -> list[Sample]:
    folder.mkdir(exist_ok=True)
    subset = SubsetConfig(str(folder), images=rules)
    for number in range(count):
        make_picture(folder / f"{number}.png", number, (64, 48) if number % 3 else (48, 64), alpha)
    return [sample_of(folder / f"{number}.png", subset) for number in range(count)]


def jobs_of(samples: list[Sample]) -> list[LatentJob]:
    flips = (False, True)
    return [
        LatentJob(s, Bucket(s.size, s.size), f) for s in samples for f in flips if s.subset.images.flip_aug or not f
    ]


def make_cache(spec: LatentSpec = SPEC, **values: object) -> LatentCache:
    settings = {"vae_fingerprint": "vae1", "dtype": torch.float32} | values
    return LatentCache(settings.pop("folders", LatentFolders()), spec, **settings)  # type: ignore[arg-type]


def expected(job: LatentJob, masked_loss: bool = False) -> Tensor:
    item = encoding_input(job, masked_loss=masked_loss)
    return Encoder()(item.pixels[None], [item.seed])[0]


def assert_cached(cache: LatentCache, jobs: list[LatentJob]) -> None:
    for job in jobs:
        assert torch.equal(cache.get(job)[0], expected(job).to(cache.dtype)), job.sample.path


# ---- what is encoded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_fill_and_get(tmp_path: Path, disk: bool, batch_size: int) -> None:
    jobs = jobs_of(make_samples(tmp_path, 7, ImageRules(flip_aug=True)))
    cache, encoder = make_cache(folders=LatentFolders(disk=disk)), Encoder()
    assert cache.missing(jobs) == jobs
    assert cache.fill(jobs, encoder, batch_size=batch_size, workers=2) == encoder.count == 14
    assert max(encoder.batches) == batch_size
    assert_cached(cache, jobs)
    assert cache.missing(jobs) == [] and cache.fill(jobs, encoder, batch_size=1) == 0
    assert (tmp_path / ".trainyard" / "latents" / "index.sqlite").exists() == disk
    if disk:
        assert make_cache().missing(jobs) == []
        assert_cached(make_cache(), jobs)
        assert_cached(pickle.loads(pickle.dumps(make_cache())), jobs)


def test_cache_dir_and_dtype(tmp_path: Path) -> None:
    jobs = jobs_of(make_samples(tmp_path / "pictures", 3))
    cache = make_cache(folders=LatentFolders(str(tmp_path / "cache")), dtype=torch.bfloat16)
    cache.fill(jobs, Encoder(), batch_size=2)
    assert cache.get(jobs[0])[0].dtype == torch.bfloat16
    assert_cached(cache, jobs)
    assert not (tmp_path / "pictures" / ".trainyard").exists()


def test_a_cached_run_equals_an_uncached_one(tmp_path: Path) -> None:
    """The same batches, through the real VAE, with and without the cache; masks at latent resolution."""
    vae = tiny_vae().requires_grad_(False)
    rules = ImageRules(flip_aug=True, alpha_mask=True)
    samples = make_samples(tmp_path, 5, rules, alpha=True)
    config = DatasetConfig((samples[0].subset,), BucketRules((64, 64), enable_bucket=True, min_bucket_reso=32), 1)
    data = TrainingData([(config, samples)], seed=3)

    def encode(pixels: Tensor, seeds: list[int]) -> Tensor:
        return kl_vae.encode(vae, pixels, seeds)

    cache = make_cache()
    assert cache.fill(data.encoding_jobs(), encode, batch_size=1, workers=2) == 10
    cached = data.prepared(latents=make_cache())
    flips = set()
    for epoch in (1, 2, 3):
        for plan in data.plan_epoch(epoch):
            plain, kept = data.load(plan, step=0), cached.load(plan, step=0)
            assert plain.pixels is not None and plain.masks is not None and kept.latents is not None
            assert kept.pixels is None and plain.latent_seeds == kept.latent_seeds
            assert torch.equal(kept.latents, kl_vae.encode(vae, plain.pixels, plain.latent_seeds))
            small = torch.nn.functional.interpolate(plain.masks, size=kept.latents.shape[-2:], mode="area")
            assert kept.masks is not None and torch.allclose(kept.masks, small, atol=2**-11)
            assert plain.crop_top_lefts is not None and kept.crop_top_lefts is not None
            assert torch.equal(plain.crop_top_lefts, kept.crop_top_lefts)
            flips.add(plain.latent_seeds[0] == latent_seed(samples[0], True))
    assert len(flips) == 2


def test_what_changes_the_key(tmp_path: Path) -> None:
    (sample,) = make_samples(tmp_path, 1)
    job = LatentJob(sample, Bucket((48, 64), (48, 64)), False)
    make_cache().fill([job], Encoder(), batch_size=1)

    def with_rules(**values: object) -> LatentJob:
        rules = replace(sample.subset.images, **values)  # type: ignore[arg-type]
        return job._replace(sample=replace(sample, subset=replace(sample.subset, images=rules)))

    assert make_cache().missing([job]) == []
    changed = [
        (make_cache(vae_fingerprint="vae2"), job),
        (make_cache(dtype=torch.float16), job),
        (make_cache(replace(SPEC, name="sdxl")), job),
        (make_cache(), job._replace(flipped=True)),
        (make_cache(), job._replace(bucket=Bucket((48, 56), (48, 64)))),
        (make_cache(), job._replace(bucket=Bucket((48, 64), (54, 72)))),
        (make_cache(), with_rules(alpha_mask=True)),
        (make_cache(), with_rules(resize_interpolation="nearest")),
    ]
    for cache, other in changed:
        assert cache.missing([other]) == [other]
    assert make_cache().missing([with_rules(flip_aug=True)]) == []  # the plain one is not encoded again


def test_an_edited_picture_is_encoded_alone(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 6)
    make_cache().fill(jobs_of(samples), Encoder(), batch_size=2)
    path = Path(samples[2].path)
    make_picture(path, 99)
    os.utime(path)
    samples[2] = sample_of(path, samples[2].subset)
    cache, encoder = make_cache(), Encoder()
    assert [job.sample.path for job in cache.missing(jobs_of(samples))] == [str(path)]
    assert cache.fill(jobs_of(samples), encoder, batch_size=2) == encoder.count == 1
    assert_cached(cache, jobs_of(samples))
    assert make_cache().missing(jobs_of(samples)) == []


def test_same_size_other_content(tmp_path: Path) -> None:
    """BMP: the file keeps its size when the picture changes."""
    subset = SubsetConfig(str(tmp_path))
    path = tmp_path / "a.bmp"
    make_picture(path, 1)
    before = sample_of(path, subset)
    make_cache().fill(jobs_of([before]), Encoder(), batch_size=1)
    make_picture(path, 2)
    os.utime(path, ns=(AN_HOUR_AGO + 10, AN_HOUR_AGO + 10))
    after = sample_of(path, subset)
    assert before.file_size == after.file_size
    assert make_cache().fill(jobs_of([after]), Encoder(), batch_size=1) == 1
    assert_cached(make_cache(), jobs_of([after]))


def test_a_touched_or_moved_picture_is_not_encoded_again(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 2)
    make_cache().fill(jobs_of(samples), Encoder(), batch_size=1)
    os.utime(samples[0].path)
    os.makedirs(tmp_path / "sub")
    moved = tmp_path / "sub" / "1.png"
    os.rename(samples[1].path, moved)
    again = [sample_of(Path(samples[0].path), samples[0].subset), sample_of(moved, samples[1].subset)]
    assert make_cache().missing(jobs_of(again)) == []


def test_an_edited_mask_is_noticed(tmp_path: Path) -> None:
    (sample,) = make_samples(tmp_path, 1)
    mask = tmp_path / "mask.bmp"
    make_picture(mask, 5, (48, 64))
    job = jobs_of([replace(sample, mask_path=str(mask))])[0]
    cache = make_cache(masked_loss=True)
    cache.fill([job], Encoder(), batch_size=1)
    item = encoding_input(job, masked_loss=True)
    assert item.mask is not None
    blocks = item.mask[0].reshape(8, 8, 6, 8).mean((1, 3))
    found = cache.get(job)[1]
    assert found is not None and found.dtype == torch.float32 and found.shape == (1, 8, 6)
    assert torch.allclose(found[0], blocks, atol=2**-11)
    make_picture(mask, 6, (48, 64))
    os.utime(mask)
    assert make_cache(masked_loss=True).missing([job]) == [job]
    assert make_cache(masked_loss=False).missing([job]) == [job]


def test_two_masks_of_one_picture(tmp_path: Path) -> None:
    """Two subsets may train the same picture with a mask each."""
    (sample,) = make_samples(tmp_path, 1)
    masks = [tmp_path / "first.bmp", tmp_path / "second.bmp"]
    for seed, mask in enumerate(masks, start=5):
        make_picture(mask, seed, (48, 64))
    jobs = [jobs_of([replace(sample, mask_path=str(mask))])[0] for mask in masks]
    cache = make_cache(masked_loss=True)
    cache.fill(jobs, Encoder(), batch_size=1)
    for job in jobs:
        item = encoding_input(job, masked_loss=True)
        found = cache.get(job)[1]
        assert item.mask is not None and found is not None
        assert torch.allclose(found[0], item.mask[0].reshape(8, 8, 6, 8).mean((1, 3)), atol=2**-10)


def test_a_restart_reads_no_picture(tmp_path: Path) -> None:
    jobs = jobs_of(make_samples(tmp_path, 3))
    make_cache().fill(jobs, Encoder(), batch_size=1)
    for job in jobs:
        os.rename(job.sample.path, job.sample.path + ".away")
    cache = make_cache()
    assert cache.missing(jobs) == []
    assert cache.get(jobs[0])[0].shape == (4, 8, 6)


def test_skip_check_trusts_paths(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 2)
    make_cache().fill(jobs_of(samples), Encoder(), batch_size=1)
    make_picture(Path(samples[0].path), 50, samples[0].size)
    os.utime(samples[0].path)
    edited = [sample_of(Path(s.path), s.subset) for s in samples]
    assert make_cache(skip_check=True).missing(jobs_of(edited)) == []
    assert make_cache(skip_check=True).get(jobs_of(edited)[0])[0].shape == (4, 8, 6)
    assert len(make_cache().missing(jobs_of(edited))) == 1


# ---- damage and errors -----------------------------------------------------------------------------------------------


def test_damaged_records_are_said_once_and_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = jobs_of(make_samples(tmp_path, 5))
    make_cache().fill(jobs, Encoder(), batch_size=1)
    (shard,) = (tmp_path / ".trainyard" / "latents").glob("*.bin")
    with open(shard, "r+b") as file:
        file.write(b"damage")
    cache, encoder = make_cache(), Encoder()
    assert len(cache.missing(jobs)) == 1
    assert cache.fill(jobs, encoder, batch_size=2) == 1
    assert len(caplog.records) == 1 and "1 cached latents are damaged and encoded again: /" in caplog.text
    assert_cached(make_cache(), jobs)


def test_damage_after_the_start_is_named(tmp_path: Path) -> None:
    jobs = jobs_of(make_samples(tmp_path, 2))
    cache = make_cache()
    cache.fill(jobs, Encoder(), batch_size=1)
    (shard,) = (tmp_path / ".trainyard" / "latents").glob("*.bin")
    os.truncate(shard, 10)
    with pytest.raises(UserError, match=r"1\.png: its cached latents are missing or damaged"):
        cache.get(jobs[1])


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    jobs = jobs_of(make_samples(tmp_path, 4))

    def encode(pixels: Tensor, seeds: list[int]) -> Tensor:
        latents = Encoder()(pixels, seeds)
        latents[seeds.index(latent_seed(jobs[2].sample, False)), 0, 0, 0] = float("nan")
        return latents

    portrait = [job for job in jobs if job.bucket == jobs[2].bucket]
    with pytest.raises(UserError, match=r"not finite for [^ ]*2\.png: use --no_half_vae"):
        make_cache().fill(portrait, encode, batch_size=2)
    assert make_cache().missing(portrait) == [jobs[2]]  # the good one of the batch was kept


def test_a_picture_that_cannot_be_read_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 6)
    Path(samples[4].path).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"4\.png"):
        make_cache().fill(jobs_of(samples), Encoder(), batch_size=1)
    assert len(make_cache().missing(jobs_of(samples))) < 6


def test_no_space_is_said_before_encoding(tmp_path: Path) -> None:
    jobs = jobs_of(make_samples(tmp_path, 2))
    encoder = Encoder()
    huge = LatentSpec("sd", channels=10**13, factor=8, npz_suffix="")
    with pytest.raises(UserError, match=r"no space for the cache in .*needed"):
        make_cache(huge).fill(jobs, encoder, batch_size=1)
    assert encoder.count == 0


@pytest.mark.usefixtures("small_disk")
def test_a_disk_that_gets_full_while_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    monkeypatch.setattr(store, "GROUP_SECONDS", 0.0)
    jobs = jobs_of(make_samples(tmp_path / "pictures", 6))
    folders, encoder = LatentFolders(str(disk)), Encoder()

    def encode(pixels: Tensor, seeds: list[int]) -> Tensor:
        if encoder.count == 3:
            while len(make_cache(folders=folders).missing(jobs)) == 6:  # the writer may be behind
                time.sleep(0.01)
            with pytest.raises(OSError, match="No space"):
                (disk / "filler").write_bytes(bytes(1 << 21))
        return encoder(pixels, seeds)

    with pytest.raises(UserError, match=r"no space for the cache in .*disk/latents"):
        make_cache(folders=folders).fill(jobs, encode, batch_size=1)
    (disk / "filler").unlink()
    assert 3 <= len(make_cache(folders=folders).missing(jobs)) < 6
    make_cache(folders=folders).fill(jobs, Encoder(), batch_size=1)
    assert_cached(make_cache(folders=folders), jobs)


def _fill_and_hang(jobs: list[LatentJob]) -> None:
    encoder = Encoder()

    def encode(pixels: Tensor, seeds: list[int]) -> Tensor:
        time.sleep(0.02 if encoder.count < 10 else 600)
        return encoder(pixels, seeds)

    make_cache().fill(jobs, encode, batch_size=1, workers=1)


def test_a_killed_fill_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GROUP_SECONDS", 0.05)
    jobs = jobs_of(make_samples(tmp_path, 40))
    left = 40
    for _ in range(3):
        process = FORK.Process(target=_fill_and_hang, args=(jobs,))
        process.start()
        while len(make_cache().missing(jobs)) == left:
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        now = len(make_cache().missing(jobs))
        assert left - 10 <= now < left
        left = now
    encoder = Encoder()
    assert make_cache().fill(jobs, encoder, batch_size=4) == left == encoder.count
    assert_cached(make_cache(), jobs)


def test_ranks_share_the_work(tmp_path: Path) -> None:
    jobs = jobs_of(make_samples(tmp_path, 7, ImageRules(flip_aug=True)))

    def run(rank: int) -> None:
        assert make_cache(shares=Shares(others=Share(rank, 2))).fill(jobs, Encoder(), batch_size=2) == (8, 6)[rank]

    processes = [FORK.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert make_cache().missing(jobs) == []
    assert_cached(make_cache(), jobs)
    in_memory = make_cache(folders=LatentFolders(disk=False), shares=Shares(others=Share(1, 2)))
    assert in_memory.fill(jobs, Encoder(), batch_size=2) == 14


class Counting(Encoder):
    """Writes a letter for each picture that it encodes, and kills its process after some."""

    def __init__(self, path: Path, killed_after: int | None) -> None:
        super().__init__()
        self.path, self.killed_after = path, killed_after

    def __call__(self, pixels: Tensor, seeds: list[int]) -> Tensor:
        if self.count == self.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.path.open("a") as file:
            file.write("x" * len(pixels))
        return super().__call__(pixels, seeds)


def test_four_processes_of_which_two_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start encodes what they had not written, and nothing else."""
    monkeypatch.setattr(store, "GROUP_SECONDS", 0)
    pictures, counts = tmp_path / "pictures", tmp_path / "counts"
    pictures.mkdir()
    counts.mkdir()
    jobs = jobs_of(make_samples(pictures, 60))

    def run(rank: int, start: int) -> None:
        shares = Shares(others=Share(rank, 4))
        encoder = Counting(counts / f"{start}-{rank}", 5 if start == 0 and rank in (0, 2) else None)
        make_cache(shares=shares).fill(jobs, encoder, batch_size=1)

    first = [FORK.Process(target=run, args=(rank, 0)) for rank in range(4)]
    for process in first:
        process.start()
    for process in first:
        process.join()
    assert [process.exitcode for process in first] == [-signal.SIGKILL, 0, -signal.SIGKILL, 0]
    left = len(make_cache().missing(jobs))
    assert 20 <= left <= 30
    second = [FORK.Process(target=run, args=(rank, 1)) for rank in range(4)]
    for process in second:
        process.start()
    for process in second:
        process.join()
    assert make_cache().missing(jobs) == []
    assert [(counts / f"0-{rank}").stat().st_size for rank in (1, 3)] == [15, 15]
    assert sum(path.stat().st_size for path in counts.glob("1-*")) == left
    assert_cached(make_cache(), jobs)
    indexes = [path.name for path in (pictures / ".trainyard/latents").glob("*.sqlite")]
    assert sorted(indexes) == [*(f"index-{rank}.sqlite" for rank in (1, 2, 3)), "index.sqlite"]


def test_a_damaged_index_of_another_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it names is encoded again; it is replaced only where no other process may be writing it."""
    jobs = jobs_of(make_samples(tmp_path, 6))
    for rank in (0, 1):
        make_cache(shares=Shares(others=Share(rank, 2))).fill(jobs, Encoder(), batch_size=1)
    assert make_cache().missing(jobs) == []
    other = tmp_path / ".trainyard/latents/index-1.sqlite"
    other.write_bytes(b"x" * other.stat().st_size)
    found = make_cache(shares=Shares(others=Share(0, 2)))
    assert found.missing(jobs) == [] and list(found.lacking(jobs).values()) == [(3, 3)]
    assert other.exists() and "is damaged: what it names is encoded again" in caplog.text
    assert len(make_cache().missing(jobs)) == 3 and other.with_suffix(".damaged").exists()


def test_digests_are_not_remembered_of_files_that_were_just_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    memory = store.MemoryStore()
    hashes = FileHashes(memory)
    state = state_of(str(path))
    first = hashes.digest(state)
    hashes.save()
    assert FileHashes(memory).recall([state]) == [state]
    os.utime(path, ns=(AN_HOUR_AGO, AN_HOUR_AGO))
    state = state_of(str(path))
    assert hashes.digest(state) == first
    hashes.save()
    assert FileHashes(memory).recall([state]) == []
    assert FileHashes(memory).recall([FileState(str(path), 3, 5)]) == [FileState(str(path), 3, 5)]


# ---- the files of sd-scripts -----------------------------------------------------------------------------------------


def scale(latents: Tensor) -> Tensor:
    return latents * 0.18215


def write_npz(path: Path, spec: LatentSpec, sample: Sample) -> dict[str, np.ndarray]:
    """What sd-scripts writes for a picture that trains at its own size."""
    rng = np.random.default_rng(0)
    width, height = sample.size[0] // 8, sample.size[1] // 8
    arrays: dict[str, np.ndarray] = {
        "latents": rng.normal(size=(4, height, width)).astype(np.float32),
        "original_size": np.array(sample.size),
        "crop_ltrb": np.array([0.0, 0.0, 64.0, 48.0]),
        "latents_flipped": rng.normal(size=(4, height, width)).astype(np.float32),
        "alpha_mask": rng.random((sample.size[1], sample.size[0])).astype(np.float32),
    }
    suffix = f"_{height}x{width}" if spec.npz_sized_keys else ""
    np.savez(path, **{name + suffix: value for name, value in arrays.items()})  # type: ignore[arg-type]
    return arrays


def legacy_jobs(folder: Path, spec: LatentSpec, rules: ImageRules, name: str) -> tuple:
    """One picture with its latent file: (jobs, path of the file, its arrays)."""
    (sample,) = make_samples(folder, 1, rules)
    path = folder / name
    arrays = write_npz(path, spec, sample)
    return jobs_of([replace(sample, legacy_latents=str(path))]), path, arrays


@pytest.mark.parametrize(
    ("spec", "name"), [(SPEC, "0_0048x0064_sd.npz"), (SPEC, "0.npz"), (SIZED, "0_0048x0064_flux.npz")]
)
def test_valid_files_of_sd_scripts_are_read(tmp_path: Path, spec: LatentSpec, name: str) -> None:
    rules = ImageRules(flip_aug=True, alpha_mask=True)
    jobs, _, arrays = legacy_jobs(tmp_path, spec, rules, name)
    assert len(make_cache(spec).missing(jobs)) == 2  # no scale_legacy: not asked for
    for dtype in (torch.float32, torch.bfloat16):
        cache = make_cache(spec, scale_legacy=scale, dtype=dtype)
        assert cache.missing(jobs) == []
        plain, mask = cache.get(jobs[0])
        mirrored, mirrored_mask = cache.get(jobs[1])
        assert torch.equal(plain, (torch.from_numpy(arrays["latents"]) * 0.18215).to(dtype))
        assert torch.equal(mirrored, (torch.from_numpy(arrays["latents_flipped"]) * 0.18215).to(dtype))
        assert mask is not None and mirrored_mask is not None
        blocks = torch.from_numpy(arrays["alpha_mask"]).reshape(8, 8, 6, 8).mean((1, 3))
        assert torch.allclose(mask[0], blocks) and torch.allclose(mirrored_mask[0], blocks.flip(-1))


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "older than the picture": lambda path: os.utime(path, ns=(AN_HOUR_AGO - 10, AN_HOUR_AGO - 10)),
    "has no latents_flipped": lambda path: rewrite(path, latents_flipped=None),
    "has no original_size": lambda path: rewrite(path, original_size=None),
    r"latents of shape \(4, 3, 3\)": lambda path: rewrite(path, latents_flipped=np.zeros((4, 3, 3))),
    r"made for a picture of \[64, 48\]": lambda path: rewrite(path, original_size=np.array([64, 48])),
    "values that are not finite": lambda path: rewrite(path, latents_flipped=np.full((4, 8, 6), np.nan)),
    r"damaged \(": lambda path: os.truncate(path, 300),
    r"damaged \(.*": lambda path: path.write_bytes(b""),
}


def rewrite(path: Path, **changes: object) -> None:
    arrays = dict(np.load(path)) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize("reason", BAD_FILES)
def test_other_files_of_sd_scripts_are_not(tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainyard")
    jobs, path, _ = legacy_jobs(tmp_path, SPEC, ImageRules(flip_aug=True), "0_0048x0064_sd.npz")
    BAD_FILES[reason](path)
    cache, encoder = make_cache(scale_legacy=scale), Encoder()
    missing = cache.fill(jobs, encoder, batch_size=1)
    assert missing >= 1 and jobs[1] not in cache.missing(jobs)
    assert torch.equal(cache.get(jobs[1])[0], expected(jobs[1]))
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == ("WARNING" if "damaged" in reason else "INFO")
    assert re.search(reason, caplog.text) and str(path) in caplog.text


def test_a_rank_reads_what_another_rank_has_checked(tmp_path: Path) -> None:
    jobs, path, arrays = legacy_jobs(tmp_path, SPEC, PLAIN, "0_0048x0064_sd.npz")
    cache = make_cache(scale_legacy=scale, shares=Shares(others=Share(1, 2)))
    assert cache.fill(jobs, Encoder(), batch_size=1) == 0  # the only picture is rank 0's
    assert torch.equal(cache.get(jobs[0])[0], torch.from_numpy(arrays["latents"]) * 0.18215)
    path.unlink()
    with pytest.raises(UserError, match="start again"):
        cache.get(jobs[0])


def flip_a_byte(path: Path) -> None:
    """In the first array; size and time stay."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("limit", [legacy_npz.CHECKED_BYTES, 0])
def test_a_file_that_was_good_is_damaged(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files are read at every start; of many it is remembered that they were good, and training finds damage."""
    monkeypatch.setattr(legacy_npz, "CHECKED_BYTES", limit)
    jobs, path, _ = legacy_jobs(tmp_path, SPEC, ImageRules(), "0_0048x0064_sd.npz")
    assert make_cache(scale_legacy=scale).missing(jobs) == []
    flip_a_byte(path)
    cache = make_cache(scale_legacy=scale)
    if limit == 0:
        assert cache.missing(jobs) == []
        with pytest.raises(UserError, match=r"damaged .* start again and the picture is encoded"):
            cache.get(jobs[0])
    assert make_cache(scale_legacy=scale).fill(jobs, Encoder(), batch_size=1) == 1
    assert_cached(make_cache(scale_legacy=scale), jobs)


ARRAYS = {"latents": np.zeros((4, 8, 6), np.float32), "original_size": np.array([48, 64])}
WRONG_NPZ: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("not a zip"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(ARRAYS)),
    "array": lambda path: np.save(path.open("wb"), ARRAYS["latents"]),
    "objects": lambda path: np.savez(path, **{**ARRAYS, "latents": np.array([{}, []], dtype=object)}),
    "strings": lambda path: np.savez(path, **{**ARRAYS, "latents": np.full((4, 8, 6), "a")}),
    "integers": lambda path: np.savez(path, **{**ARRAYS, "latents": np.zeros((4, 8, 6), np.int64)}),
    "complex": lambda path: np.savez(path, **{**ARRAYS, "latents": np.zeros((4, 8, 6), np.complex64)}),
    "scalar size": lambda path: np.savez(path, **{**ARRAYS, "original_size": np.array(48)}),
    "text size": lambda path: np.savez(path, **{**ARRAYS, "original_size": np.array(["48", "64"])}),
    "huge shape": lambda path: crafted(path, "(4, 999999999, 999999999)"),
    "more than it says": lambda path: crafted(path, "(4, 8, 6)", bytes(1 << 20)),
    "less than it says": lambda path: crafted(path, "(4, 8, 6)", b""),
    "nested header": lambda path: crafted(path, "(" * 5000),
    "member text": lambda path: zip_of(path, {"latents.npy": b"hello", "original_size.npy": b""}),
    "bomb": lambda path: np.savez_compressed(path, **{**ARRAYS, "latents": np.zeros((4, 800, 600), np.float32)}),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def zip_of(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def crafted(path: Path, shape: str, data: bytes = bytes(768)) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    zip_of(path, {"latents.npy": head + header + data, "original_size.npy": b""})


@pytest.mark.parametrize("kind", WRONG_NPZ)
def test_files_of_any_content_are_not_used(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainyard")
    jobs, path, _ = legacy_jobs(tmp_path, SPEC, PLAIN, "0_0048x0064_sd.npz")
    WRONG_NPZ[kind](path)
    if path.exists() and kind not in ("folder", "pipe"):
        os.utime(path)
    cache = make_cache(scale_legacy=scale)
    assert cache.fill(jobs, Encoder(), batch_size=1) == 1
    assert_cached(cache, jobs)
    assert len(caplog.records) == 1 and str(path) in caplog.text


def test_damaged_npz_files(tmp_path: Path) -> None:
    """200 files with bytes changed, cut or exchanged: each is read right or not used."""
    jobs, path, arrays = legacy_jobs(tmp_path, SPEC, PLAIN, "0_0048x0064_sd.npz")
    whole, wanted = path.read_bytes(), legacy_npz.Wanted((8, 6), jobs[0].sample.size, False, False)
    for data in damaged_copies(whole, 200, "npz"):
        path.write_bytes(data)
        try:
            latents, _ = legacy_npz.read(str(path), SPEC, wanted)
        except legacy_npz.NotUsable as error:
            assert "\n" not in str(error)
        else:
            assert torch.equal(latents, torch.from_numpy(arrays["latents"]))
