# SPDX-License-Identifier: Apache-2.0
"""What full training must do with every architecture. A new one is a file in tests/families and a row in its CASES."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.errors import UserError
from library.io.checkpoint import CheckpointForm
from tests.families import CASES
from tests.families.base import Case
from tests.trainers.finetune_runs import Recorded, finetune, finetune_with_stop, open_adapters
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    make_pictures,
    micro_generator,
    subset,
    train,
    write_dataset,
)

DENOISER = "lora_unet_"  # begins the names of its adapters
# options for what a saved model leaves out -> folders of the pipeline in which these are
SEPARATE = {
    "chroma": {"t5xxl": "text_encoder", "ae": "vae"},
    "sd3": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    "sd35": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    "lumina system prompt": {"gemma2": "text_encoder", "ae": "vae"},
    "flux2 dev": {"text_encoder": "text_encoder", "ae": "vae"},
    "sana": {"gemma2": "text_encoder", "vae": "vae"},
    "hunyuan_image": {"text_encoder": "text_encoder", "byt5": "text_encoder_2", "vae": "vae"},
}
TEACHABLE = [name for name, case in CASES.items() if case.family in ("sd", "sdxl")]  # their text encoders, too
VARIANTS = (
    "sd2 v",
    "sdxl v",
    "lumina system prompt",
    "flux2 dev",
    "hunyuan_image distilled",
)  # denoisers that other cases have
FORMATS = ["sd1", "sd2 v", "sdxl"]  # each layout of files
RESUMED = [
    *((name, kind) for name in ("sd1", "flux") for kind in ("float32 with ema", "stochastic", "kahan")),
    ("sd2 v", "kahan"), ("sdxl", "stochastic"), ("chroma", "float32 with ema"), ("sd3", "kahan"),
    ("sd35", "stochastic"), ("lumina", "kahan"), ("flux2", "stochastic"),
]  # fmt: skip
TOLERANCE = 3e-5  # of float32 over a whole model: batches of another size round otherwise
HALF = {"mixed_precision": "bf16", "full_bf16": True}


@dataclass(frozen=True)
class Subject:
    """A case with its model made, and a dataset of one batch."""

    name: str
    case: Case
    model: dict[str, Any]  # the options that name it
    dataset: Path
    ground: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"family": self.case.family, **self.model, **self.case.options}

    def finetune(self, folder: Path, **values: Any) -> Run:
        return finetune(self.dataset, folder, **{**self.options, **values})

    def after(self, file: Path) -> dict[str, Any]:
        """The options of a run that begins with a saved file."""
        pipeline = self.ground / "model" / "pipeline"
        for tokenizer in [*pipeline.glob("tokenizer*"), *(self.ground / "model").glob("tokenizer*")]:
            shutil.copytree(tokenizer, file.parent / tokenizer.name, dirs_exist_ok=True)
        others = {option: pipeline / folder for option, folder in SEPARATE.get(self.name, {}).items()}
        return {"pretrained_model_name_or_path": file, **others}


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    ground = tmp_path_factory.mktemp("family")
    data = write_dataset(ground / "one_batch.toml", subset(make_pictures(ground / "pictures", 2)))
    case = CASES[request.param]
    return Subject(request.param, case, case.make(ground / "model"), data, ground)


@dataclass(frozen=True)
class Plain:
    """A run of two steps without further options, with which other runs are compared."""

    run: Run
    begun: dict[str, Tensor]  # what learns, before the first step
    frozen: dict[str, Tensor]  # what does not
    adapters: dict[str, Tensor]  # a LoRA of the same model, which names its layers


@pytest.fixture(scope="module")
def plain(subject: Subject) -> Plain:
    begun = Begun()
    run = subject.finetune(subject.ground / "plain", max_train_steps=2, keep_gradients=True, before=begun)
    network = train(None, subject.dataset, subject.ground / "network", **subject.options, max_train_steps=1)
    return Plain(run, begun.learning, begun.frozen, network.weights)


class Begun:
    """Copies of all weights as they are before the first step."""

    learning: dict[str, Tensor]
    frozen: dict[str, Tensor]

    def __call__(self, trainer: Recorded) -> None:
        self.learning = {name: value.clone() for name, value in trainer.trainables.state().items()}
        self.frozen = {name: value.clone() for name, value in not_learning(trainer).items()}


def not_learning(trainer: Recorded) -> dict[str, Tensor]:
    models = {"vae": trainer.models.vae, **trainer.models.encoders}
    return {f"{n}.{k}": v for n, m in models.items() if m is not None for k, v in m.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference, relative to the largest gradient of all."""
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    wrong = {k: float((ours[k] - theirs[k]).abs().max()) / largest for k in ours}
    assert max(wrong.values()) < tolerance, max(wrong.items(), key=lambda item: item[1])


