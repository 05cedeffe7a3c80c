# SPDX-License-Identifier: Apache-2.0
"""Where memory runs out besides the passes of a step: in the recovery, in the optimizer, in previews and encoders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from library.cli import guarded
from library.memory.choice import MemoryChoice
from library.memory.compiling import CompiledBlocks
from library.memory.options import MemoryOptions
from library.trainers.memory import Memory
from library.types import Batch
from tests.trainers.finetune_runs import DEFAULTS as FULL
from tests.trainers.finetune_runs import make_finetune
from tests.trainers.helpers import DEFAULTS, Recorded, make_trainer, settle, subset, train, write_dataset


def run_out(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def prepared(values: dict[str, Any], before: Callable[[Any], None]) -> Recorded:
    """A run that something is done to before its first step."""
    trainer = make_trainer({**DEFAULTS, **values})
    trainer.before = before
    return trainer


def test_the_recovery_runs_out_of_memory_itself(
    sd1: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next way is taken; the step is taken again with the noise that it had, both micro-batches."""
    data = write_dataset(tmp_path / "data.toml", subset(pictures), batch_size=4)
    values = {"max_train_steps": 2, "gradient_accumulation_steps": 2}
    plain = train(sd1, data, tmp_path / "plain", **values)

    def before(trainer: Any) -> None:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(len(args[0] if args else kwargs["hidden_states"]))
            if torch.is_grad_enabled() and seen[-1] > 2:
                run_out()

        seen: list[int] = []
        trainer.models.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        trainer.memory.recomputation.set_budget = run_out

    own = {"pretrained_model_name_or_path": sd1, "dataset_config": data, "output_dir": tmp_path / "own"}
    trainer = prepared({**own, **values}, before)
    assert trainer.run() == 0
    settle()
    assert [report.loss for report in trainer.reports] == pytest.approx(plain.losses, rel=1e-5)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("out of memory")]
    assert len(lines) == 2 and "and again on the way to this: all activations" in lines[0]
    assert "2 samples at a time" in lines[1] and lines[1].endswith("the step is taken again")


def test_a_step_that_does_not_compile_is_taken_uncompiled(
    sd1: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a picture of another size comes, whose backward pass cannot be compiled."""
    plain = train(sd1, dataset, tmp_path / "plain", max_train_steps=2)

    def before(trainer: Any) -> None:
        compiled = trainer.memory.compiled = CompiledBlocks([nn.Identity()], "eager")

        def fail(gradient: Tensor) -> None:
            if trainer.position.step == 1 and not compiled.uncompilable():
                raise BackendCompilerFailed(len, OSError("file too short"), None)

        trainer.trainables.parameters()[0].register_hook(fail)

    own = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path / "own"}
    trainer = prepared({**own, "max_train_steps": 2}, before)
    assert trainer.run() == 0
    settle()
    assert [report.loss for report in trainer.reports] == plain.losses
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("--compile: ")]
    assert (
        line
        == "--compile: the blocks cannot be compiled and run without: backend='len' raised: OSError: file too short"
    )


@pytest.mark.parametrize("where", ["backward", "step"])
def test_a_step_that_is_half_done_is_not_taken_again(
    sd1: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """In the backward pass that steps weights, and in an optimizer's second step: one line, and nothing is saved."""
    fused = {"fused_backward_pass": True} if where == "backward" else {}
    own = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path, "save_state": True}
    trainer = make_finetune({**FULL, **own, **fused}, family="sd")

    def before(trainer: Any) -> None:
        optimizer, calls = trainer.updates.optim.optimizer, []
        step = optimizer.step

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return run_out() if len(calls) == 2 else step(*args, **kwargs)

        optimizer.step = failing
        if where == "step":
            trainer.updates.optimizer.step = failing

    trainer.before = before
    assert guarded(trainer.run) == 2
    settle()
    line = error_line(capsys)
    number = 1 if where == "backward" else 2
    assert f"step {number} (CUDA out of memory) when some weights may have been changed already" in line
    assert "--resume latest" in line and not [*tmp_path.glob("x*.safetensors")]


