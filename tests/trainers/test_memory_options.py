# SPDX-License-Identifier: Apache-2.0
"""What a user can do wrong with the options of memory and speed: one clear line each, before a weight is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from library.cli import METHODS, guarded
from library.errors import UserError
from library.families.registry import FAMILIES
from library.memory.options import GIB
from library.options import resolve
from tests.families import CASES, flux, sd3
from tests.trainers.finetune_runs import make_finetune
from tests.trainers.helpers import argv, make_trainer, subset, write_dataset

NETWORK = {"network_dim": 2, "network_alpha": 1}
FULL = {"save_model_as": "safetensors"}
UNET_ONLY = {"network_train_unet_only": True}


def problems(method: str, family: str, **values: Any) -> list[str]:
    """What the options alone are told."""
    given = {"pretrained_model_name_or_path": "x", "output_dir": "y", "train_data_dir": "z", **values}
    if family == "sd" and method == "textual_inversion":
        given["token_string"] = "word"
    try:
        resolve(METHODS[method][1], FAMILIES[family].option_groups, argv(given), prog="test")
    except UserError as error:
        return list(error.problems)
    return []


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("vram_budget", "12XB", "--vram_budget expects an amount of memory such as 12GB, got '12XB'"),
        ("vram_budget", "auto", "--vram_budget expects an amount of memory such as 12GB, got 'auto'"),
        ("vram_budget", "3 cards", "--vram_budget expects an amount of memory such as 12GB, got '3 cards'"),
        ("vram_budget", "1MB", "--vram_budget must be at least"),
        ("activation_budget", "2", "--activation_budget expects a number from 0 to 1, or auto, got '2'"),
        ("activation_budget", "half", "--activation_budget expects a number from 0 to 1, or auto, got 'half'"),
        ("activation_budget", "nan", "--activation_budget expects a number from 0 to 1, or auto, got 'nan'"),
        ("blocks_to_swap", "all", "--blocks_to_swap expects a number of blocks, or auto, got 'all'"),
        ("blocks_to_swap", "-1", "--blocks_to_swap expects a number of blocks, or auto, got '-1'"),
        ("blocks_to_swap", "1.5", "--blocks_to_swap expects a number of blocks, or auto, got '1.5'"),
        ("compile", "sometimes", "--compile expects true, false or auto, got 'sometimes'"),
        ("base_quant", "nf5", "--base_quant 'nf5' is not one of int8, nf4. Did you mean 'nf4'?"),
        ("dynamo_backend", "inducktor", "--dynamo_backend 'inducktor' is not one of"),
    ],
)
def test_wrong_texts(name: str, text: str, line: str) -> None:
    (found,) = problems("network", "flux", **{name: text})
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12", 12 * GIB), ("12GB", 12 * GIB), ("11.5 GiB", 23 * GIB // 2), (".5g", GIB // 2), ("800 MB", 800 << 20)],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    values = argv({"pretrained_model_name_or_path": "x", "output_dir": "y", "vram_budget": text})
    options = resolve(
        METHODS["network"][1], FAMILIES["flux"].option_groups, [*values, "--train_data_dir", "z"], prog=""
    )
    assert options.options.memory.vram_budget == size


# ---- combinations that options alone show ---------------------------------------------------------------------------


TOGETHER: list[tuple[dict[str, Any], str]] = [
    (
        {"gradient_checkpointing": True, "activation_budget": 0.5},
        "--gradient_checkpointing is --activation_budget 0: give one of them",
    ),
    (
        {"gradient_checkpointing": True, "activation_budget": "auto"},
        "--gradient_checkpointing is --activation_budget 0: give one of them",
    ),
    (
        {"cpu_offload_checkpointing": True},
        "--cpu_offload_checkpointing has no effect without --gradient_checkpointing",
    ),
    (
        {"cpu_offload_checkpointing": True, "activation_budget": 1},
        "--cpu_offload_checkpointing has no effect without --gradient_checkpointing",
    ),
    (
        {"base_quant": "int8", "fp8_base": True},
        "--base_quant and --fp8_base each say how the denoiser is kept: give one of them",
    ),
    (
        {"base_quant": "nf4", "fp8_base_unet": True},
        "--base_quant and --fp8_base_unet each say how the denoiser is kept: give one of them",
    ),
    (
        {"torch_compile": True, "dynamo_backend": "no"},
        "--dynamo_backend no switches compilation off: leave one of them out",
    ),
    (
        {"compile": True, "dynamo_backend": "nvprims_nvfuser"},
        "--dynamo_backend nvprims_nvfuser is gone from torch: use inductor",
    ),
    ({"compile_cache_dir": "folder"}, "--compile_cache_dir has no effect without --compile"),
    (
        {"torch_compile": True, "compile": "auto"},
        "--torch_compile compiles in any case, --compile auto only where it pays: give one of them",
    ),
    (
        {"compile": "auto", "dynamo_backend": "no"},
        "--dynamo_backend no switches compilation off: leave one of them out",
    ),
    (
        {"plan": True, "resume": "latest"},
        "--plan looks at a run from its start: leave out --resume, what a step takes is the same",
    ),
]


@pytest.mark.parametrize(("values", "line"), TOGETHER)
def test_what_does_not_go_together(values: dict[str, Any], line: str) -> None:
    assert problems("network", "flux", **values) == [line]


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_checkpointing": True, "activation_budget": 0},
        {"gradient_checkpointing": True, "cpu_offload_checkpointing": True},
        {"activation_budget": "auto", "cpu_offload_checkpointing": True},
        {"fp8_base": True, "fp8_base_unet": True},
        {"dynamo_backend": "no"},
        {"compile": "auto", "compile_cache_dir": "folder"},
        {"blocks_to_swap": 0, "vram_budget": "12GB", "plan": True},
    ],
)
def test_what_does(values: dict[str, Any]) -> None:
    assert problems("network", "flux", **values) == []


# ---- what model and method allow ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Tiny models by family, with blocks enough to swap one, and a cached FLUX.1 without text encoders that learn."""
    folder = tmp_path_factory.mktemp("models")
    deep = flux.CASES["flux"].make_deep
    assert deep is not None
    chroma = CASES["chroma"]
    return {
        "flux": {**deep(folder / "flux"), **flux.CASES["flux"].options},
        "chroma": {**chroma.make(folder / "chroma"), **chroma.options},
        "sd3": {**sd3.CASES["sd35"].make(folder / "sd3"), **sd3.CASES["sd35"].options},
    }


