# SPDX-License-Identifier: Apache-2.0
"""Which reference pictures belong to a training picture, and what batches they are in."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from library.data.config import load_dataset_config
from library.data.dataset import TrainingData
from library.data.options import DataOptions
from library.data.records import BucketRules, DatasetConfig, Sample, SubsetConfig
from library.data.scan import SubsetScan, scan
from library.errors import UserError
from library.types import ReferenceSpec, Size
from tests.trainers.helpers import make_pictures, subset, write_dataset


def same(size: Size, target: Size) -> Size:
    return size


SPEC = ReferenceSpec(most=3, size=same)


def picture(path: Path, size: Size = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def scanned(folder: Path, targets: list[str], references: dict[str, Size]) -> SubsetScan:
    for name in targets:
        picture(folder / "targets" / f"{name}.png")
    for name, size in references.items():
        picture(folder / "references" / f"{name}.png", size)
    config = SubsetConfig(str(folder / "targets"), reference_data_dir=str(folder / "references"))
    return scan([DatasetConfig((config,), BucketRules((64, 64)))]).subsets[0]


def names(sample: Sample) -> list[str]:
    return [Path(reference.path).stem for reference in sample.references]


def test_names(tmp_path: Path) -> None:
    """By the stem, then numbered from 0 without a gap; a number that is a picture's own name is that picture's."""
    size = (64, 64)
    files = {"a": size, "a_0": size, "a_1": size, "a_3": size, "b_0": size, "c": size, "c_0": size}
    found = scanned(tmp_path, ["a", "b", "c", "c_0"], files)
    assert found.problems == ()
    assert {Path(s.path).stem: names(s) for s in found.samples} == {
        "a": ["a", "a_0", "a_1"], "b": ["b_0"], "c": ["c"], "c_0": ["c_0"],
    }  # fmt: skip
    assert {s.references[0].size for s in found.samples} == {size}


def test_pictures_without_and_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "a.png").write_bytes(b"no picture")
    found = scanned(tmp_path, ["a", "b"], {})
    assert len(found.problems) == 2 and "a.png: " in found.problems[0]
    assert found.problems[1].endswith("no reference picture of the same name for 1 pictures: b.png")


def test_batches_hold_references_of_the_same_number_and_sizes(tmp_path: Path) -> None:
    wide, tall = (96, 64), (64, 96)
    files = {"a": wide, "b": wide, "c": tall, "d": wide, "d_0": tall, "e": wide}
    found = scanned(tmp_path, ["a", "b", "c", "d", "e"], files)
    dataset = DatasetConfig((found.config,), BucketRules((64, 64)), batch_size=8)
    data = TrainingData([(dataset, found.samples)], seed=1, references=SPEC)
    seen = {}
    for plan in data.plan_epoch(1):
        batch = data.load(plan, step=0)
        shapes = tuple(tuple(pixels.shape[1:]) for pixels in batch.reference_pixels)
        seen[tuple(sorted(Path(name).stem for name in batch.names))] = shapes
    assert seen == {("a", "b", "e"): ((3, 64, 96),), ("c",): ((3, 96, 64),), ("d",): ((3, 64, 96), (3, 96, 64))}
    assert data.stats()[0].buckets == (((64, 64), 5),)
    assert len(data.reference_jobs()) == 6
    with pytest.raises(UserError, match="takes at most 1 reference pictures"):
        TrainingData([(dataset, found.samples)], seed=1, references=ReferenceSpec(1, same))


def test_configuration(tmp_path: Path) -> None:
    pictures, references = make_pictures(tmp_path / "pictures", 1), tmp_path / "references"
    file = write_dataset(tmp_path / "d.toml", subset(pictures, reference_data_dir=str(references)))
    with pytest.raises(UserError, match=r"reference_data_dir .*references does not exist"):
        load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=8, references=True)
    references.mkdir()
    with pytest.raises(UserError, match=r"^reference_data_dir: this model takes no reference pictures"):
        load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=8)
    (config,) = load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=8, references=True)
    assert config.subsets[0].reference_data_dir == str(references)
    file = write_dataset(tmp_path / "d.toml", subset(pictures, reference_data_dir=str(references), flip_aug=True))
    with pytest.raises(UserError, match="flip_aug cannot mirror pictures together with their references"):
        load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=8, references=True)