def published_gradients(run: Run, file: Path) -> dict[str, Tensor]:
    """The gradients of the first step under the names of adapters: written and read back as if they were a model."""
    trainer = run.trainer
    denoiser = copy.deepcopy(trainer.models.denoiser)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            parameter.copy_(trainer.gradients[0].get(f"denoiser.{name}", torch.zeros(())))
    trainer.family.save(denoiser, {}, file, CheckpointForm())
    own = {name: p.detach() for name, p in denoiser.named_parameters()}
    published = {re.sub(r"^(model\.diffusion_model|net)\.", "", key): value for key, value in load_file(file).items()}
    return {DENOISER + k.removesuffix(".weight").replace(".", "_"): v for k, v in {**own, **published}.items()}


def test_one_step_equals_the_literal_reference(subject: Subject, plain: Plain, tmp_path: Path) -> None:
    run = plain.run
    adapters = open_adapters(plain.adapters, (DENOISER,))
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = subject.case.loss({**subject.model, **subject.case.options}, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    ups = {k.removesuffix(".lora_up.weight"): v for k, v in adapters.items() if k.endswith("up.weight")}
    expected = {name: torch.zeros_like(up) if up.grad is None else up.grad for name, up in ups.items()}
    found = published_gradients(run, tmp_path / "gradients.safetensors")
    assert len(expected) > 10
    assert_close({k: found[k].view_as(v) for k, v in expected.items()}, expected, TOLERANCE)


@pytest.mark.parametrize("subject", TEACHABLE, indirect=True)
def test_text_encoders_learn_as_the_literal_reference_and_are_saved(
    subject: Subject, plain: Plain, tmp_path: Path
) -> None:
    """As bits: with recomputed activations, stopped and resumed, and begun anew with the saved file."""
    values = {
        **subject.options, "train_text_encoder": True, "gradient_checkpointing": True, "save_state": True,
        "max_train_steps": 3,
    }  # fmt: skip
    run = finetune(subject.dataset, tmp_path / "whole", keep_gradients=True, **values)
    assert_text_gradients_of_the_reference(subject, run, plain.adapters)
    if subject.name not in FORMATS:
        return
    assert_same_run(finetune_with_stop(subject.dataset, tmp_path / "stopped", 1, **values), run)
    begun = Begun()
    again = {**values, **subject.after(run.file), "max_train_steps": 1}
    finetune(subject.dataset, tmp_path / "again", before=begun, **again)
    ended = run.trainer.trainables.state()
    assert {name.split(".")[0] for name in ended} == {"denoiser", *run.trainer.family.encoders}
    assert_equal(begun.learning, ended)


def assert_text_gradients_of_the_reference(subject: Subject, run: Run, network: dict[str, Tensor]) -> None:
    prefixes = dict(run.trainer.family.sheet.adapter_prefixes)
    adapters = open_adapters(network, tuple(f"{prefix}_" for prefix in prefixes.values()))
    batch = run.trainer.data.load(run.trainer.data.plan_epoch(1)[0], step=0)
    loss = subject.case.loss({**subject.model, **subject.case.options}, batch, adapters, micro_generator(run, 0))
    loss.backward()
    assert run.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found = {
        f"{prefixes[part]}_text_model_{path.removeprefix('text_model.').removesuffix('.weight').replace('.', '_')}": g
        for part, _, path, g in ((*name.partition("."), g) for name, g in run.trainer.gradients[0].items())
        if part in prefixes
    }
    ups = {k.removesuffix(".lora_up.weight"): v.grad for k, v in adapters.items() if k.endswith("up.weight")}
    expected = {name: gradient for name, gradient in ups.items() if gradient is not None}
    assert {name.partition("_text")[0] for name in expected} == set(prefixes.values())
    assert_close({name: found[name] for name in expected}, expected, TOLERANCE)


@pytest.mark.parametrize("subject", FORMATS, indirect=True)
def test_other_formats_hold_the_same(subject: Subject, plain: Plain, tmp_path: Path) -> None:
    """A run that begins with them begins with the weights of the run that saved them, each format from the last."""
    values: dict[str, Any] = {"max_train_steps": 1, "learning_rate": 1e-30}
    model = subject.after(plain.run.file)
    for kind in ("ckpt", "diffusers", "diffusers_safetensors", "safetensors"):
        begun, folder = Begun(), tmp_path / kind
        subject.finetune(folder, before=begun, save_model_as=kind, **model, **values)
        assert_equal(begun.learning, plain.run.trainer.trainables.state())
        saved = folder / ("x.ckpt" if kind == "ckpt" else "x")
        model = subject.after(saved) if kind == "ckpt" else {"pretrained_model_name_or_path": saved}


@pytest.mark.parametrize("subject", [name for name in CASES if name not in VARIANTS], indirect=True)
def test_overfits_one_batch(subject: Subject, tmp_path: Path) -> None:
    """At one noise level, so that losses can be compared."""
    values = {"min_timestep": 700, "max_timestep": 700, "max_train_steps": 25, "learning_rate": 1e-2}
    losses = subject.finetune(tmp_path, **values).losses
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_cached_latents_and_texts_train_the_same(subject: Subject, plain: Plain, tmp_path: Path) -> None:
    """And the file says what it is, in the precision that was asked for."""
    values = {"cache_latents": True, "cache_text_encoder_outputs": True, "save_precision": "fp16"}
    run = subject.finetune(tmp_path, max_train_steps=2, **values)
    assert run.losses == pytest.approx(plain.run.losses, rel=TOLERANCE)
    assert run.trainer.models.vae is None and run.trainer.models.encoders == {}
    facts = run.trainer.family.facts()
    always = {
        "sai_model_spec",
        "architecture",
        "implementation",
        "title",
        "resolution",
        "date",
        "implementation_version",
    }
    assert run.metadata.keys() - {"modelspec.prediction_type"} == {f"modelspec.{name}" for name in always}
    assert run.metadata["modelspec.architecture"] == facts.architecture
    assert run.metadata["modelspec.implementation"] != "diffusers"
    assert {value.dtype for key, value in run.weights.items() if "first_stage" not in key} == {torch.float16}


def test_gradient_checkpointing_changes_nothing(subject: Subject, plain: Plain, tmp_path: Path) -> None:
    run = subject.finetune(tmp_path, gradient_checkpointing=True, max_train_steps=1, keep_gradients=True)
    assert run.losses == pytest.approx(plain.run.losses[:1], rel=1e-6)
    assert_close(run.trainer.gradients[0], plain.run.trainer.gradients[0], 1e-6)


def test_half_precision_trains_and_previews(subject: Subject, plain: Plain, tmp_path: Path) -> None:
    """Weights in float32 below computation in bf16, and everything in bf16."""
    (tmp_path / "prompts.txt").write_text("cat, red --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    values = {"max_train_steps": 2, "sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 2}
    for name, more in {"mixed": {"mixed_precision": "bf16"}, "full": HALF}.items():
        run = subject.finetune(tmp_path / name, **values, **more)
        assert run.losses == pytest.approx(plain.run.losses, rel=0.02)
        assert len(list((tmp_path / name).rglob("*.png"))) == 1


def test_saved_model_is_what_was_trained(subject: Subject, plain: Plain, tmp_path: Path) -> None:
    """A run that begins with the saved file begins with the same weights, bit for bit."""
    begun = Begun()
    again = subject.finetune(tmp_path, **subject.after(plain.run.file), max_train_steps=1, before=begun)
    assert_equal(begun.learning, plain.run.trainer.trainables.state())
    assert load_file(plain.run.file).keys() == load_file(again.file).keys()


def test_what_does_not_learn_stays(plain: Plain) -> None:
    assert_equal(not_learning(plain.run.trainer), plain.frozen)  # type: ignore[arg-type]
    ended = plain.run.trainer.trainables.state()
    assert any(not torch.equal(value, ended[name]) for name, value in plain.begun.items())


@pytest.mark.parametrize(("subject", "kind"), RESUMED, indirect=["subject"])
def test_resume_is_exact(kind: str, subject: Subject, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "three.toml", subset(make_pictures(tmp_path / "pictures", 5), shuffle_caption=True))
    more = {"ema_decay": 0.9} if kind == "float32 with ema" else {**HALF, "bf16_update": kind}
    values = {**subject.options, **more, "max_train_steps": 4, "save_state": True, "lr_scheduler": "cosine"}
    whole = finetune(data, tmp_path / "whole", save_every_n_steps=2, **values)
    resumed = finetune(data, tmp_path / "resumed", resume=whole.folder / "x-step00000002-state", **values)
    assert len(resumed.losses) == 2
    assert_same_run(resumed, whole)
    if kind != "float32 with ema":
        assert {p.dtype for p in whole.trainer.trainables.parameters()} == {torch.bfloat16}


def test_untrained_model_is_gone(subject: Subject, tmp_path: Path) -> None:
    """What would need it is refused before a model is loaded."""
    wanted = subset(subject.ground / "pictures", custom_attributes={"diff_output_preservation": True})
    data = write_dataset(tmp_path / "kept.toml", wanted)
    with pytest.raises(UserError, match=r"diff_output_preservation .*pictures.* full training"):
        finetune(data, tmp_path / "run", **subject.options)
    with pytest.raises(UserError, match=r"--masked_prior_weight needs the untrained model, which full training"):
        subject.finetune(tmp_path / "run", masked_prior_weight=1)
    with pytest.raises(UserError, match="all learning rates are 0"):
        subject.finetune(tmp_path / "run", learning_rate=0)
