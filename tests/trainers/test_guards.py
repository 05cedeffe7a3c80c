# SPDX-License-Identifier: Apache-2.0
"""A run that diverges stops and overwrites nothing; modules that never learn are named."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.cli import EXIT_DIVERGED, guarded
from library.errors import StopTraining, UserError
from library.trainers.guards import MOST_SKIPS, GradientWatch, MovingAverage, StepReader
from tests.trainers.helpers import differing, make_pictures, subset, train, write_dataset


def test_diverged_run_stops_and_leaves_the_earlier_file(
    sd1: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = train(sd1, dataset, tmp_path, max_train_steps=1, save_state=True)
    before = good.file.read_bytes()
    values: dict[str, Any] = {"learning_rate": 1e30, "save_every_n_steps": 1, "save_state": True, "max_train_steps": 6}
    code = guarded(lambda: train(sd1, dataset, tmp_path, **values).code)
    assert code == EXIT_DIVERGED == 4
    told = capsys.readouterr().err
    assert "stopped: the loss of step 2 is not finite (loss nan" in told or "(loss inf" in told
    assert "Its pictures: " in told and "/p0" in told and "Likely causes: a learning rate that is too high" in told
    assert good.file.read_bytes() == before and good.state.step == 1
    # what was saved after step 1 is finite, if anything was
    for file in tmp_path.glob("x-step*.safetensors"):
        assert all(bool(torch.isfinite(value).all()) for value in load_file(file).values())


def test_weights_that_are_not_finite_are_not_saved(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """The last step's loss is still finite; its weights are not."""

    def spoil(trainer: Any) -> None:
        next(trainer.network.parameters()).data.fill_(math.inf)

    good = train(sd1, dataset, tmp_path, max_train_steps=1)
    before = good.weights
    with pytest.raises(StopTraining, match=r"is not written: 1 of .* tensors are not finite"):
        train(sd1, dataset, tmp_path, max_train_steps=1, each_step=spoil)
    assert differing(good.weights, before) == []


def test_not_finite_gradients_stop_although_the_loss_is_finite(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    def spoil(trainer: Any) -> None:
        """The gradients of the next step become NaN on their way back."""
        spoiled = lambda module, of_inputs, of_outputs: tuple(gradient * math.nan for gradient in of_inputs)
        trainer.models.denoiser.conv_out.register_full_backward_hook(spoiled)

    with pytest.raises(StopTraining, match="the gradient norm of step 2 is not finite"):
        train(sd1, dataset, tmp_path, each_step=spoil)
    assert not (tmp_path / "x.safetensors").exists()


def test_picture_of_a_diverged_step_is_named(sd1: Path, tmp_path: Path) -> None:
    """Names come with their folders: the same name may be in several."""
    data = write_dataset(tmp_path / "d.toml", subset(make_pictures(tmp_path / "only", 1)))
    with pytest.raises(StopTraining, match=r"Its pictures: .*/only/p00\.png\."):
        train(sd1, data, tmp_path / "out", learning_rate=1e30)


def test_dead_modules_are_named_at_the_first_save(
    sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With --clip_skip 2 of three layers the last one gets no gradient."""
    caplog.set_level(logging.WARNING, "trainyard")
    train(sd1, dataset, tmp_path / "dead", clip_skip=2, max_train_steps=2, save_every_n_steps=1)
    told = [r.message for r in caplog.records if "never received a gradient" in r.message]
    assert told == [
        "6 trainable modules never received a gradient: lora_te_text_model_encoder_layers_2_mlp_fc1, "
        "lora_te_text_model_encoder_layers_2_mlp_fc2, lora_te_text_model_encoder_layers_2_self_attn_k_proj and 3 more"
    ]
    caplog.clear()
    train(sd1, dataset, tmp_path / "alive", max_train_steps=1)
    assert caplog.records == []


def test_watch_hears_the_first_gradient_only() -> None:
    modules = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)}
    watch = GradientWatch({name: list(module.parameters()) for name, module in modules.items()})
    for _ in range(2):
        modules["a"](torch.ones(1, 2)).sum().backward()
    assert watch.stop() == ["b"]
    modules["b"](torch.ones(1, 2)).sum().backward()
    assert watch.stop() == ["b"]


def test_reader_lets_the_scaler_skip() -> None:
    """fp16: a gradient that is not finite is the scaler's business, a loss is not."""
    reader = StepReader(lag=4)
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    reader.push(1, one, inf, ["a.png"], own_loss=one, scaler_skips=True, others={"x": torch.tensor(2.0)})
    (report,) = reader.flush()
    assert (report.step, report.loss, report.others) == (1, 1.0, {"x": 2.0}) and math.isinf(report.grad_norm)
    reader.push(2, one, inf, ["a.png"], own_loss=one, scaler_skips=False, others={})
    with pytest.raises(StopTraining, match="the gradient norm of step 2"):
        reader.arrived()
    reader.push(3, inf, one, ["a.png"], own_loss=inf, scaler_skips=True, others={})
    with pytest.raises(StopTraining, match=r"the loss of step 3 .* Its pictures: a\.png\.") as stopped:
        reader.flush()
    assert stopped.value.only_here
    reader.push(4, inf, one, ["a.png"], own_loss=one, scaler_skips=True, others={})
    with pytest.raises(StopTraining, match="Its pictures: in another process's batch") as stopped:
        reader.flush()
    assert not stopped.value.only_here


def test_a_scaler_that_skips_for_ever_stops() -> None:
    """fp16: what no scale mends is a diverged run; a good step in between begins the count anew."""
    reader = StepReader(lag=0)
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    norms = [inf] * MOST_SKIPS + [one] + [inf] * MOST_SKIPS
    for step, norm in enumerate(norms, start=1):
        reader.push(step, one, norm, ["a.png"], own_loss=one, scaler_skips=True, others={})
    assert len(reader.flush()) == len(norms)
    reader.push(len(norms) + 1, one, inf, ["a.png"], own_loss=one, scaler_skips=True, others={})
    with pytest.raises(StopTraining, match=f"the gradient norm of step {len(norms) + 1} is not finite"):
        reader.flush()


def test_moving_average() -> None:
    average = MovingAverage(3, [1.0, 2.0])
    assert average.mean == 1.5
    for value in (3.0, 4.0):
        average.add(value)
    assert average.mean == 3.0 and math.isnan(MovingAverage(3).mean)


def test_adapter_of_another_rank_is_a_user_error(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    run = train(sd1, dataset, tmp_path / "first", max_train_steps=1)
    with pytest.raises(UserError, match=rf"--network_weights {run.file}: .* rank 4, this network has 8"):
        train(sd1, dataset, tmp_path / "second", network_weights=run.file, network_dim=8)
    foreign = {key.replace("lora_unet_mid", "lora_unet_middle"): value for key, value in run.weights.items()}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"--network_weights .*foreign.safetensors: .* belong to no adapter here"):
        train(sd1, dataset, tmp_path / "third", network_weights=tmp_path / "foreign.safetensors")
