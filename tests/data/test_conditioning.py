# SPDX-License-Identifier: Apache-2.0
"""Control images: found by stem, cut out exactly as their pictures, with cached latents too; masks stay masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.data.config import load_dataset_config
from library.data.dataset import TrainingData
from library.data.encoding import LatentJob, encoding_input
from library.data.lint import check
from library.data.options import DataOptions
from library.data.records import BucketRules, DatasetConfig, ImageRules, SubsetConfig
from library.data.scan import Scan, scan
from library.errors import UserError
from library.rng import derive_seed

BUCKETS = BucketRules((64, 64), enable_bucket=True, min_bucket_reso=32, max_bucket_reso=128, bucket_reso_steps=16)
SIZES = ((64, 64), (100, 60), (60, 100), (80, 70), (130, 64))


def noise(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    """A picture of random pixels; equal names and sizes give equal pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode))
    pixels = np.random.default_rng(derive_seed(path.stem, *size)).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode=None).save(path)
    return path


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Pictures, and control images that are the same pictures."""
    for index, size in enumerate(SIZES):
        for folder in ("pics", "controls"):
            noise(tmp_path / folder / f"p{index}.png", size)
        (tmp_path / "pics" / f"p{index}.txt").write_text("red cat")
    return tmp_path


def found(root: Path, *, control: bool = True, **subset: Any) -> Scan:
    config = SubsetConfig(
        str(root / "pics"), conditioning_data_dir=str(root / "controls"), caption_extension=".txt", **subset
    )
    return scan((DatasetConfig((config,), BUCKETS, batch_size=2),), control=control)


def data_of(root: Path, **rules: Any) -> TrainingData:
    dataset = found(root, images=ImageRules(**rules), num_repeats=3).datasets[0]
    return TrainingData([(dataset.config, dataset.samples)], seed=1)


# ---- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [{}, {"flip_aug": True}, {"random_crop": True, "flip_aug": True}, {"resize_interpolation": "nearest"}],
    ids=["centre", "flipped", "random crop", "nearest"],
)
def test_control_is_cut_out_like_its_picture(twins: Path, rules: dict[str, Any]) -> None:
    """A control image that is the picture must come out as the picture, to the bit."""
    data = data_of(twins, **rules)
    for plan in data.plan_epoch(1):
        batch = data.load(plan, step=0)
        assert batch.control is not None and batch.pixels is not None
        assert batch.control.shape == batch.pixels.shape and batch.control.dtype == torch.float32
        assert torch.equal(batch.control, batch.pixels)


class Pixels:
    """A cache whose "latents" are the very pixels that an encoder would get."""

    def get(self, job: LatentJob) -> tuple[Tensor, None]:
        return encoding_input(job, masked_loss=False).pixels, None


def test_control_comes_with_cached_latents_too(twins: Path) -> None:
    data = data_of(twins, flip_aug=True).prepared(latents=Pixels())
    plain = data_of(twins, flip_aug=True)
    flips: set[bool] = set()
    for plan in data.plan_epoch(1):
        batch, uncached = data.load(plan, step=0), plain.load(plan, step=0)
        assert batch.pixels is None and batch.control is not None and batch.latents is not None
        assert torch.equal(batch.control, batch.latents)
        assert uncached.control is not None and torch.equal(batch.control, uncached.control)
        mirrored = (derive_seed("vae", Path(name).name, 1) for name in batch.names)
        flips.update(seed == other for seed, other in zip(batch.latent_seeds, mirrored, strict=True))
    assert flips == {True, False}  # plain and mirrored pictures were seen


def test_colours_of_control_images_stay(twins: Path) -> None:
    """color_aug is about the picture; the control image says where things are."""
    data, plain = data_of(twins, color_aug=True), data_of(twins)
    differs = False
    for plan in data.plan_epoch(1):
        batch, other = data.load(plan, step=0), plain.load(plan, step=0)
        assert batch.control is not None and other.control is not None
        assert torch.equal(batch.control, other.control)
        assert batch.pixels is not None and other.pixels is not None
        differs = differs or not torch.equal(batch.pixels, other.pixels)
    assert differs


def test_another_size_is_stretched_over_the_picture(tmp_path: Path) -> None:
    noise(tmp_path / "pics/a.png", (100, 60))  # in the bucket 80x48: no crop
    noise(tmp_path / "controls/a.png", (52, 30))
    (tmp_path / "pics/a.txt").write_text("red cat")
    data = data_of(tmp_path)
    batch = data.load(data.plan_epoch(1)[0], step=0)
    assert batch.control is not None and batch.control.shape[1:] == (3, 48, 80)
    literal = Image.open(tmp_path / "controls/a.png").resize((80, 48), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.asarray(literal).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(batch.control[0], expected)


def test_colours_under_transparency_stay(tmp_path: Path) -> None:
    """As the programs that use the finished file read control images."""
    noise(tmp_path / "pics/a.png", (64, 64))
    (tmp_path / "controls").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 51, 0)).save(tmp_path / "controls/a.png")
    (tmp_path / "pics/a.txt").write_text("red cat")
    data = data_of(tmp_path)
    control = data.load(data.plan_epoch(1)[0], step=0).control
    assert control is not None
    assert control[0, :, 5, 5].tolist() == pytest.approx([1.0, -1.0, -0.6])


# ---- finding them -------------------------------------------------------------------------------------------------


def test_masks_and_control_images_are_not_mixed_up(twins: Path) -> None:
    control, mask = found(twins).subsets[0].samples[0], found(twins, control=False).subsets[0].samples[0]
    path = str(twins / "controls/p0.png")
    assert (control.control_path, control.mask_path) == (path, None)
    assert (mask.control_path, mask.mask_path) == (None, path)


def test_what_is_wrong_is_said_at_once(twins: Path) -> None:
    for name in ("p0.png", "p3.png"):
        (twins / "controls" / name).unlink()
    (twins / "controls/p2.png").write_bytes(b"")
    noise(twins / "controls/p1.png", (60, 100))  # turned
    noise(twins / "controls/extra.png", (60, 100))
    report = check(found(twins))
    folder = twins / "controls"
    assert report.problems == (
        f"{folder}/p2.png: is empty (0 bytes)",
        f"{folder}: no control image of the same name for 2 pictures: p0.png, p3.png",
        f"{folder}: 1 control images have another shape than their pictures: p1.png (60x100, the picture 100x60)",
    )
    assert report.warnings == (f"{folder}: 1 control image has no picture of the same name: extra.png",)


def test_control_images_of_a_metadata_file(twins: Path) -> None:
    (twins / "meta.json").write_text('{"p1": {"caption": "red cat"}}')
    (sample,) = found(twins, metadata_file=str(twins / "meta.json")).subsets[0].samples
    assert sample.control_path == str(twins / "controls/p1.png")


# ---- configuration ------------------------------------------------------------------------------------------------


def load(root: Path, *lines: str, control: bool = True, **options: Any) -> tuple[DatasetConfig, ...]:
    head = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/pics'\n"
    (root / "data.toml").write_text(head + "".join(f"{line}\n" for line in lines))
    given = DataOptions(dataset_config=str(root / "data.toml"), **options)
    return load_dataset_config(given, bucket_step=64, control=control)


def refusal(root: Path, *lines: str, **options: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(root, *lines, **options)
    return caught.value.problems


def test_each_subset_needs_its_folder(twins: Path) -> None:
    folder = f"conditioning_data_dir = '{twins}/controls'"
    assert load(twins, folder)[0].subsets[0].conditioning_data_dir == f"{twins}/controls"
    assert load(twins, conditioning_data_dir=f"{twins}/controls")[0].subsets[0].conditioning_data_dir is not None
    missing = f"conditioning_data_dir, the folder of the control images, is missing for {twins}/pics"
    assert refusal(twins) == [missing]
    (line,) = refusal(twins, folder.replace("controls", "control"))
    assert line.endswith(f"conditioning_data_dir {twins}/control does not exist. Did you mean {twins}/controls?")


def test_control_images_are_no_masks(twins: Path) -> None:
    folder = f"conditioning_data_dir = '{twins}/controls'"
    assert refusal(twins, folder, masked_loss=True) == ["--masked_loss has no effect: no subset has alpha_mask = true"]
    load(twins, folder, "alpha_mask = true", masked_loss=True)


def test_without_a_network_that_looks_at_them_they_are_refused(twins: Path) -> None:
    (line,) = refusal(twins, f"conditioning_data_dir = '{twins}/controls'", control=False)
    assert line.endswith("conditioning_data_dir has no effect without --task edit or --masked_loss")


def test_folder_form_takes_the_folder_itself(twins: Path) -> None:
    """As the control scripts of today; folders named <repeats>_<words> inside it still count as ever."""
    folders: dict[str, Any] = {"train_data_dir": f"{twins}/pics", "conditioning_data_dir": f"{twins}/controls"}
    options = DataOptions(**folders, resolution=(64, 64))
    (subset,) = load_dataset_config(options, bucket_step=64, control=True)[0].subsets
    assert (subset.image_dir, subset.num_repeats, subset.class_tokens) == (f"{twins}/pics", 1, None)
    (twins / "pics/4_cat").mkdir()
    (subset,) = load_dataset_config(options, bucket_step=64, control=True)[0].subsets
    assert (subset.image_dir, subset.num_repeats, subset.class_tokens) == (f"{twins}/pics/4_cat", 4, "cat")
