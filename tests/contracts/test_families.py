# SPDX-License-Identifier: Apache-2.0
"""What LoRA training must do with every architecture. A new one is a file in tests/families and a row in CASES.

The golden losses are written anew, after a change that is meant to change numbers, by
    python -m tests.contracts.test_families
"""

from __future__ import annotations

import json
import pickle
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.cli import load_attribute
from library.families.adapters import tables_of
from library.families.registry import FAMILIES, family_class
from library.objectives.base import Predict
from library.objectives.options import LossOptions
from library.objectives.selective import SelectiveObjective
from library.options import specs
from tests.adapters.known_formats import format_of, read_adapter
from tests.families import CASES
from tests.families.base import Case
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    half_masks,
    make_pictures,
    micro_generator,
    randomized,
    subset,
    train,
    write_dataset,
)

# ---- the contract ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A case with its model made, a dataset of one batch, and one of three batches."""

    name: str
    case: Case
    model: dict[str, Any]  # the options that name it
    dataset: Path
    three: Path
    ground: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"family": self.case.family, "network_module": None, **self.model, **self.case.options}

    def train(self, folder: Path, **values: Any) -> Run:
        return train(None, self.dataset, folder, **{**self.options, **values})


def subject_of(name: str, ground: Path) -> Subject:
    data = write_dataset(ground / "one_batch.toml", subset(make_pictures(ground / "two", 2)))
    three = write_dataset(ground / "three.toml", subset(make_pictures(ground / "five", 5)))
    case = CASES[name]
    return Subject(name, case, case.make(ground / "model"), data, three, ground)


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def whole(subject: Subject) -> Run:
    return golden_run(subject)


@pytest.fixture(scope="module")
def trained(subject: Subject, whole: Run) -> Path:
    """A LoRA file whose matrices are all far from zero."""
    save_file(randomized(whole.weights), subject.ground / "trained.safetensors")
    return subject.ground / "trained.safetensors"


@dataclass(frozen=True)
class Continued:
    """A run of one step without effect, begun with the file `trained`."""

    run: Run
    begun: dict[str, Tensor]  # its network after the step


@pytest.fixture(scope="module")
def continued(subject: Subject, trained: Path) -> Continued:
    return continued_run(subject, subject.ground / "continued", network_weights=trained, keep_gradients=True)


