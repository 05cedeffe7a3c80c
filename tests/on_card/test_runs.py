# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the card: every architecture, and every way to save memory.

Further kinds of adapters, options and methods have theirs in test_no_waits.py, full training of every architecture in
test_planner.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import CASES
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import (
    Run,
    assert_same_run,
    train,
    train_with_stops,
)

pytestmark = pytest.mark.gpu

VARIANTS = (
    "sd2 v",
    "sdxl v",
    "lumina system prompt",
    "flux2 dev",
    "hunyuan_image distilled",
)  # denoisers that others have; test_no_waits.py has them
ARCHITECTURES = [name for name in CASES if name not in VARIANTS]
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
ADAFACTOR = {
    "optimizer_type": "Adafactor",
    "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
}

Make = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The options that name a tiny model of a case, with blocks enough to swap some; made once."""

    @functools.cache
    def make(name: str) -> dict[str, Any]:
        case = CASES[name]
        maker = case.make_deep or case.make
        return {"family": case.family, **maker(tmp_path_factory.mktemp("model")), **case.options}

    return make


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a cat --n dog --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    return file


def check(run: Run, steps: int = 2) -> None:
    """It ran on the card and learned something."""
    assert run.code == 0 and run.trainer.device.type == "cuda"
    assert len(run.losses) == steps and all(map(math.isfinite, run.losses))
    assert all(bool(tensor.float().isfinite().all()) for tensor in run.weights.values())


def moved(run: Run) -> bool:
    """Adapters begin at zero."""
    return any(bool(t.count_nonzero()) for name, t in run.weights.items() if "up" in name)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run on the CPU of the machine that has the card."""

    def run(function: Callable[..., Run], *args: Any, **values: Any) -> Run:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("ACCELERATE_USE_CPU", "1")
            return function(*args, **values)

    return run


# ---- architectures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_of_every_architecture(name: str, model: Make, dataset: Path, prompts: Path, tmp_path: Path) -> None:
    """With text encoders in the step, in bf16 and with previews; with everything cached, in fp16 with a scaler."""
    previews = {"sample_prompts": prompts, "sample_every_n_steps": 1, "sample_at_first": True}
    values = {**model(name), "max_train_steps": 2}
    uncached = train(None, dataset, tmp_path / "one", **values, mixed_precision="bf16", **previews)
    check(uncached)
    assert moved(uncached) and len(list((tmp_path / "one" / "sample").glob("*.png"))) >= 3
    cached = train(None, dataset, tmp_path / "two", **values, mixed_precision="fp16", **CACHED)
    check(cached)
    assert moved(cached)


@pytest.mark.parametrize(
    "name", ["chroma", "sd3", "sd35", "lumina", "anima", "sana", "flux2"]
)  # others: test_no_waits.py
def test_full_training_in_bf16(name: str, model: Make, dataset: Path, tmp_path: Path) -> None:
    check(finetune(dataset, tmp_path, **model(name), max_train_steps=2, mixed_precision="bf16", full_bf16=True))


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_losses_are_those_of_the_cpu(
    name: str, model: Make, dataset: Path, tmp_path: Path, on_cpu: Callable[..., Run]
) -> None:
    values = {**model(name), "max_train_steps": 3}
    for function in (functools.partial(train, None), finetune):
        card = function(dataset, tmp_path / "card", **values)
        cpu = on_cpu(function, dataset, tmp_path / "cpu", **values)
        assert card.trainer.device.type == "cuda" and cpu.trainer.device.type == "cpu"
        assert card.losses == pytest.approx(cpu.losses, rel=1e-4)


# ---- adapters -------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "tucker": {"network_args": ["use_tucker=True", "conv_dim=4"]},
    "norms": {"network_args": ["train_norm=True"], "scale_weight_norms": 1.0, "ema_decay": 0.9},
    "lycoris": {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "preset=unet-transformer-only"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str, model: Make, dataset: Path, tmp_path: Path) -> None:
    if kind == "lycoris":
        pytest.importorskip("lycoris")
    with torch.compiler.set_stance("force_eager"):  # LyCORIS compiles a function, which needs Triton on a card
        check(train(None, dataset, tmp_path, **model("sd1"), max_train_steps=2, **ADAPTERS[kind]))


