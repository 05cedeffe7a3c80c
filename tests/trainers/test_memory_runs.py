# SPDX-License-Identifier: Apache-2.0
"""Whole runs with the options of memory and speed, beside the same runs without: nothing else is learned."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from library.cli import guarded
from library.errors import UserError
from library.families.lumina.model import Lumina
from library.io.state import load_state, newest_state
from library.memory.compiling import missing_compiler
from library.planner.memory_plan import plan_memory
from tests.families import CASES
from tests.script_runner import run_script
from tests.trainers import child
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import (
    DEFAULTS,
    Recorded,
    Run,
    argv,
    assert_same_run,
    differing,
    make_pictures,
    make_trainer,
    planned_of,
    settle,
    subset,
    train,
    write_dataset,
)

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
LORA = {**CACHED, "network_train_unet_only": True}
SWAP = {"blocks_to_swap": 1}
SAVING = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, **SWAP}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny FLUX.1 with blocks enough to swap one."""
    make = CASES["flux"].make_deep
    assert make is not None
    return {"family": "flux", **make(tmp_path_factory.mktemp("deep")), **CASES["flux"].options}


# ---- full training of FLUX.1 ----------------------------------------------------------------------------------------


def test_double_and_single_blocks_are_swapped_by_number(deep: dict[str, Any], dataset: Path, tmp_path: Path) -> None:
    values = {**deep, **CACHED, "max_train_steps": 2, "fused_backward_pass": True}
    plain = finetune(dataset, tmp_path / "plain", **values)
    swapped = finetune(
        dataset, tmp_path / "swapped", double_blocks_to_swap=1, single_blocks_to_swap=1, **values
    )  # fmt: skip
    memory = swapped.trainer.memory
    assert memory.swap is not None and len(memory.swap.swapped) == 2
    assert swapped.losses == plain.losses and differing(swapped.weights, plain.weights) == []


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_swapped_weights_in_bf16_are_updated_as_others(
    rounding: str, deep: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    values = {
        **deep, **CACHED, "max_train_steps": 2, "fused_backward_pass": True, "mixed_precision": "bf16",
        "full_bf16": True, "bf16_update": rounding, "save_state": True,
    }  # fmt: skip
    plain = finetune(dataset, tmp_path / "plain", **values)
    assert_same_run(finetune(dataset, tmp_path / "swapped", **SWAP, **values), plain)


# ---- adapters that need weights to be there -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"hoist_modulation": True, "network_args": ["dora_wd=True"]},
            "--hoist_modulation: adapters that read weights",
        ),
        ({**SWAP, "network_args": ["ggpo_sigma=0.1", "ggpo_beta=0.1"]}, "--blocks_to_swap: ggpo_sigma and ggpo_beta"),
    ],
)
def test_adapters_that_read_weights_which_are_away(
    values: dict[str, Any], line: str, deep: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line):
        train(None, dataset, tmp_path / "out", **deep, **LORA, **values)


@pytest.mark.parametrize("args", [["dora_wd=True"], ["ggpo_sigma=0.1", "ggpo_beta=0.1"]])
def test_what_is_chosen_suits_the_adapters(
    args: list[str], deep: dict[str, Any], dataset: Path, tmp_path: Path
) -> None:
    """The planner offers nothing that the run would refuse."""
    own = {"dataset_config": dataset, "output_dir": tmp_path / "out", "vram_budget": "1GB", "network_args": args}
    values = {**DEFAULTS, **{name: value for name, value in deep.items() if name != "family"}, **LORA, **own}
    trainer = make_trainer({**values, "plan": True}, family="flux")
    assert trainer.run() == 0
    choices = [option.choice for option in plan_memory(planned_of(trainer)).options]
    assert {choice.hoist for choice in choices} == ({False} if "dora_wd=True" in args else {False, True})
    assert ({choice.blocks_to_swap for choice in choices} == {0}) == ("dora_wd=True" not in args)


# ---- text encoders in fewer bits ------------------------------------------------------------------------------------


def test_adapters_learn_on_text_encoders_in_8_bits(dataset: Path, sd1: Path, tmp_path: Path) -> None:
    plain = train(sd1, dataset, tmp_path / "plain", max_train_steps=2)
    small = train(sd1, dataset, tmp_path / "fp8", max_train_steps=2, fp8_base=True)
    (encoder,) = small.trainer.models.encoders.values()
    assert any(p.dtype == torch.float8_e4m3fn for p in encoder.parameters())
    moved = [
        name for name, value in small.weights.items() if name.startswith("lora_te") and "up" in name and value.any()
    ]
    assert moved and small.losses == pytest.approx(plain.losses, rel=0.05)


