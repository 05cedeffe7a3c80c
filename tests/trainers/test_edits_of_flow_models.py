# SPDX-License-Identifier: Apache-2.0
"""--task edit with FLUX.1 Kontext and FLUX.2: the step, runs with and without references, previews, bad input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.flux.references import PUBLISHED_SIZES, kontext_size
from library.families.flux2.model import reference_size
from tests.families import flux, flux2
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    make_pictures,
    micro_generator,
    randomized,
    subset,
    train,
    write_dataset,
)

PAIR = [(64, 64), (32, 48)]  # height, width
MODELS: dict[str, dict[str, Any]] = {  # a tiny model, the options of every run, the sizes of its references
    "kontext": {
        "family": "flux",
        "make": {},
        "options": {"model_type": "kontext", **flux.USUAL},
        "sizes": [(128, 128)],
    },
    "klein": {"family": "flux2", "make": {"variant": "klein"}, "options": {}, "sizes": PAIR},
    "dev": {"family": "flux2", "make": {"variant": "dev"}, "options": {"guidance_scale": 2.0}, "sizes": PAIR},
}
ROOMS: dict[str, Any] = {"flux": flux, "flux2": flux2}


@dataclass(frozen=True)
class Ground:
    """A tiny model, and pictures with one reference each (Kontext) or two of different sizes (FLUX.2)."""

    name: str
    model: dict[str, Any]
    folders: list[str]
    data: Path
    room: Path

    @property
    def family(self) -> str:
        return MODELS[self.name]["family"]

    @property
    def options(self) -> dict[str, Any]:
        return {**self.model, **MODELS[self.name]["options"], "task": "edit"}

    def train(self, folder: Path, **values: Any) -> Run:
        given = {"family": self.family, "network_module": None, **self.options, "dataset_config": self.data, **values}
        return train(None, given.pop("dataset_config"), folder, **given)


def ground_of(name: str, room: Path) -> Ground:
    made = MODELS[name]
    model = ROOMS[made["family"]].make(room / "model", **made["make"])
    pictures = make_pictures(room / "pictures", 2)
    folders = [room / "first"] if made["family"] == "flux" else [room / "first", room / "second"]
    for number, folder in enumerate(folders):
        make_pictures(folder, 2, first=6 + 2 * number, size=(64, 64) if number == 0 else (48, 32))
        for place in range(2):
            (folder / f"p{6 + 2 * number + place:02d}.png").rename(folder / f"p{place:02d}.png")
    names = [str(folder) for folder in folders]
    data = write_dataset(room / "pairs.toml", subset(pictures, conditioning_data_dirs=names))
    return Ground(name, model, names, data, room)


@pytest.fixture(scope="module", params=MODELS)
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return ground_of(request.param, tmp_path_factory.mktemp(request.param))


def test_one_step_equals_the_literal_reference(ground: Ground, tmp_path: Path) -> None:
    """Loss and gradients. References of different sizes stand at places of their own."""
    lora = ground.train(tmp_path / "lora", max_train_steps=1)
    assert lora.metadata["ss_task"] == "edit"
    save_file(randomized(lora.weights), tmp_path / "lora.safetensors")
    run = ground.train(
        tmp_path / "x", network_weights=tmp_path / "lora.safetensors", keep_gradients=True, max_train_steps=1,
        learning_rate=1e-30,
    )  # fmt: skip
    adapters = {key: value.requires_grad_() for key, value in load_file(tmp_path / "lora.safetensors").items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    assert [tuple(p.shape[2:]) for p in batch.reference_pixels] == MODELS[ground.name]["sizes"]
    loss = ROOMS[ground.family].loss(ground.options, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {key: value.grad for key, value in adapters.items() if value.grad is not None and "alpha" not in key}
    largest = max(float(grad.abs().max()) for grad in expected.values())
    found = run.trainer.gradients[0]
    assert max(float((found[key] - grad).abs().max()) for key, grad in expected.items()) < 1e-5 * largest
    others = [p.flip(0) for p in batch.reference_pixels]
    batch.reference_pixels = tuple(others)
    with torch.no_grad():
        exchanged = ROOMS[ground.family].loss(ground.options, batch, adapters, micro_generator(run, 0))
    assert float(exchanged) != pytest.approx(run.losses[0], rel=1e-4)


def test_runs_are_exact(ground: Ground, tmp_path: Path) -> None:
    """Resumed with references from the cache, to the bit; and without references the plain training, to the bit."""
    values = {"cache_latents": True, "save_state": True, "max_train_steps": 3}
    whole = ground.train(tmp_path / "whole", **values)
    ground.train(tmp_path / "parts", interrupt_in=2, **values)
    assert_same_run(whole, ground.train(tmp_path / "parts", resume="latest", **values))
    uncached = ground.train(tmp_path / "uncached", max_train_steps=3)
    assert uncached.losses == pytest.approx(whole.losses, rel=1e-4)

    entries = ", ".join(f'"p{n:02d}": {{"caption": "cat, red"}}' for n in range(2))
    (tmp_path / "meta.json").write_text(f"{{{entries}}}", encoding="utf-8")
    pictures = {"image_dir": str(ground.room / "pictures"), "metadata_file": str(tmp_path / "meta.json")}
    data = write_dataset(tmp_path / "no_references.toml", pictures)
    edit = ground.train(tmp_path / "edit", dataset_config=data, max_train_steps=2)
    other = {"model_type": "flux"} if ground.family == "flux" else {}
    plain = ground.train(tmp_path / "plain", dataset_config=data, max_train_steps=2, task=None, **other)
    assert edit.losses == plain.losses
    assert all(torch.equal(edit.weights[key], value) for key, value in plain.weights.items())


def test_full_training_and_previews(ground: Ground, tmp_path: Path) -> None:
    """With recomputation and fewer bits of activations; a preview shows the reference that its prompt names."""
    references = " ".join(f"--ref {folder}/p00.png" for folder in ground.folders)
    (tmp_path / "prompts.txt").write_text(f"make it red --w 64 --h 64 --s 2 --d 1 {references}\n", encoding="utf-8")
    run = finetune(
        ground.data, tmp_path / "full", **ground.options, family=ground.family, max_train_steps=2,
        gradient_checkpointing=True, sample_prompts=tmp_path / "prompts.txt", sample_every_n_steps=2,
    )  # fmt: skip
    assert len(run.losses) == 2 and all(torch.isfinite(torch.tensor(run.losses)))
    (picture,) = (tmp_path / "full" / "sample").glob("*.png")
    assert Image.open(picture).size == (64, 64)


def test_what_does_not_fit_is_refused_before_loading(ground: Ground, tmp_path: Path) -> None:
    if ground.name == "kontext":
        with pytest.raises(
            UserError, match=r"--task edit: FLUX\.1 dev and schnell edit no pictures: take FLUX\.1 Kontext"
        ):
            ground.train(tmp_path, model_type="flux")
        two = {"conditioning_data_dirs": [*ground.folders, *ground.folders]}
        data = write_dataset(tmp_path / "two.toml", subset(ground.room / "pictures", **two))
        with pytest.raises(UserError, match="this model takes at most 1 reference pictures"):
            ground.train(tmp_path, dataset_config=data)
        schnell = flux.make(tmp_path / "schnell", variant="schnell")
        with pytest.raises(UserError, match=r"--model_type kontext: .* has no guidance: it is another model"):
            ground.train(tmp_path, **schnell)
    with pytest.raises(
        UserError, match="this model takes no reference pictures here: leave it out, or give --task edit"
    ):
        ground.train(tmp_path, task=None)
    (Path(ground.folders[0]) / "p01.png").rename(tmp_path / "away.png")
    try:
        with pytest.raises(UserError, match=r"no reference picture of the same name for 1 pictures: p01\.png"):
            ground.train(tmp_path)
    finally:
        (tmp_path / "away.png").rename(Path(ground.folders[0]) / "p01.png")


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_of_kontext() -> None:
    """The published ones for pictures of a megapixel, and proportional ones below."""
    assert kontext_size((3000, 2000), (1024, 1024)) == (1248, 832)
    assert all(kontext_size(size, (1184, 880)) == size for size in PUBLISHED_SIZES)
    assert kontext_size((500, 500), (512, 512)) == (512, 512)
    assert kontext_size((100, 300), (768, 768)) == (512, 1184)
    assert kontext_size((10, 10), (64, 64)) == (128, 128)


def test_sizes_of_flux2() -> None:
    assert reference_size((640, 480), (1024, 1024)) == (640, 480)
    assert reference_size((2048, 1024), (1024, 1024)) == (1440, 720)
    assert reference_size((30, 17), (512, 512)) == (16, 16)