@dataclass(frozen=True)
class Refused:
    """Options of a run, and the one line that it ends with."""

    model: str
    method: str
    values: dict[str, Any]
    line: str

    @property
    def family(self) -> str:
        return "flux" if self.model == "chroma" else self.model


def lora(model: str, line: str, **values: Any) -> Refused:
    return Refused(model, "network", {**NETWORK, **UNET_ONLY, **values}, line)


def full(model: str, line: str, **values: Any) -> Refused:
    return Refused(model, "finetune", {**FULL, **values}, line)


IS_FROZEN = "is for frozen models, and here the denoiser's own weights learn: leave it out"
FUSED = {"fused_backward_pass": True}

REFUSED = {
    "fp8 and full training": full("flux", f"--fp8_base {IS_FROZEN}", fp8_base=True),
    "int8 and full training": full("flux", f"--base_quant {IS_FROZEN}", base_quant="int8"),
    "DeepSpeed": lora(
        "flux", "--blocks_to_swap does not work with --deepspeed, which moves weights itself",
        deepspeed=True, blocks_to_swap=1,
    ),
    "DeepSpeed and hoisting": lora(
        "flux", "--hoist_modulation does not work with --deepspeed, which moves weights itself",
        deepspeed=True, hoist_modulation=True,
    ),
    "DeepSpeed and a chosen swap": lora(
        "flux", "--blocks_to_swap does not work with --deepspeed, which moves weights itself",
        deepspeed=True, blocks_to_swap="auto",
    ),
    "swapping and an average": full(
        "flux", "--ema_decay looks at all weights in each step, which --blocks_to_swap takes off the card",
        blocks_to_swap=1, ema_decay=0.9, **FUSED,
    ),
    "hoisting in full training": full(
        "flux", "--hoist_modulation is for adapters: here the modulation's own weights learn", hoist_modulation=True
    ),
    "hoisting with text encoders": lora(
        "flux",
        "--hoist_modulation needs text encoders that do not learn: add --network_train_unet_only, or leave it out",
        hoist_modulation=True, network_train_unet_only=False,
    ),
    "hoisting in Chroma": lora(
        "chroma", "--hoist_modulation: this model has no modulation layers in its blocks; leave it out",
        hoist_modulation=True,
    ),
    "too many blocks": lora(
        "flux", "--blocks_to_swap 9: at most 2 blocks of this model can be swapped", blocks_to_swap=9
    ),
    "too many double blocks": full(
        "flux", "--double_blocks_to_swap 2: at most 1 blocks of this model can be swapped",
        double_blocks_to_swap=2, **FUSED,
    ),
    "too many single blocks": full(
        "flux", "--single_blocks_to_swap 3: at most 2 blocks of this model can be swapped",
        single_blocks_to_swap=3, **FUSED,
    ),
    "two ways to count": full(
        "flux", "--blocks_to_swap says how many double and single blocks are swapped: leave out "
        "--double_blocks_to_swap and --single_blocks_to_swap",
        blocks_to_swap=1, double_blocks_to_swap=1, **FUSED,
    ),
    "counted and chosen": full(
        "flux", "--blocks_to_swap auto chooses how many blocks are swapped: leave out --double_blocks_to_swap and "
        "--single_blocks_to_swap",
        blocks_to_swap="auto", single_blocks_to_swap=1, **FUSED,
    ),
    "fused and an optimizer that looks at everything": full(
        "flux", "--fused_backward_pass steps weights one after the other, and Prodigy needs all of them at once: leave "
        "one of them out, or use AdamW, AdamW8bit, Adafactor or Lion",
        optimizer_type="Prodigy", **FUSED,
    ),
    "fused and fp16": full(
        "flux", "--fused_backward_pass does not work with --mixed_precision fp16: only after the whole backward pass "
        "is it known whether the scaled gradients are finite; use bf16",
        mixed_precision="fp16", **FUSED,
    ),
    "fused and DeepSpeed": full(
        "flux", "--fused_backward_pass does not work with --deepspeed, which steps the weights itself",
        deepspeed=True, **FUSED,
    ),
}  # fmt: skip