# ---- chosen by the run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"blocks_to_swap": "auto", "activation_budget": "auto", "compile": "auto"}, {"vram_budget": "4GB"}],
    ids=["auto", "budget"],
)
def test_chosen_for_this_machine(values: dict[str, Any], deep: dict[str, Any], dataset: Path, tmp_path: Path,
                                 caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """There is plenty for a tiny model: nothing is chosen, and the result is that of the plain run."""
    plain = train(None, dataset, tmp_path / "plain", max_train_steps=2, **deep, **LORA)
    with caplog.at_level(logging.INFO):
        chosen = train(None, dataset, tmp_path / "chosen", max_train_steps=2, **deep, **LORA, **values)
    assert "memory: (nothing): " in caplog.text and " predicted of " in caplog.text
    assert ("--compile auto: nothing is compiled: this run has no GPU" in caplog.text) == ("compile" in values)
    assert differing(chosen.weights, plain.weights) == []


PLANNED = {
    "train_network.py": "sd1", "sdxl_train_network.py": "sdxl", "flux_train.py": "flux", "sd3_train_network.py": "sd35",
    "lumina_train_network.py": "lumina", "anima_train_network.py": "anima",
}  # fmt: skip


@pytest.mark.parametrize("script", PLANNED)
def test_plan_writes_a_table_and_nothing_else(script: str, dataset: Path, tmp_path: Path) -> None:
    """The files of the model hold their headers and a hole, so that no weight can be read from them."""
    case = CASES[PLANNED[script]]
    model = {**case.make(tmp_path / "model"), **case.options}
    for file in (tmp_path / "model").rglob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    out = tmp_path / "out"
    network = {} if script == "flux_train.py" else {"network_dim": 4}
    own = {
        "dataset_config": dataset,
        "output_dir": out,
        "max_train_steps": 2,
        **network,
        "plan": True,
        "save_state": True,
    }
    ended = run_script(*argv({**model, **own}), script=script)
    assert ended.code == 0, ended.text
    assert "predicted peak of a step on the card, GB" in ended.text and "(nothing)" in ended.text
    assert not out.exists() or not any(out.iterdir())


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(missing_compiler("inductor", torch.device("cpu")) is not None, reason="needs a C++ compiler")
def test_compiled_runs_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By inductor, with all activations recomputed inside; the second run finds what the first has compiled, and the
    third, which finds half of it, compiles again.

    One block: each takes many seconds.
    """
    every = Lumina.blocks
    monkeypatch.setattr(Lumina, "blocks", lambda self, denoiser: every(self, denoiser)[-1:])
    case = CASES["lumina"]
    pictures = make_pictures(tmp_path / "pictures", 2, captions=["cat"])
    data = write_dataset(tmp_path / "data.toml", subset(pictures))
    model = {"family": case.family, **case.make(tmp_path / "model"), **case.options, **LORA}
    values = {**model, "max_train_steps": 2, "optimizer_type": "SGD", "learning_rate": 1.0}  # Adam enlarges noise
    values["gradient_checkpointing"] = True
    plain = train(None, data, tmp_path / "plain", **values)
    folder = tmp_path / "compiled"
    hits, written, archive = [], [], folder
    for name in ("first", "second", "third"):
        torch.compiler.reset()
        counters.clear()
        if name == "third":
            archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        run = train(None, data, tmp_path / name, compile=True, compile_cache_dir=folder, **values)
        compiled = run.trainer.memory.compiled
        assert compiled is not None and not any(kind.broken for kind in compiled.kinds)
        assert run.losses == pytest.approx(plain.losses, rel=1e-5)
        for key, value in plain.weights.items():
            assert torch.allclose(run.weights[key], value, rtol=1e-5, atol=1e-5), key
        (archive,) = folder.iterdir()
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
        written.append(archive.stat().st_mtime_ns)
        assert ("is damaged, everything is compiled again" in caplog.text) == (name == "third")
    torch.compiler.reset()
    assert hits[0] == hits[2] == 0 < hits[1]
    assert written[0] == written[1] < written[2]


# ---- previews and validation ----------------------------------------------------------------------------------------


def test_previews_and_validation_are_those_of_the_plain_run(
    deep: dict[str, Any], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_dataset(tmp_path / "data.toml", subset(pictures), validation_split=0.4)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    values = {
        **deep, **LORA, "max_train_steps": 2, "sample_prompts": prompts, "sample_every_n_steps": 1,
        "sample_at_first": True, "validate_every_n_steps": 1,
    }  # fmt: skip
    seen, shown = {}, {}
    ways = {"plain": {}, "saving": {**SAVING, "hoist_modulation": True}}
    for name, more in ways.items():
        caplog.clear()
        with caplog.at_level(logging.INFO):
            run = train(None, data, tmp_path / name, **values, **more)
        seen[name] = [float(r.getMessage().split()[2]) for r in caplog.records if "validation loss" in r.getMessage()]
        files = sorted((tmp_path / name / "sample").glob("*.png"))
        shown[name] = [torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8) for file in files]
        assert run.trainer.memory.hoisting is not None or name == "plain"
    assert len(seen["plain"]) == 2 and seen["saving"] == pytest.approx(seen["plain"], rel=1e-5)
    assert len(shown["plain"]) == len(shown["saving"]) >= 3
    for one, other in zip(shown["plain"], shown["saving"]):
        assert (one.int() - other.int()).abs().max() <= 1  # what is hoisted is multiplied in another order


# ---- processes ------------------------------------------------------------------------------------------------------


def test_two_processes_learn_the_same(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    """On a base in 8 bits, with blocks swapped and without: DDP leaves alone what does not learn."""

    def pair(name: str, **own: Any) -> list[dict[str, torch.Tensor]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path / name}
        values = {**DEFAULTS, **given, "max_train_steps": 3, **own}
        files = [tmp_path / f"{name} {rank}.safetensors" for rank in (0, 1)]
        both = [child.start(child.rank_of_two, rank, port, values, None, files[rank]) for rank in (0, 1)]
        codes = [child.exit_code(process) for process in both]
        assert codes == [0, 0], files[0].with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        return [load_file(file) for file in files]

    plain, swapped = pair("plain", fp8_base=True), pair("swapped", fp8_base=True, blocks_to_swap=4)
    assert differing(*swapped) == [] and differing(*plain) == []
    assert differing(swapped[0], plain[0]) == []


def test_killed_while_everything_is_on(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    saving = {**SAVING, "blocks_to_swap": 4, "fp8_base": True, "save_state": True, "max_train_steps": 8}
    whole = train(sd1, dataset, tmp_path / "whole", **saving)
    values = {**DEFAULTS, "pretrained_model_name_or_path": sd1, "dataset_config": dataset, **saving}
    folder, output = tmp_path / "killed", tmp_path / "output.txt"
    values |= {"output_dir": folder, "save_every_n_steps": 1}
    process = child.start(child.script, values, output)
    child.wait_until(lambda: len(child.states(folder)) > 1, process, output)
    process.kill()
    assert child.exit_code(process) == -signal.SIGKILL
    state = newest_state(folder, "x")
    assert state is not None and load_state(state).step < 8
    again = child.start(child.script, {**values, "resume": "latest"}, output)
    assert child.exit_code(again) == 0, output.read_text(encoding="utf-8")[-3000:]
    assert differing(load_file(folder / "x.safetensors"), whole.weights) == []


# ---- out of memory --------------------------------------------------------------------------------------------------


def out_of_memory(fails: Callable[[Any, int], bool], values: dict[str, Any], folder: Path) -> tuple[int, Run]:
    """The script's exit code and its run, whose passes with gradient run out of memory as long as `fails` says so.

    fails: of the run and the samples of a pass.
    """
    trainer = make_trainer({**DEFAULTS, **values, "output_dir": folder})

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and fails(trainer, len(latents)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def before(trainer: Recorded) -> None:
        trainer.models.denoiser.register_forward_pre_hook(look, with_kwargs=True)

    trainer.before = before
    return guarded(trainer.run), Run(trainer, 0, folder)


def test_a_run_that_does_not_fit_goes_on_smaller(
    sd1: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two times: what was kept is recomputed, and batches of four go in halves. No sample is lost."""
    data = write_dataset(tmp_path / "data.toml", subset(pictures), batch_size=4)
    values = {"pretrained_model_name_or_path": sd1, "dataset_config": data, "max_train_steps": 4}
    plain = train(sd1, data, tmp_path / "plain", max_train_steps=4)

    def fails(trainer: Any, samples: int) -> bool:
        keeps = trainer.memory.choice.activation_budget > 0
        return trainer.position.step >= 1 and (keeps or samples > 2)

    code, run = out_of_memory(fails, values, tmp_path / "small")
    assert code == 0
    assert run.losses == pytest.approx(plain.losses, rel=1e-5) and len(run.losses) == 4
    lines = [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "out of memory" in r.getMessage()
    ]
    assert lines == [
        "out of memory in step 2: all activations are recomputed from now on (--gradient_checkpointing); the step is "
        "taken again",
        "out of memory in step 3: batches go through the model 2 samples at a time from now on; the step is taken "
        "again",
    ]


def test_nothing_is_left_to_shrink(
    sd1: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with what was tried; what was learned before is there to go on from, with less."""
    values = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "max_train_steps": 3}
    code, run = out_of_memory(lambda trainer, samples: trainer.position.step >= 2, values, tmp_path / "out")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and line.startswith("error: out of memory in step 3 (CUDA out of memory), also after this: all ")
    assert "(--gradient_checkpointing). Give --vram_budget" in line
    assert not run.file.exists() and run.names("*.safetensors") == ["x-step00000002.safetensors"]
    plain = train(sd1, dataset, tmp_path / "plain", max_train_steps=3, save_state=True)
    whole = train(sd1, dataset, tmp_path / "out", max_train_steps=3, save_state=True, resume="latest")
    assert whole.losses == pytest.approx(plain.losses[2:], rel=1e-5)


def test_an_encoder_that_does_not_fit_encodes_on_the_cpu(
    sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"max_train_steps": 2, **LORA}
    plain = train(sd1, dataset, tmp_path / "plain", cache_dir=tmp_path / "one", **values)
    own = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path / "small"}
    trainer = make_trainer({**DEFAULTS, **own, "cache_dir": tmp_path / "two", **values})
    load = trainer.family.load_text_encoder

    def small_card(name: str, dtype: Any, device: Any, **more: Any) -> nn.Module:
        """No text encoder fits on it; "cpu" as a word is where it is loaded then."""
        if not isinstance(device, str):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return load(name, dtype, device, **more)

    trainer.family.load_text_encoder = small_card
    assert trainer.run() == 0
    settle()
    assert Run(trainer, 0, tmp_path / "small").losses == plain.losses
    assert "clip does not fit on the card: it encodes the captions on the CPU, once" in caplog.text


# ---- other methods --------------------------------------------------------------------------------------------------


def losses_of(method: str, family: str, values: dict[str, Any]) -> list[float]:
    """The losses of a run of any method."""
    trainer = make_trainer(values, family=family, method=method)
    assert trainer.run() == 0
    settle()
    return [report.loss for report in trainer.reports]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "textual_inversion": ("sd1", {"token_string": "zapcat", "use_object_template": True, "learning_rate": 1e-2}),
    "lllite": ("sdxl", {"network_dim": 4, "cond_emb_dim": 8, "learning_rate": 1e-2}),
    "dreambooth": ("sd1", {"learning_rate": 1e-4, "fused_backward_pass": True, "save_model_as": "safetensors"}),
}


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods(method: str, pictures: Path, tmp_path: Path) -> None:
    name, own = OTHERS[method]
    case = CASES[name]
    more = {"conditioning_data_dir": str(make_pictures(tmp_path / "controls", 5))} if method == "lllite" else {}
    values = {
        **case.make(tmp_path / "model"), **case.options, **own, "output_name": "x", "seed": 7, "max_train_steps": 2,
        "max_data_loader_n_workers": 0,
        "dataset_config": write_dataset(tmp_path / "data.toml", subset(pictures, **more)),
    }  # fmt: skip
    run = lambda folder, **extra: losses_of(method, case.family, {**values, "output_dir": tmp_path / folder, **extra})
    plain = run("plain")
    assert len(plain) == 2
    assert run("swapped", blocks_to_swap=2) == plain
    assert run("recomputed", activation_budget=0.5) == pytest.approx(plain, rel=1e-5)
    if method == "dreambooth":
        with pytest.raises(UserError, match="--fp8_base is for frozen models"):
            run("fp8", fp8_base=True)
    else:
        assert run("fp8", fp8_base=True) == pytest.approx(plain, rel=0.05)