def test_weights_are_loaded_or_merged(model: Make, dataset: Path, tmp_path: Path) -> None:
    first = train(None, dataset, tmp_path / "first", **model("sd1"), max_train_steps=2)
    loaded = {"network_weights": str(first.file), "dim_from_weights": True, "network_dim": None, "network_alpha": None}
    merged = {"base_weights": [str(first.file)], "base_weights_multiplier": [0.5]}
    for name, values in {"loaded": loaded, "merged": merged}.items():
        run = train(None, dataset, tmp_path / name, **model("sd1"), max_train_steps=2, **values)
        check(run)
        assert run.losses[0] < first.losses[0]


def test_resume_is_exact(model: Make, dataset: Path, tmp_path: Path) -> None:
    """Dropout draws from the card's own generator."""
    values = {
        **model("sd1"), "max_train_steps": 3, "save_state": True, "ema_decay": 0.9, "mixed_precision": "fp16",
        "network_dropout": 0.2,
    }  # fmt: skip
    whole = train(None, dataset, tmp_path / "whole", **values)
    assert_same_run(train_with_stops(None, dataset, tmp_path / "stopped", [1, 2], **values), whole)


# ---- memory ---------------------------------------------------------------------------------------------------------

SAVING: dict[str, dict[str, Any]] = {
    "recomputed": {"gradient_checkpointing": True},
    "budget": {"activation_budget": 0.5},
    "offloaded": {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
    "swapped": {"blocks_to_swap": 2},
    "hoisted": {"hoist_modulation": True},
    "all": {
        "gradient_checkpointing": True, "cpu_offload_checkpointing": True, "blocks_to_swap": 2,
        "hoist_modulation": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(model: Make, ground: Path, dataset: Path) -> Run:
    return train(None, dataset, ground / "plain", **model("flux"), **CACHED, max_train_steps=2)


@pytest.mark.parametrize("way", SAVING)
def test_every_way_to_save_memory(way: str, plain: Run, model: Make, dataset: Path, tmp_path: Path) -> None:
    run = train(None, dataset, tmp_path, **model("flux"), **CACHED, max_train_steps=2, **SAVING[way])
    check(run)
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("kind", ["fp8", "int8"])  # nf4 is the kernels of bitsandbytes: minutes on a CPU
def test_quantised_weights(kind: str, plain: Run, model: Make, dataset: Path, tmp_path: Path) -> None:
    """With blocks swapped: the host holds what the card does."""
    quantised = {"fp8_base": True} if kind == "fp8" else {"base_quant": kind}
    values = {**model("flux"), **CACHED, "max_train_steps": 2, "mixed_precision": "bf16", "blocks_to_swap": 2}
    run = train(None, dataset, tmp_path, **values, **quantised)
    check(run)
    assert run.losses == pytest.approx(plain.losses, rel=0.1)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_steps_in_the_backward_pass(rounding: str, model: Make, dataset: Path, tmp_path: Path) -> None:
    values = {
        **model("sd1"), **ADAFACTOR, "fused_backward_pass": True, "max_train_steps": 2, "mixed_precision": "bf16",
        "full_bf16": True, "bf16_update": rounding,
    }  # fmt: skip
    one = finetune(dataset, tmp_path / "one", **values)
    other = finetune(dataset, tmp_path / "other", **values, blocks_to_swap=4)
    check(one)
    assert other.losses == one.losses


# ---- races ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def races() -> Iterator[Any]:
    from tests.cuda_simulation.races import Races

    with Races() as races:
        yield races


@pytest.mark.simulated
def test_no_races_in_a_run_with_everything_on(
    model: Make, dataset: Path, prompts: Path, tmp_path: Path, races: Any
) -> None:
    values = {
        **model("flux"), **CACHED, **SAVING["all"], "fp8_base": True, "mixed_precision": "bf16", "max_train_steps": 3,
        "save_every_n_steps": 1, "save_state": True, "sample_prompts": prompts, "sample_every_n_steps": 2,
    }  # fmt: skip
    check(train(None, dataset, tmp_path, **values), steps=3)
    assert races.found == [] and races.checked > 10_000


@pytest.mark.simulated
def test_no_races_in_full_training_with_steps_in_the_backward_pass(
    model: Make, dataset: Path, tmp_path: Path, races: Any
) -> None:
    values = {
        **model("sd1"), **ADAFACTOR, "fused_backward_pass": True, "blocks_to_swap": 4, "save_state": True,
        "save_every_n_steps": 1, "max_train_steps": 3,
    }  # fmt: skip
    check(finetune(dataset, tmp_path, **values), steps=3)
    assert races.found == [] and races.checked > 10_000
