# SPDX-License-Identifier: Apache-2.0
"""Masks that are black where their picture is trained are named, and refused where there is nothing else to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from library.data import masks
from library.data.dataset import TrainingData
from library.data.masks import MaskReport, check_masks
from library.data.records import BucketRules, DatasetConfig, ImageRules, SubsetConfig
from library.data.scan import scan
from library.errors import UserError

SQUARE = BucketRules((64, 64))


def said(folder: Path, values: list[Any], *, alpha: bool = False, mode: str = "L", **how: Any) -> str | None:
    """What is said of pictures of 64 x 96 whose masks are filled with `values`, or drawn by them."""
    folder.mkdir()
    (folder / "masks").mkdir()
    for number, value in enumerate(values):
        mask = Image.new("L", (64, 96), value if isinstance(value, int) else 0)
        if callable(value):
            value(mask)
        picture = Image.new("RGB", (64, 96), (90, 120, 30))
        if alpha:
            picture.putalpha(mask)
        else:
            mask.convert(mode).save(folder / "masks" / f"{number}.png")
        picture.save(folder / f"{number}.png")
    other = None if alpha else str(folder / "masks")
    rules = ImageRules(alpha_mask=alpha, **how)
    subset = SubsetConfig(str(folder), conditioning_data_dir=other, class_tokens="x", images=rules)
    return judged((DatasetConfig((subset,), SQUARE),), masked_loss=not alpha).warning


def judged(configs: tuple[DatasetConfig, ...], *, masked_loss: bool) -> MaskReport:
    found = [(dataset.config, dataset.samples) for dataset in scan(configs).datasets]
    return check_masks(TrainingData(found, seed=1).trained(), masked_loss=masked_loss)


def outside(mask: Image.Image) -> None:
    """White only in what the crop to 64 x 64 takes away."""
    mask.paste(255, (0, 0, 64, 16))
    mask.paste(255, (0, 80, 64, 96))


def corner(mask: Image.Image) -> None:
    mask.paste(255, (0, 16, 2, 18))


@pytest.mark.parametrize("alpha", [False, True], ids=["mask files", "alpha"])
def test_black_masks(tmp_path: Path, alpha: bool) -> None:
    where = "" if alpha else "masks/"
    assert said(tmp_path / "good", [255, corner, DARK_GREY, 128], alpha=alpha) is None
    line = said(tmp_path / "some", [255, 0, corner, outside, 0], alpha=alpha) or ""
    assert line.startswith("3 masks are black where the picture is trained")
    assert [f"{where}{n}.png" in line for n in range(5)] == [False, True, False, True, True]
    line = said(tmp_path / "grey", [3, 255], alpha=alpha) or ""
    assert line.startswith("1 mask is black or nearly so (no pixel above 3 of 255)") and f"{where}0.png" in line
    line = said(tmp_path / "many", [0] * 12 + [255], alpha=alpha) or ""
    assert line.count(".png") == 10 and "and 2 more" in line
    for name, values in {"all": [0, 0, 0], "cropped": [outside, 0], "ones": [1, 1]}.items():
        with pytest.raises(UserError, match=r"all masks are black .*so nothing would be learned: ") as told:
            said(tmp_path / name, values, alpha=alpha)
        assert f"{where}0.png" in str(told.value) and f"{where}1.png" in str(told.value)


DARK_GREY = masks.DARK


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "P"])
def test_masks_of_every_mode(tmp_path: Path, mode: str) -> None:
    assert said(tmp_path / "good", [255, corner], mode=mode) is None
    with pytest.raises(UserError, match="all masks are black"):
        said(tmp_path / "all", [0, 0], mode=mode)


def test_a_crop_that_moves_may_find_what_is_white(tmp_path: Path) -> None:
    assert said(tmp_path / "moves", [outside, outside], random_crop=True) is None


def test_whoever_has_no_mask_learns(tmp_path: Path) -> None:
    """Black masks in one subset are a warning, unless the other is of regularisation pictures."""
    for name, color in {"black": (1, 2, 3, 0), "plain": (1, 2, 3, 255)}.items():
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGBA", (64, 64), color).convert("RGBA" if name == "black" else "RGB").save(
                tmp_path / name / f"{number}.png"
            )
    black = SubsetConfig(str(tmp_path / "black"), class_tokens="x", images=ImageRules(alpha_mask=True))
    plain = SubsetConfig(str(tmp_path / "plain"), class_tokens="x", images=ImageRules(alpha_mask=True))
    line = judged((DatasetConfig((black, plain), SQUARE),), masked_loss=False).warning or ""
    assert line.startswith("2 masks are black")
    both = (DatasetConfig((black,), SQUARE), DatasetConfig((black,), BucketRules((32, 32))))
    with pytest.raises(UserError, match="all masks are black"):
        judged(both, masked_loss=False)
    reg = SubsetConfig(str(tmp_path / "plain"), class_tokens="x", is_reg=True)
    with pytest.raises(UserError, match="all masks are black"):
        judged((DatasetConfig((black, reg), SQUARE),), masked_loss=False)


def test_the_summary_counts_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a crop, and of all masks or those that were looked at."""
    folder = tmp_path / "p"
    (folder / "masks").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (64, 96)).save(folder / f"{number}.png")
        mask = Image.new("L", (64, 96), 255)
        mask.paste(0, (0, 0, 64, 32))  # a quarter of what the crop keeps
        mask.save(folder / "masks" / f"{number}.png")
    Image.new("RGB", (64, 96)).save(tmp_path / "q.png")
    both = [
        SubsetConfig(str(folder), conditioning_data_dir=str(folder / "masks"), class_tokens="x"),
        SubsetConfig(str(tmp_path), class_tokens="x"),
    ]
    configs = (DatasetConfig(tuple(both), SQUARE),)
    whole = judged(configs, masked_loss=True)
    assert whole == ("masks: 6 of 7 pictures have one, and 75.0% of their area trains", None)
    monkeypatch.setattr(masks, "MOST_PIXELS", 64 * 96 * 3)
    assert (judged(configs, masked_loss=True).summary or "").endswith("trains (of 3 that were looked at)")


def test_very_many_pixels_are_not_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MOST_PIXELS", 64 * 96 * 4)
    line = said(tmp_path / "some", [0, 255, 0] * 3) or ""  # one of three is looked at
    assert line.startswith("of 3 masks that were looked at, 3 masks are black")
    with pytest.raises(UserError, match="all masks are black"):
        said(tmp_path / "all", [0] * 9)


def test_damaged_masks_are_named(tmp_path: Path) -> None:
    def spoil(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-200] + bytes(200))

    folder = tmp_path / "p"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    (folder / "masks").mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (64, 64)).save(folder / f"{number:02d}.png")
        Image.fromarray(noise).save(folder / "masks" / f"{number:02d}.png")
        spoil(folder / "masks" / f"{number:02d}.png")
    subset = SubsetConfig(str(folder), conditioning_data_dir=str(folder / "masks"), class_tokens="x")
    with pytest.raises(UserError) as told:
        judged((DatasetConfig((subset,), SQUARE),), masked_loss=True)
    assert len(told.value.problems) == 11 and told.value.problems[-1] == "and 2 more masks cannot be read"
    assert told.value.problems[0].startswith(f"{folder}/masks/00.png: cannot be read as a picture")