def test_what_only_looks_at_the_model_does_not_end_a_run(
    sd1: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Previews and validation that run out of memory are warnings; the VAE takes pictures one by one."""
    data = write_dataset(tmp_path / "data.toml", subset(pictures), validation_split=0.4, validation_seed=1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1 --w 64 --h 64", encoding="utf-8")
    values = {"max_train_steps": 2, "ema_decay": 0.9}
    plain = train(sd1, data, tmp_path / "plain", **values)
    sizes: list[int] = []

    def before(trainer: Any) -> None:
        encode = trainer.family.encode_image

        def one(vae: nn.Module, pixels: Tensor, seeds: list[int]) -> Tensor:
            sizes.append(len(seeds))
            return encode(vae, pixels, seeds) if len(seeds) == 1 else run_out()

        def look(*_: Any) -> None:
            if not torch.is_grad_enabled():
                run_out()

        trainer.family.encode_image = one
        trainer.models.denoiser.register_forward_pre_hook(look)

    own = {"pretrained_model_name_or_path": sd1, "dataset_config": data, "output_dir": tmp_path / "own"}
    more = {"sample_prompts": prompts, "sample_every_n_steps": 1, "validate_every_n_steps": 1}
    trainer = prepared({**own, **values, **more}, before)
    assert trainer.run() == 0
    settle()
    assert [report.loss for report in trainer.reports] == pytest.approx(plain.losses, rel=1e-5)
    assert {1, 2} <= set(sizes) and trainer.trainables.module.training
    lines = [record.getMessage() for record in caplog.records]
    assert sum("no validation loss at step" in line for line in lines) == 2
    assert sum("1 of 1 previews failed" in line for line in lines) == 2


class Blocks(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, size, bias=False) for size in sizes).requires_grad_(False)


class Family:
    """What Memory asks of a family."""

    def blocks(self, denoiser: Blocks) -> list[nn.Module]:
        return [*denoiser.blocks]

    def swapped(self, denoiser: Blocks, count: int, options: object = None) -> list[int]:
        return list(range(count))

    def most_swapped(self, denoiser: Blocks) -> int:
        return len(denoiser.blocks)


@pytest.mark.parametrize(
    "sizes, now, wanted",
    [
        ([8] * 8, 0, 3),  # a quarter would be two, which are as large as their slots
        ([8] * 8, 3, 5),
        ([8] * 8, 7, 8),
        ([8] * 8, 8, None),
        ([8] * 2, 0, None),  # only as many as there are slots
        ([8, 1, 1, 1, 1, 1, 1, 1, 1, 1], 0, 10),  # the large one makes large slots: 9 small ones are not enough
        ([1, 1, 1, 8], 3, None),  # the fourth makes the slots larger than what it saves
    ],
)  # fmt: skip
def test_only_more_blocks_that_save_more_are_tried(sizes: list[int], now: int, wanted: int | None) -> None:
    choice = MemoryChoice(activation_budget=0.0, blocks_to_swap=now)
    memory = Memory(Family(), Blocks(sizes), choice, MemoryOptions(), None, torch.device("cuda"))  # type: ignore[arg-type]
    assert [what.split()[0] for what, _ in memory.ways_to_shrink(1)] == ([] if wanted is None else [str(wanted)])


def test_offloading_knows_weights_that_an_exchange_has_moved() -> None:
    denoiser, device = Blocks([8] * 6), torch.device("cpu")
    choice = MemoryChoice(offload=True)
    memory = Memory(Family(), denoiser, choice, MemoryOptions(), None, device)  # type: ignore[arg-type]
    memory.exchange(5)
    memory.move_activations([])
    memory.exchange(2)  # three come back, to other addresses than those that they had at first
    assert memory.offload is not None and memory.swap is not None
    staying = {block.weight.untyped_storage().data_ptr() for block in denoiser.blocks[2:]}  # type: ignore[union-attr, operator]
    assert len(staying) == 4 and staying <= memory.offload.staying
    assert memory.swap.rest == (memory.offload.pack, memory.offload.unpack) and memory.choice.blocks_to_swap == 2


def test_batches_that_cannot_be_pinned_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error: refused")))
    batch = Batch(["a"], ["b"], torch.ones(1), latents=torch.ones(1, 4, 2, 2), cond={"text": torch.ones(1, 2)})
    pinned = batch.pin_memory()
    assert torch.equal(pinned.latents, batch.latents) and torch.equal(pinned.cond["text"], batch.cond["text"])  # type: ignore[index, arg-type]
