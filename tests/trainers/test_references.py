# SPDX-License-Identifier: Apache-2.0
"""Reference pictures from the dataset file to the prediction, with a family that takes them: no product family does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.errors import UserError
from library.families.sd.model import StableDiffusion
from library.types import Batch, Cond, ReferenceSpec, Size, Tokens
from tests.trainers.helpers import Run, differing, make_pictures, subset, train, write_dataset

STEPS = {"max_train_steps": 3, "network_train_unet_only": True, "optimizer_type": "SGDNesterov"}


def half(size: Size, target: Size) -> Size:
    return target[0] // 2, target[1] // 2


class Editing(StableDiffusion):
    """Stable Diffusion whose predictions are shifted by the means of its references, and its text states by colours."""

    references = ReferenceSpec(most=2, size=half, seen_by=frozenset({"clip"}))

    def tokenize_with(self, captions: list[str], pictures: Sequence[Sequence[Tensor]]) -> Tokens:
        rows = pictures if pictures and self.references.seen_by else [()] * len(captions)
        colours = [sum((pixels.mean() for pixels in row), torch.zeros(())) for row in rows]
        return replace(self.tokenize(captions), pictures={"clip": torch.stack(colours)})

    def encode_part(self, name: str, encoder: nn.Module, tokens: Tokens) -> Cond:
        cond = super().encode_part(name, encoder, tokens)
        return {key: value + 10 * tokens.pictures["clip"].view(-1, 1, 1) for key, value in cond.items()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch | None) -> Tensor:
        shift = torch.zeros(())
        for number, latents in enumerate(batch.references if batch is not None else (), start=1):
            assert latents.shape == (*x_t.shape[:2], x_t.shape[2] // 2, x_t.shape[3] // 2)
            shift = shift + number * latents.mean(dim=(2, 3), keepdim=True)
        return super().predict(denoiser, x_t, t, cond, batch) + shift


@pytest.fixture(autouse=True)
def editing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family "sd" takes references."""
    monkeypatch.setattr("library.families.sd.model.StableDiffusion", Editing)


def plain(path: Path, colour: int, size: Size = (80, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 255 - colour, colour // 2)).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four pictures; the second one has two references, the others have one."""
    pictures, references = make_pictures(tmp_path / "pictures", 4), tmp_path / "references"
    for number, name in enumerate(("p00", "p01_0", "p01_1", "p02", "p03")):
        plain(references / f"{name}.png", 50 * number)
    return write_dataset(
        tmp_path / "pairs.toml",
        subset(pictures, reference_data_dir=str(references), caption_dropout_rate=0.3),
        batch_size=3,
    )


def run(sd1: Path, dataset: Path, folder: Path, **values: Any) -> Run:
    return train(sd1, dataset, folder, **{**STEPS, **values})


def test_cached_or_not_the_same_is_learned(sd1: Path, pairs: Path, tmp_path: Path) -> None:
    expected = run(sd1, pairs, tmp_path / "plain")
    assert len({round(loss, 6) for loss in expected.losses}) == 3
    disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    for name, own in {"latents": {"cache_latents": True}, "all": disk, "again": disk}.items():
        found = run(sd1, pairs, tmp_path / name, **own)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5), name
        torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shown", [True, False])
def test_an_edited_reference_is_encoded_again(
    shown: bool, sd1: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As latents, and as what the text encoder says of it, also where only that looks at pictures."""
    if shown:
        monkeypatch.setattr(Editing, "predict", StableDiffusion.predict)
    else:
        monkeypatch.setattr(Editing, "references", replace(Editing.references, seen_by=frozenset()))
    disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    before = run(sd1, pairs, tmp_path / "before", **disk)
    for name in ("p00", "p01_0", "p02", "p03"):
        plain(tmp_path / "references" / f"{name}.png", 250)
    after = run(sd1, pairs, tmp_path / "after", **disk)
    assert after.losses[0] != pytest.approx(before.losses[0], rel=1e-3)
    assert after.losses == pytest.approx(run(sd1, pairs, tmp_path / "plain").losses, rel=1e-5)


def test_workers_and_small_parts_change_nothing(sd1: Path, pairs: Path, tmp_path: Path) -> None:
    expected = run(sd1, pairs, tmp_path / "plain")
    found = run(sd1, pairs, tmp_path / "workers", max_data_loader_n_workers=1)
    assert differing(found.weights, expected.weights) == []


def test_previews_show_the_references(sd1: Path, pairs: Path, tmp_path: Path) -> None:
    plain(tmp_path / "a.png", 250)
    plain(tmp_path / "b.png", 0)
    line = "a cat --w 64 --h 64 --s 2 --d 1"
    lines = [
        line,
        f"{line} --ref {tmp_path / 'a.png'}",
        f"{line} --ref {tmp_path / 'a.png'} --ref {tmp_path / 'b.png'}",
    ]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(lines), encoding="utf-8")
    found = []
    for name, own in (("plain", {}), ("cached", {"cache_latents": True, "cache_text_encoder_outputs": True})):
        given = {"sample_prompts": prompts, "sample_at_first": True, "max_train_steps": 1, **own}
        run(sd1, pairs, tmp_path / name, **given)
        pictures = [Image.open(path).tobytes() for path in sorted((tmp_path / name / "sample").glob("x_000000_*.png"))]
        assert len(set(pictures)) == 3
        found.append(pictures)
    assert found[0] == found[1]


def test_a_state_knows_its_references(sd1: Path, pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(sd1, pairs, folder, save_state=True, max_train_steps=1)
    (tmp_path / "references" / "p01_1.png").unlink()
    with pytest.raises(UserError, match=r"references was 5 .*, is 4 "):
        run(sd1, pairs, folder, resume=folder / "x-state", max_train_steps=2)


def test_families_without_references_refuse_them(
    sd1: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editing, "references", None)
    monkeypatch.setattr(Editing, "load_denoiser", None)
    with pytest.raises(
        UserError, match=r"^reference_data_dir: this model takes no reference pictures here: leave it out"
    ):
        run(sd1, pairs, tmp_path / "refused")
