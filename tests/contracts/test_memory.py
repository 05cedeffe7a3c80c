# SPDX-License-Identifier: Apache-2.0
"""What saves memory or time must not change what is learned: every architecture, adapters and full training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.memory.block_swap import BlockSwap, spread
from library.memory.checkpointing import Recomputation
from library.memory.compiling import CompiledBlocks
from library.memory.ring import Ring, RingSlot
from tests.families import CASES
from tests.families.base import Case
from tests.trainers.finetune_runs import finetune
from tests.trainers.helpers import Run, assert_same_run, make_pictures, subset, train, write_dataset

CPU = torch.device("cpu")
METHODS = ("lora", "full")
OTHERS = (
    "sd2 v",
    "sdxl v",
    "lumina system prompt",
    "flux2 dev",
    "hunyuan_image distilled",
)  # denoisers that other cases have
NAMES = [name for name in CASES if name not in OTHERS]
FAMILIES = ("sd1", "sdxl", "flux", "sd3", "lumina", "anima", "flux2")  # one case of each, where a test takes long
FULL = [f"{name}, full" for name in FAMILIES]
# where a test takes very long: each denoiser and each method, but not every pair. SDXL has the blocks of SD 1.x
COMPILED = ["sdxl, lora", "flux, full", "sd3, lora", "lumina, lora"]
RESUMED = ["sdxl, lora", "flux, lora", "sd3, lora", "lumina, lora", "anima, lora", "sd1, full", "flux, full"]
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
HOISTABLE = ["flux, lora", "sd3, lora", "hunyuan_image, lora"]  # those with modulation layers in their blocks
# learning through a base in fewer bits: relative error of the first loss against the same run in bf16
QUANT_ERRORS = {"fp8": 0.05, "int8": 0.03, "nf4": 0.25}


class PoisonedRing(Ring):
    """Each slot is full of NaN before a block comes into it: whoever reads what was there before shows."""

    def emptied(self, slot: RingSlot) -> None:
        slot.memory.fill_(0xFF)


class PoisonedSwap(BlockSwap):
    ring_class = PoisonedRing


@dataclass(frozen=True)
class Subject:
    """A case, a method, and a dataset of two batches an epoch, two pictures each.

    Never one picture alone: products with a single row round differently with where a weight begins in memory.
    """

    name: str
    case: Case
    method: str
    model: dict[str, Any]
    dataset: Path
    ground: Path

    @property
    def options(self) -> dict[str, Any]:
        return {"family": self.case.family, **self.model, **self.case.options, **self.cached}

    @property
    def cached(self) -> dict[str, Any]:
        return CACHED if self.method == "lora" else {k: v for k, v in CACHED.items() if not k.startswith("network")}

    def train(self, folder: Path, **values: Any) -> Run:
        """Of `values` those apply that the method has."""
        if self.method == "lora":
            return train(None, self.dataset, folder, **{**self.options, "network_module": None, **values})
        return finetune(self.dataset, folder, **{**self.options, **values})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The options that name the model of a case; made once."""

    @functools.cache
    def make(name: str) -> dict[str, Any]:
        case = CASES[name]
        return (case.make_deep or case.make)(tmp_path_factory.mktemp("model"))

    return make