def refused(trainer: Any, output: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines with which a run ends that nothing was read for."""
    assert guarded(trainer.run) == 2
    assert trainer.loop is None
    assert not output.exists() or not any(output.iterdir())
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def trainer_of(case: Refused, models: dict[str, dict[str, Any]], dataset: Path, output: Path) -> Any:
    own = {"dataset_config": dataset, "output_dir": output, "output_name": "x", "max_train_steps": 1, "seed": 7}
    values = {**models[case.model], **own, "max_data_loader_n_workers": 0, **case.values}
    make: Callable[..., Any] = make_trainer if case.method == "network" else make_finetune
    return make(values, family=case.family)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(
    name: str, models: dict[str, dict[str, Any]], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = REFUSED[name]
    found = refused(trainer_of(case, models, dataset, tmp_path / "out"), tmp_path / "out", capsys)
    own = [line for line in found if "the package is not installed" not in line]
    assert len(own) == 1 and own[0].startswith(case.line), found


def test_nothing_fits(
    models: dict[str, dict[str, Any]], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = write_dataset(tmp_path / "data.toml", subset(pictures), resolution=1024, batch_size=5)
    case = lora("flux", "", vram_budget="64MB")
    (line,) = refused(trainer_of(case, models, large, tmp_path / "out"), tmp_path / "out", capsys)
    assert line.startswith("--vram_budget: nothing fits in 0.06 GB; the smallest that was found takes ")
    assert "(--fp8_base_unet" in line and "a smaller --resolution or --train_batch_size" in line


def test_nf4_without_bitsandbytes(
    models: dict[str, dict[str, Any]], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # what an import of it then meets
    trainer = trainer_of(lora("flux", "", base_quant="nf4"), models, dataset, tmp_path / "out")
    assert refused(trainer, tmp_path / "out", capsys) == [
        "--base_quant nf4 needs bitsandbytes: pip install bitsandbytes"
    ]


def test_the_folder_of_compiled_blocks_is_a_file(
    models: dict[str, dict[str, Any]], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    trainer = trainer_of(lora("flux", "", compile=True, compile_cache_dir=file), models, dataset, tmp_path / "out")
    assert refused(trainer, tmp_path / "out", capsys) == [f"--compile_cache_dir: {file} is a file; a folder is needed"]


def test_a_model_that_is_not_there_is_told_once(
    models: dict[str, dict[str, Any]], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"pretrained_model_name_or_path": tmp_path / "gone.safetensors", "blocks_to_swap": 1}
    trainer = trainer_of(lora("flux", "", **gone, hoist_modulation=True), models, dataset, tmp_path / "out")
    (line,) = refused(trainer, tmp_path / "out", capsys)
    assert "gone.safetensors" in line
