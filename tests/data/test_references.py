# SPDX-License-Identifier: Apache-2.0
"""Which reference pictures belong to a training picture, and what batches they are in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from library.data.config import load_dataset_config
from library.data.dataset import TrainingData
from library.data.lint import subset_warnings
from library.data.options import DataOptions
from library.data.records import BucketRules, DatasetConfig, ImageRules, Sample, SubsetConfig
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
    config = SubsetConfig(str(folder / "targets"), reference_data_dirs=(str(folder / "references"),))
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
    assert config.subsets[0].reference_data_dirs == (str(references),)
    moved = {"color_aug": True, "random_crop": True}
    file = write_dataset(tmp_path / "d.toml", subset(pictures, reference_data_dir=str(references), **moved))
    with pytest.raises(UserError) as told:
        load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=8, references=True)
    assert [line.split(" (")[0] for line in told.value.problems] == [
        f"{key} would change pictures and not their references: leave it out" for key in moved
    ]


def edit_config(tmp_path: Path, **values: Any) -> tuple[DatasetConfig, ...]:
    """The datasets of --task edit."""
    folder = tmp_path / "pictures"
    file = write_dataset(tmp_path / "e.toml", subset(folder if folder.exists() else make_pictures(folder, 2), **values))
    return load_dataset_config(DataOptions(dataset_config=str(file)), bucket_step=8, references=True, edits=True)


def test_folders_of_the_task_edit(tmp_path: Path) -> None:
    """conditioning_data_dir, or several: each picture has one reference in each, in the order of the folders."""
    with pytest.raises(UserError, match=r"^conditioning_data_dir, the folder of the pictures to edit, is missing for "):
        edit_config(tmp_path)
    folders = [str(make_pictures(tmp_path / name, 2, first=place)) for place, name in enumerate(("x", "y", "z"))]
    for folder in folders:  # named as the pictures
        found = sorted(Path(folder).glob("*.png"))
        for number, path in [*enumerate(found)]:
            path.rename(path.with_name(f"p{number:02d}.png"))
    (one,) = scan(edit_config(tmp_path, conditioning_data_dir=folders[1])).subsets
    assert one.problems == () and [[r.path for r in s.references] for s in one.samples] == [
        [f"{folders[1]}/p{number:02d}.png"] for number in range(2)
    ]
    (several,) = scan(edit_config(tmp_path, conditioning_data_dirs=folders)).subsets
    assert [[r.path for r in s.references] for s in several.samples] == [
        [f"{folder}/p{number:02d}.png" for folder in folders] for number in range(2)
    ]
    assert all(sample.mask_path is None for sample in several.samples)
    (Path(folders[2]) / "p01.png").unlink()
    (wrong,) = scan(edit_config(tmp_path, conditioning_data_dirs=folders)).subsets
    assert wrong.problems == (f"{folders[2]}: no reference picture of the same name for 1 pictures: p01.png",)


def test_references_named_in_a_metadata_file(tmp_path: Path) -> None:
    """Beside the file, or where a whole path says; what is missing is listed, and equal pairs are named."""
    pictures = make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "old").mkdir()
    shutil.copy(pictures / "p00.png", tmp_path / "old" / "same.png")
    picture(tmp_path / "old" / "b.png", (32, 32))
    entries = {
        "p00": {"caption": "red", "references": ["old/same.png"]},
        "p01": {"caption": "blue", "references": ["old/b", str(tmp_path / "old" / "same.png")]},
    }
    file = tmp_path / "meta.json"
    config = SubsetConfig(str(pictures), metadata_file=str(file))

    def found() -> SubsetScan:
        file.write_text(json.dumps(entries), encoding="utf-8")
        return scan([DatasetConfig((config,), BucketRules((64, 64)))]).subsets[0]

    assert [names(sample) for sample in found().samples] == [["same"], ["b", "same"]]
    (line,) = [line for line in subset_warnings(found()) if "reference" in line]
    assert line.endswith(
        "1 picture is the same file as the reference picture: nothing is to be changed: " + str(pictures / "p00.png")
    )
    entries["p01"]["references"] = ["old/c.png"]
    assert found().problems == (f"{file}: 1 reference pictures are not there: old/c.png",)
    entries["p01"]["references"] = "old/b.png"
    assert found().problems[0].endswith("entry 'p01' expects a list of file names as references, got 'old/b.png'")


def test_pairs_are_mirrored_together(tmp_path: Path) -> None:
    files = dict.fromkeys("abcd", (64, 64))
    found = scanned(tmp_path, [*files], files)
    for number, name in enumerate(files):
        for folder in ("targets", "references"):
            Image.linear_gradient("L").rotate(90).point(lambda v, n=number: v // 2 + n).convert("RGB").resize(
                (64, 64)
            ).save(tmp_path / folder / f"{name}.png")
    config = replace(found.config, images=ImageRules(flip_aug=True))
    (again,) = scan([DatasetConfig((config,), BucketRules((64, 64)))]).subsets
    dataset = DatasetConfig((config,), BucketRules((64, 64)), batch_size=4)
    data = TrainingData([(dataset, again.samples)], seed=1, references=SPEC)
    assert len(data.reference_jobs()) == 8
    seen = set()
    for epoch in range(1, 4):
        batch = data.load(data.plan_epoch(epoch)[0], step=0)
        assert batch.pixels is not None and torch.equal(batch.pixels, batch.reference_pixels[0])
        seen |= set((batch.pixels[:, 0, 0, 0] > batch.pixels[:, 0, 0, -1]).tolist())
    assert seen == {False, True}
