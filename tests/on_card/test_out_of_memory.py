# SPDX-License-Identifier: Apache-2.0
"""A card with too little memory: a run learns the same with less, or ends with one clear line."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.cli import guarded
from library.memory.block_swap import BlockSwap, spread
from library.memory.offload import Offload
from library.memory.pinning import Pinning
from tests.memory.swap_models import recompute, stack
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import DEFAULTS, make_pictures, make_trainer, settle, subset, write_dataset

pytestmark = pytest.mark.gpu

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
NOT_SUPPORTED = 801  # a code of cudaHostRegister


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ground = tmp_path_factory.mktemp("card")
    data = write_dataset(ground / "data.toml", subset(make_pictures(ground / "pictures", 4)))
    model = make_tiny_sd(ground / "model", version=1)
    return {**DEFAULTS, "pretrained_model_name_or_path": model, "dataset_config": data, "max_train_steps": 3}


@pytest.fixture(autouse=True)
def whole_card() -> Iterator[None]:
    """Afterwards the card has all its memory again."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def limit(size: int) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)


def run(values: dict[str, Any], folder: Path, **more: Any) -> tuple[int, list[float]]:
    trainer = make_trainer({**values, "output_dir": folder, **more})
    code = guarded(trainer.run)
    settle()
    return code, [report.loss for report in trainer.reports]


KINDS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "cached": (CACHED, (0.9, 0.7, 0.6, 0.5, 0.1)),
    "uncached": ({"gradient_accumulation_steps": 2, "network_train_unet_only": True}, (0.8, 0.55, 0.3)),
    # weights, gradients and optimizer states are far more than the activations: its first step makes the peak
    "large LoRA": ({**CACHED, "network_dim": 512}, (0.95, 0.85, 0.75)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_limit_ends_well(
    values: dict[str, Any], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From nearly all that a run takes down to little: equal losses, or one line, and the last state is there."""
    own, shares = KINDS[kind]
    more = {"save_state": True, **own}
    run(values, tmp_path / "warm", **{**more, "max_train_steps": 1})
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # of tests before this one
    code, losses = run(values, tmp_path / "whole", **more)
    assert code == 0 and len(losses) == 3
    taken, ends = torch.cuda.max_memory_allocated() - before, []
    for share in shares:
        gc.collect()
        limit(before + int(taken * share))
        capsys.readouterr()
        code, found = run(values, tmp_path / str(share), **more)
        limit(torch.cuda.get_device_properties(0).total_memory)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        ends.append(code)
        if code == 0:
            assert not lines and found == pytest.approx(losses, abs=2e-6)
        else:
            assert code == 2 and len(lines) == 1 and "out of memory" in lines[0] and "--vram_budget" in lines[0]
            assert not (tmp_path / str(share) / "x.safetensors").exists()
            assert "changed already" not in lines[0]  # the optimizer's first step has room for its states
    if torch.cuda.memory_reserved() == torch.cuda.memory_allocated():  # else the card gives whole megabytes only
        assert ends == sorted(ends) and ends[0] == 0


def test_a_refused_page_lock_is_not_a_full_card(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches and tokens are copied from ordinary memory then: the same losses, and nothing is made smaller."""
    own = {"network_train_unet_only": True}
    whole = run(values, tmp_path / "whole", **own)
    lock = torch.Tensor.pin_memory

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.nbytes > 4096:
            raise RuntimeError("CUDA error: out of memory")
        return lock(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert whole[0] == 0 and run(values, tmp_path / "refused", **own) == whole


def flux_like(count: int) -> list[int]:
    double, single = count // 2, 2 * (count - count // 2)
    return [*spread(DOUBLE, double), *(DOUBLE + index for index in spread(SINGLE, single))]


@pytest.mark.parametrize("before, after", [(0, 8), (8, 16), (16, 24), (24, 32), (32, 35), (16, 8), (35, 0)])
def test_an_exchange_never_holds_more_than_before_or_afterwards(before: int, after: int) -> None:
    width = 128
    torch.manual_seed(0)
    blocks = [nn.Linear(width, width * (5 if i < DOUBLE else 2), bias=False) for i in range(DOUBLE + SINGLE)]
    expected = [block.weight.detach().clone() for block in blocks]
    for block in blocks:
        block.requires_grad_(False).to("cuda")
    swap = BlockSwap(blocks, flux_like(before), torch.device("cuda"))
    swap.install()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    swap.change(flux_like(after))
    assert torch.cuda.max_memory_allocated() <= max(held, torch.cuda.memory_allocated())
    assert (torch.cuda.memory_allocated() < held) == (after > before)
    swap.home()
    assert {i for i, block in enumerate(blocks) if not block.weight.is_cuda} == {*flux_like(after)}
    assert all(torch.equal(block.weight.cpu(), weight) for block, weight in zip(blocks, expected))
    swap.remove()


def test_memory_that_cannot_be_locked_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Swap and offload of a model that learns, with the driver refusing the third image: equal to the bit."""
    device = torch.device("cuda")
    real, asked = torch.cuda.cudart(), []

    class Refusing:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            asked.append(address)
            return int(real.cudaHostRegister(address, size, flags)) if len(asked) < 3 else NOT_SUPPORTED

        def cudaHostUnregister(self, address: int) -> Any:
            return real.cudaHostUnregister(address)

        def cudaGetErrorString(self, error: int) -> str:
            return "operation not supported"

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    results = []
    for moved in (False, True):
        pinning = Pinning(device)
        sample = stack(6, width=64)
        sample.denoiser.requires_grad_().to(device)
        for block in sample.blocks:
            recompute(block)
        swap = BlockSwap(sample.blocks, range(6) if moved else (), device, pinning=pinning)
        swap.install()
        offload = Offload(device, sample.denoiser.parameters(), smallest=1, pinning=pinning)
        swap.rest = (offload.pack, offload.unpack) if moved else swap.rest
        parameters = [*sample.denoiser.parameters()]

        @torch.no_grad()
        def update(p: torch.Tensor, swap: BlockSwap = swap) -> None:
            p.sub_(p.grad, alpha=0.1)
            p.grad = None
            swap.changed([p])

        handles = [p.register_post_accumulate_grad_hook(update) for p in parameters]
        for seed in range(3):
            x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).to(device)
            if moved:
                with offload.forward():
                    loss = sample.denoiser(x).square().mean()
            else:
                loss = sample.denoiser(x).square().mean()
            loss.backward()
        for handle in handles:
            handle.remove()
        swap.home()
        results.append([p.detach().cpu().clone() for p in parameters])
        assert [image.pinned for image in swap._images] == ([True, True, *[False] * 4] if moved else [])
        assert not moved or (offload.pool.made > 0 and not pinning.works())
        swap.remove()
    assert len(asked) == 3
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert [r.levelname for r in caplog.records if "operation not supported" in r.getMessage()] == ["WARNING"]