@pytest.fixture(scope="module", params=[f"{name}, {method}" for name in NAMES for method in METHODS])
def subject(
    request: pytest.FixtureRequest, model: Callable[[str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    name, method = request.param.split(", ")
    ground = tmp_path_factory.mktemp("memory")
    data = write_dataset(ground / "data.toml", subset(make_pictures(ground / "pictures", 4)))
    return Subject(request.param, CASES[name], method, model(name), data, ground)


@pytest.fixture(scope="module")
def started(subject: Subject) -> Run:
    """A run of one step, whose trainer goes on to be used. Its adapters are all far from zero."""
    run = subject.train(subject.ground / "started", max_train_steps=1, max_grad_norm=0)
    with torch.no_grad():
        for index, parameter in enumerate(run.trainer.trainables.parameters()):
            if subject.method == "lora":
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    return run


def one_step(run: Run, *, micro_batches: int = 1) -> tuple[float, list[Tensor | None]]:
    """Loss and gradients of the next step, without the step."""
    trainer = run.trainer
    trainer.updates.zero_gradients()
    plans = trainer.data.plan_epoch(1)[:micro_batches]
    batches = [trainer.data.load(plan, step=0) for plan in plans]
    shares = [replace(batch, share=1 / micro_batches) for batch in batches]

    def gradients() -> Tensor:
        return torch.stack([trainer.step.learn(batch, is_last=batch is shares[-1]) for batch in shares]).sum()

    total = trainer.step.retry(gradients, largest_batch=max(b.size for b in batches), step=trainer.position.step)
    return float(total), [None if p.grad is None else p.grad.clone() for p in trainer.trainables.parameters()]


def assert_equal(found: tuple[float, list[Tensor | None]], expected: tuple[float, list[Tensor | None]]) -> None:
    assert found[0] == expected[0]
    assert len(found[1]) == len(expected[1]) > 10
    for one, other in zip(found[1], expected[1]):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_close(found: tuple[float, list[Tensor | None]], expected: tuple[float, list[Tensor | None]]) -> None:
    """Within 1e-5 of the loss and of the largest gradient."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    pairs = [(a, b) for a, b in zip(found[1], expected[1]) if a is not None and b is not None]
    assert len(pairs) > 10
    largest = max(float(b.abs().max()) for _, b in pairs)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-5 * largest


@pytest.fixture
def blocks(started: Run) -> list[nn.Module]:
    return started.trainer.memory.blocks


# ---- exactly the same -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_swapped_equals_not_swapped(started: Run, blocks: list[nn.Module], recomputed: bool) -> None:
    """For one block, a half, all but one, and all of them; two micro-batches, so that blocks come and go twice.

    The number goes up while blocks are swapped, as where memory runs out.
    """
    total = len(blocks)
    counts = {1, total // 2, total} if recomputed else {1, total // 2, total - 1, total}
    recomputation = Recomputation(blocks)
    recomputation.set_budget(0.0 if recomputed else 1.0)
    expected = one_step(started, micro_batches=2)
    swap = PoisonedSwap(blocks, spread(total, 1), CPU)
    swap.install()
    for count in sorted(counts):
        swap.change(spread(total, count))
        found = one_step(started, micro_batches=2)
        assert swap.ring.copies >= count
        assert_equal(found, expected)
    swap.remove()
    assert_equal(one_step(started, micro_batches=2), expected)
    recomputation.forwards.undo()


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_recomputed_equals_kept(started: Run, blocks: list[nn.Module], budget: float) -> None:
    expected = one_step(started)
    recomputation = Recomputation(blocks)
    assert recomputation.set_budget(budget)
    assert_close(one_step(started), expected)
    recomputation.forwards.undo()


@pytest.mark.parametrize("subject", COMPILED, indirect=True)
def test_compiled_equals_eager(subject: Subject, started: Run, blocks: list[nn.Module]) -> None:
    """Traced and differentiated as inductor gets it, without its code generator (tests/trainers/test_memory_runs.py).

    Adapters with all activations recomputed inside, full training with none.
    """
    budget = 0.0 if subject.method == "lora" else 1.0
    expected = one_step(started)
    compiled = CompiledBlocks(blocks, "aot_eager", budget=budget)
    assert_close(one_step(started), expected)
    assert not any(kind.broken for kind in compiled.kinds)
    compiled.forwards.undo()
    torch.compiler.reset()


# ---- in whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", FULL, indirect=True)
def test_stepping_in_the_backward_pass_is_the_plain_step(subject: Subject, tmp_path: Path) -> None:
    values = {"max_train_steps": 2, "max_grad_norm": 0, "gradient_accumulation_steps": 2}
    plain = subject.train(tmp_path / "plain", **values)
    ways: dict[str, dict[str, Any]] = {
        "each": {"fused_backward_pass": True},
        "swapped": {"fused_backward_pass": True, "blocks_to_swap": 1},
    }
    if subject.case.family == "flux":  # which blocks there are makes no difference to groups
        ways |= {"groups": {"fused_optimizer_groups": 3}, "blocks": {"blockwise_fused_optimizers": True}}
    for name, options in ways.items():
        run = subject.train(tmp_path / name, **options, **values)
        assert run.losses == plain.losses
        expected = plain.trainer.trainables.state()
        found = run.trainer.trainables.state()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


@pytest.mark.parametrize("subject", RESUMED, indirect=True)
def test_resumes_exactly_with_everything_on(subject: Subject, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "max_train_steps": 3, "save_state": True, "activation_budget": 0.5, "cpu_offload_checkpointing": True,
        "blocks_to_swap": 1,
    }  # fmt: skip
    if subject.method == "lora":
        values |= {"fp8_base_unet": True, "hoist_modulation": subject.name in HOISTABLE}
    else:
        values |= {"fused_backward_pass": True}
    whole = subject.train(tmp_path / "whole", save_every_n_steps=1, **values)
    assert_same_run(subject.train(tmp_path / "resumed", resume=first_state(whole), **values), whole)


def first_state(run: Run) -> Path:
    """What a run saved after its first step."""
    return run.folder / "x-step00000001-state"


@pytest.mark.parametrize("subject", HOISTABLE, indirect=True)
def test_hoisted_modulation_trains_the_same(subject: Subject, tmp_path: Path) -> None:
    """With blocks swapped, too: what is hoisted stays."""
    values = {"max_train_steps": 3, "gradient_checkpointing": True}
    plain = subject.train(tmp_path / "plain", **values)
    run = subject.train(tmp_path / "hoisted", hoist_modulation=True, blocks_to_swap=1, **values)
    assert run.losses == pytest.approx(plain.losses, rel=1e-6)
    assert run.weights.keys() == plain.weights.keys()
    for key, value in plain.weights.items():
        assert torch.allclose(run.weights[key], value, rtol=1e-4, atol=1e-6), key


STORAGE: dict[str, dict[str, Any]] = {
    "fp8": {"fp8_base": True}, "int8": {"base_quant": "int8"}, "nf4": {"base_quant": "nf4"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "kind"),
    [
        ("sd1, lora", "fp8"),
        ("sdxl, lora", "int8"),
        ("flux, lora", "fp8"),
        ("sd3, lora", "nf4"),
        ("lumina, lora", "int8"),
        ("anima, lora", "nf4"),
        ("sana, lora", "fp8"),
    ],
    indirect=["subject"],
)
def test_learns_on_a_base_in_fewer_bits(subject: Subject, tmp_path: Path, kind: str) -> None:
    """One noise level, so that losses can be compared; bounds of the error are those that docs/memory.md states.

    Each family and each kind, not every pair: tests/weights has the error of a prediction for all of them.
    """
    values = {
        "network_dim": 16, "network_alpha": 16, **subject.case.overfit, "min_timestep": 700, "max_timestep": 700,
        "learning_rate": 5e-3, "mixed_precision": "bf16", "max_train_steps": 20,
    }  # fmt: skip
    losses = subject.train(tmp_path / kind, **STORAGE[kind], **values).losses
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    plain = subject.train(tmp_path / "bf16", **{**values, "max_train_steps": 1}).losses[0]
    assert losses[0] == pytest.approx(plain, rel=QUANT_ERRORS[kind])


# ---- out of memory --------------------------------------------------------------------------------------------------


def fails_above(samples: int, trainer: Any) -> Callable[..., None]:
    """Out of memory in the model, as a card says it, for batches that are larger."""

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        if len(latents) > samples and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return look


def test_a_step_that_does_not_fit_is_taken_again_in_parts(started: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The same samples with the same noise: the loss is the same, and so are the gradients."""
    expected = one_step(started)
    trainer = started.trainer
    handle = trainer.models.denoiser.register_forward_pre_hook(fails_above(1, trainer), with_kwargs=True)
    try:
        found = one_step(started)
    finally:
        handle.remove()
        trainer.memory.most_samples = None
    assert_close(found, expected)
    assert "out of memory in step" in caplog.text and "1 samples at a time" in caplog.text


# ---- all at once, compiled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["flux, lora"], indirect=True)
def test_resumes_exactly_when_compiled(subject: Subject, tmp_path: Path) -> None:
    """What is learned is also what the eager run learns."""
    eager: dict[str, Any] = {
        "max_train_steps": 3, "save_state": True, "activation_budget": 0.5, "blocks_to_swap": 1, "base_quant": "nf4",
        "hoist_modulation": True,
    }  # fmt: skip
    values = {**eager, "compile": True, "dynamo_backend": "aot_eager", "compile_cache_dir": tmp_path / "compiled"}
    whole = subject.train(tmp_path / "whole", save_every_n_steps=1, **values)
    assert whole.trainer.memory.compiled is not None
    assert not any(kind.broken for kind in whole.trainer.memory.compiled.kinds)
    assert whole.losses == pytest.approx(subject.train(tmp_path / "eager", **eager).losses, rel=1e-5)
    torch.compiler.reset()
    assert_same_run(subject.train(tmp_path / "resumed", resume=first_state(whole), **values), whole)
