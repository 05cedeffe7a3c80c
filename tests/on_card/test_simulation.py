# SPDX-License-Identifier: Apache-2.0
"""The simulated card behaves as a card does where the project could tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.on_card.memory import limited, peak_of, settle
from tests.script_runner import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.simulated]


def random(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operation",
    [
        lambda card, cpu: card + cpu,
        lambda card, cpu: cpu @ card,
        lambda card, cpu: torch.cat([card, cpu]),
        lambda card, cpu: cpu.add_(card),
        lambda card, cpu: torch.tensor(1.0).add_(card.sum()),
        lambda card, cpu: nn.functional.linear(card, cpu),
        lambda card, cpu: cpu[torch.zeros(2, dtype=torch.long, device="cuda")],
        lambda card, cpu: torch.where(card > 0, cpu, card),
        lambda card, cpu: torch._foreach_add([card], [cpu]),
    ],
    ids=["add", "matmul", "cat", "in place", "number in place", "linear", "indices", "where", "foreach"],
)
def test_devices_do_not_mix(operation: object) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        operation(random(3, 3).cuda(), random(3, 3))  # type: ignore[operator]


def test_what_may_mix() -> None:
    """Numbers, indices of the CPU, and copies."""
    card = torch.arange(6.0, device="cuda")
    assert (card * torch.tensor(2.0)).device.type == "cuda"
    assert card[torch.tensor([1, 4])].tolist() == [1, 4]
    card[torch.tensor([0])] = torch.tensor(9.0)
    host = torch.zeros(6)
    host.copy_(card)
    torch._foreach_copy_([card], [host + 1])
    assert host.tolist() == [9, 1, 2, 3, 4, 5] and card.tolist() == [10, 2, 3, 4, 5, 6]


def test_other_devices_are_not_there() -> None:
    assert torch.cuda.device_count() == 1 and torch.cuda.get_device_name() == "Simulated card"
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(1)
    with pytest.raises(ValueError, match="with a specified index"):  # torch checks its arguments itself
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))


# ---- operators ------------------------------------------------------------------------------------------------------


def test_a_model_learns_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    make = lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(),
        nn.Linear(288, 4),
    )  # fmt: skip
    model, copy = make(), make().cuda()
    copy.load_state_dict(model.state_dict())
    x = random(2, 3, 8, 8)
    for one, inputs in ((model, x), (copy, x.cuda())):
        optimizer = torch.optim.AdamW(one.parameters(), foreach=True)
        for _ in range(2):
            one(inputs).square().mean().backward()
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(copy.parameters(), model.parameters()):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs)


def test_views_share_memory() -> None:
    x = torch.arange(12.0, device="cuda").view(3, 4)
    before = torch.cuda.memory_allocated()
    views = [x[1:, ::2], x.t(), x.unfold(1, 2, 2), x.view(torch.int32), x.as_strided((2,), (5,)), x.detach()]
    assert torch.cuda.memory_allocated() == before
    assert all(view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for view in views)
    views[0].mul_(10)
    assert x.tolist() == [[0, 1, 2, 3], [40, 5, 60, 7], [80, 9, 100, 11]]


def test_out_and_resize() -> None:
    x, out = torch.ones(4, device="cuda"), torch.empty(0, device="cuda")
    assert torch.add(x, 1, out=out) is out and out.tolist() == [2, 2, 2, 2]
    out.resize_(6)
    assert out[:4].tolist() == [2, 2, 2, 2] and bool(out[4:].isnan().all())


def test_several_tensors_at_once() -> None:
    many = [torch.full((3,), float(i), device="cuda") for i in range(3)]
    torch._foreach_mul_(many, 2.0)
    torch._foreach_add_(many, many)
    assert [t.tolist() for t in many] == [[0] * 3, [4] * 3, [8] * 3]
    assert torch.stack(torch._foreach_norm(many)).is_cuda


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_what_nobody_has_written_is_nan() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        assert bool(torch.empty(100, dtype=dtype, device="cuda").float().isnan().all())
    assert bool(torch.empty(100, pin_memory=True).isnan().all())


def test_memory_is_counted_and_limited() -> None:
    unit = 1 << 20
    settle()
    before = torch.cuda.memory_allocated()
    with peak_of() as peak:
        kept = torch.empty(unit, dtype=torch.uint8, device="cuda")
        more = torch.empty(2 * unit, dtype=torch.uint8, device="cuda")
        del more
    assert torch.cuda.memory_allocated() - before == unit and peak[0] - before == 3 * unit
    free, total = torch.cuda.mem_get_info()
    assert total - free == torch.cuda.memory_allocated() and total == 24 << 30
    with limited(before + 2 * unit):
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 2097152 bytes"):
            torch.empty(2 * unit, dtype=torch.uint8, device="cuda")
        del kept
        torch.empty(2 * unit, dtype=torch.uint8, device="cuda")
    torch.empty(4 * unit, dtype=torch.uint8, device="cuda")


def test_pinned_memory() -> None:
    assert torch.zeros(3).pin_memory().is_pinned() and not torch.zeros(3).is_pinned()
    host = torch.zeros(4096, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    register = lambda: int(cudart.cudaHostRegister(host.data_ptr(), host.numel(), 0))
    assert register() == 0 and host[5:].is_pinned() and register() != 0
    assert int(cudart.cudaHostUnregister(host.data_ptr())) == 0 and not host.is_pinned()
    assert int(cudart.cudaHostUnregister(host.data_ptr())) != 0


# ---- streams, waits, generators -------------------------------------------------------------------------------------


def test_streams_and_events() -> None:
    stream, default = torch.cuda.Stream(), torch.cuda.current_stream()
    assert isinstance(stream, torch.Stream) and stream != default and default == torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        start = stream.record_event(torch.cuda.Event(enable_timing=True))
    assert torch.cuda.current_stream() == default
    default.wait_event(start)
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end) > 0
    with pytest.raises(RuntimeError, match="enable_timing"):
        torch.cuda.Event().elapsed_time(end)


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x[0] > 0),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "pageable copy": lambda x: torch.zeros(4).to("cuda"),
}
NO_WAITS = {
    "operators": lambda x: (x * 2).clamp(max=1.0).sum(),
    "pinned copies": lambda x: torch.zeros(4).pin_memory().to("cuda", non_blocking=True).add_(1),
    "home": lambda x: torch.zeros(4, pin_memory=True).copy_(x, non_blocking=True),
}


def test_waits_of_the_host_are_known() -> None:
    x = random(4).cuda()
    torch.cuda.set_sync_debug_mode("error")
    for name, wait in WAITS.items():
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            wait(x)
            pytest.fail(name)
    for run in NO_WAITS.values():
        run(x)


def test_generators() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    state = generator.get_state()
    first = torch.randn(5, device="cuda", generator=generator)
    assert generator.device.type == "cuda" and first.is_cuda
    generator.set_state(state)
    assert torch.equal(torch.randn(5, device="cuda", generator=generator), first)
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        with pytest.raises(RuntimeError, match=f"Expected a '{device}' device type for generator"):
            torch.randn(5, device=device, generator=torch.Generator(other))


def test_the_card_has_a_default_generator_of_its_own() -> None:
    """What is drawn on the card leaves the CPU's draws alone, and is restored by its own state alone."""
    dropped = lambda: nn.functional.dropout(torch.ones(64, device="cuda"))
    torch.manual_seed(3)
    on_cpu = torch.rand(4)
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first, second = dropped(), dropped()
    assert torch.equal(torch.rand(4), on_cpu) and not torch.equal(first, second)
    torch.set_rng_state(torch.get_rng_state())
    assert not torch.equal(dropped(), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(dropped(), first)


# ---- processes ------------------------------------------------------------------------------------------------------


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """`python -m tests.cuda_simulation`, and what that process starts; exit codes are the script's."""
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, torch\n"
        "print(torch.cuda.is_available(), sys.argv[1:], __name__)\n"
        "if sys.argv[1:] == ['parent']:\n"
        "    sys.exit(subprocess.run([sys.executable, __file__, 'child']).returncode + 4)\n"
        "sys.exit(3)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRAINYARD_SIMULATED_CARD", "PYTHONPATH")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    environment["TRAINYARD_SIMULATED_CARD"] = os.environ["TRAINYARD_SIMULATED_CARD"]
    command = [sys.executable, "-m", "tests.cuda_simulation", str(script), "parent"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert sorted(done.stdout.splitlines()) == ["True ['child'] __main__", "True ['parent'] __main__"]