def continued_run(subject: Subject, folder: Path, **values: Any) -> Continued:
    begun: list[dict[str, Tensor]] = []
    run = subject.train(
        folder, max_train_steps=1, learning_rate=1e-30,
        each_step=lambda trainer: begun.append(trainer.network.state(None)), **values,
    )  # fmt: skip
    return Continued(run, begun[0])


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].view_as(value), value) for key, value in expected.items())


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference, relative to the largest gradient of all."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    wrong = {k: float((ours[k] - theirs[k]).abs().max()) / largest for k in ours}
    assert max(wrong.values()) < tolerance, max(wrong.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_with_the_data_survives_a_pickle(name: str) -> None:
    """Platforms without fork send it to the processes that load pictures; a family holds what cannot be sent."""
    family = family_class(FAMILIES[name])
    assert pickle.loads(pickle.dumps([family.join_conds, family.scale_legacy])) == [
        family.join_conds, family.scale_legacy
    ]  # fmt: skip


def test_one_step_equals_the_literal_reference(subject: Subject, trained: Path, continued: Continued) -> None:
    run = continued.run
    adapters = {key: value.requires_grad_() for key, value in load_file(trained).items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = subject.case.loss({**subject.model, **subject.case.options}, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    # an adapter of a layer that is not read has no gradient
    grads = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in adapters.items() if k[-5:] != "alpha"}
    assert_close(run.trainer.gradients[0], grads, 1e-5)


def test_one_step_of_split_layers_equals_the_literal_reference(subject: Subject, tmp_path: Path) -> None:
    """split_qkv: the file's up matrices are block-diagonal, and outside of the blocks nothing learns."""
    module = FAMILIES[subject.case.family].networks["lora"]
    if "split_qkv" not in specs(load_attribute(f"{module}:BUILDER").arguments):
        return  # no layer of this model is published as several in one
    values = {"network_args": ["split_qkv=True"], "max_train_steps": 1}
    pattern = subject.train(tmp_path / "first", **values).trainer.network
    for layer in pattern.named_layers().values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    save_file(pattern.state(None), tmp_path / "trained.safetensors")
    weights = tmp_path / "trained.safetensors"
    run = subject.train(tmp_path / "run", network_weights=weights, keep_gradients=True, **values)
    adapters = {key: value.requires_grad_() for key, value in load_file(weights).items()}
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = subject.case.loss({**subject.model, **subject.case.options}, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found = fused(run.trainer.gradients[0])
    assert any(".1.lora_up" in key for key in run.trainer.gradients[0]) and found.keys() <= adapters.keys()
    expected = {key: torch.zeros_like(v) if (v := adapters[key]).grad is None else v.grad for key in found}
    inside = {key: fused_pattern(key, run.trainer.gradients[0]) for key in found}
    assert_close(found, {key: value * inside[key] for key, value in expected.items()}, 1e-5)


def fused(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the parts of split layers (`name.0.lora_down.weight` ...) as those of the matrices in the file."""
    parts: dict[str, list[Tensor]] = {}
    for key, value in gradients.items():
        name, _, rest = key.partition(".")
        parts.setdefault(f"{name}.{rest.lstrip('0123456789.')}", []).append(value)
    return {k: torch.block_diag(*v) if "lora_up" in k and len(v) > 1 else torch.cat(v) for k, v in parts.items()}


def fused_pattern(key: str, gradients: dict[str, Tensor]) -> Tensor:
    """1 where a matrix of the file has a part, 0 in the rest of a block-diagonal one."""
    return fused({name: torch.ones_like(value) for name, value in gradients.items()})[key]


def test_masks_divide_a_picture_between_what_is_trained_and_what_is_kept(
    subject: Subject, trained: Path, tmp_path: Path
) -> None:
    """--masked_loss_normalize and --masked_prior_weight as formulas over a black and a white half."""
    names = [f"p{number:02d}.png" for number in range(2)]
    masks = half_masks(tmp_path / "masks", names, white="left")
    data = write_dataset(tmp_path / "d.toml", subset(subject.ground / "two", conditioning_data_dir=str(masks)))
    run = train(
        None, data, tmp_path / "run", max_train_steps=1, learning_rate=1e-30, network_weights=trained, masked_loss=True,
        masked_loss_normalize=True, masked_prior_weight=30, **subject.options,
    )  # fmt: skip
    trainer, generator = run.trainer, micro_generator(run, 0)
    inner, batch = trainer.objective, trainer.data.load(trainer.data.plan_epoch(1)[0], step=0)
    with torch.no_grad():
        noised = trainer.forward.noised(batch, generator)
        pred = trainer.forward.predict(batch)(noised)
        trainer.network.detach()
        prior = trainer.forward.predict(batch)(noised)
    white = torch.arange(pred.shape[-1]) < pred.shape[-1] // 2
    plain = lambda pred, target: inner.loss(
        Predict.of(pred), replace(noised, target=target), replace(batch, masks=None)
    )
    trains = plain(torch.where(white, pred, noised.target), noised.target)  # the loss of what equals its target is 0
    keeps = plain(torch.where(white, prior, pred), prior)
    assert run.losses[0] == pytest.approx(float((trains / 0.5 + 30 * keeps).mean()), rel=1e-5)
    assert float((30 * keeps / trains).min()) > 1e-3  # both count

    pred.requires_grad_()
    masked = SelectiveObjective(inner, LossOptions(masked_loss_normalize=True))
    (gradient,) = torch.autograd.grad(masked.loss(Predict.of(pred), noised, batch).sum(), pred)
    assert not gradient[..., ~white].any() and gradient[..., white].all()


def test_overfits_one_batch(subject: Subject, tmp_path: Path) -> None:
    """At one noise level, so that losses can be compared."""
    losses = subject.train(
        tmp_path, network_dim=16, network_alpha=16, **subject.case.overfit,
        min_timestep=700, max_timestep=700, learning_rate=2e-2, max_train_steps=24,
    ).losses  # fmt: skip
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_cached_texts_train_the_same(subject: Subject, tmp_path: Path) -> None:
    values = {"network_train_unet_only": True, "max_train_steps": 2}
    plain = subject.train(tmp_path / "plain", **values)
    both = subject.train(tmp_path / "both", cache_latents=True, cache_text_encoder_outputs=True, **values)
    assert both.losses == pytest.approx(plain.losses, rel=1e-5)
    assert both.trainer.models.vae is None and both.trainer.models.encoders == {}


def test_gradient_checkpointing_and_cached_latents_change_nothing(
    subject: Subject, trained: Path, tmp_path: Path
) -> None:
    values = {
        "network_weights": trained,
        "max_train_steps": 2,
        "keep_gradients": True,
        "network_args": ["rank_dropout=0.3"],
    }
    plain = subject.train(tmp_path / "plain", **values)
    # encoded alone or in a batch, pictures differ by rounding
    ways = {"recomputed": ({"cache_latents": True}, 1e-5), "offloaded": ({"cpu_offload_checkpointing": True}, 1e-6)}
    for name, (options, tolerance) in ways.items():
        run = subject.train(tmp_path / name, gradient_checkpointing=True, **options, **values)
        assert run.losses == pytest.approx(plain.losses, rel=tolerance)
        assert_close(run.trainer.gradients[0], plain.trainer.gradients[0], tolerance)


def test_resume_is_exact(subject: Subject, whole: Run, tmp_path: Path) -> None:
    """From a state that the whole run saved inside an epoch."""
    values = {**subject.options, "save_state": True, "resume": whole.folder / "x-step00000002-state"}
    resumed = train(None, subject.three, tmp_path, **values)
    assert len(resumed.losses) == 2
    assert_same_run(resumed, whole)


def test_every_file_holds_the_same_network(subject: Subject, trained: Path, continued: Continued, whole: Run) -> None:
    """Files of --lora_format kohya, comfy and peft: what was loaded, to the last bit."""
    assert_equal(continued.begun, load_file(trained))
    assert_equal(continued.run.weights, load_file(trained))
    tables = [table.name for table in tables_of(subject.case.family) or ()]  # tiny widths are of no architecture
    beginnings = {
        "comfy": ({"dim_from_weights": True, "network_dim": None}, whole.file),  # the file says the rank
        "peft": ({"network_alpha": 4}, trained),
    }
    for name, (options, file) in beginnings.items():
        other = continued_run(subject, subject.ground / name, network_weights=file, lora_format=name, **options)
        assert_equal(other.begun, load_file(file))
        assert format_of(other.run.weights) == name and "ss_steps" in other.run.metadata
        assert_equal(read_adapter(other.run.file, tables), load_file(file))


# ---- golden losses --------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "data_files" / "trainers" / "golden_family_losses.json"


def golden_run(subject: Subject) -> Run:
    """Four steps on three batches an epoch. Of what changes numbers only the seed and the rate are not the defaults."""
    saves = {"save_state": True, "save_every_n_steps": 2}
    return train(None, subject.three, subject.ground / "whole", **saves, **subject.options)


def test_golden_losses(subject: Subject, whole: Run) -> None:
    assert whole.losses == pytest.approx(json.loads(GOLDEN.read_text())[subject.name], rel=1e-4)


def write_golden_losses() -> None:
    losses = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            losses[name] = golden_run(subject_of(name, Path(folder))).losses
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_golden_losses()
