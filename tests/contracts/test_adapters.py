# SPDX-License-Identifier: Apache-2.0
"""What every adapter must do, on every kind of module and in both dtypes. A new adapter is one row in ADAPTERS."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.adapter_network import in_dtype
from library.adapters.layer_network import LayerNetwork, RateRules
from library.adapters.layers.dylora import DyLoRALayer, DyloraSettings
from library.adapters.layers.factor import FactorSettings
from library.adapters.layers.loha import LoHaLayer
from library.adapters.layers.lokr import LoKrLayer, LokrSettings
from library.adapters.layers.lora import LoraSettings, lora_layer
from library.adapters.layers.lora_fa import LoRAFALayer
from library.adapters.layers.norm import NormLayer
from library.adapters.layers.oft import OFTLayer, OftSettings
from library.adapters.layers.weight import WeightLayer
from library.adapters.target_spec import TargetModule, TargetSpec
from tests.adapters.models import distance, randomize

RANK = 4


def lora(**settings: object) -> Callable[[TargetSpec], AdapterLayer]:
    return lambda target: lora_layer(target, rank=RANK, alpha=2.0, settings=LoraSettings(**settings))  # type: ignore[arg-type]


def loha(**settings: object) -> Callable[[TargetSpec], AdapterLayer]:
    return lambda target: LoHaLayer(target, rank=RANK, alpha=2.0, settings=FactorSettings(**settings))  # type: ignore[arg-type]


def lokr(rank: int = 2, **settings: object) -> Callable[[TargetSpec], AdapterLayer]:
    return lambda target: LoKrLayer(target, rank=rank, alpha=12.0, settings=LokrSettings(**settings))  # type: ignore[arg-type]


def oft(target: TargetSpec) -> AdapterLayer:
    """Two rotations for each module, one where its rows are odd."""
    count = 1 if any(module.width % 2 for module in target.modules) else 2
    return OFTLayer(target, count=count, alpha=0.7, settings=OftSettings(numbered=len(target.modules) > 1))


class Attention(nn.Module):
    """Three layers with one input, which are one layer in published files; k and v are narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 6), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        return torch.cat([self.q(x), k, self.v(x)], -1)


WEIGHT_ADAPTERS: dict[str, Callable[[TargetSpec], AdapterLayer]] = {
    "lora": lora(),
    "rs_lora": lora(rs_lora=True),
    "tucker": lora(tucker=True),
    "scalar": lora(scalar=True),
    "dora": lora(dora="output"),
    "dora_input": lora(dora="input"),
    "dora_tucker_scalar": lora(dora="output", tucker=True, scalar=True),
    "lora_fa": lambda target: LoRAFALayer(target, rank=RANK, alpha=2.0),
    # one block of all ranks: what several blocks draw is tested apart
    "dylora": lambda target: DyLoRALayer(target, rank=RANK, alpha=2.0, settings=DyloraSettings(unit=RANK)),
    "oft": oft,
    "loha": loha(),
    "loha_tucker": loha(tucker=True, rs_lora=True),
    "loha_dora_scalar": loha(dora="output", tucker=True, scalar=True),
    "lokr": lokr(),
    "lokr_tucker": lokr(tucker=True, scalar=True),
    "lokr_both": lokr(rank=1, decompose_both=True, unbalanced=True, rs_lora=True),
    "lokr_full_dora": lokr(full_matrix=True, dora="output", factor=2),
}
SPLIT = ("lora", "rs_lora", "tucker", "scalar", "dora", "dora_tucker_scalar")  # split_qkv is for LoRA only
UNLIMITED = ("oft", "norm")  # scale_weight_norms has no meaning for them
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (2, 5, 12)),
    "conv1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (2, 6, 7, 5)),
    "conv3x3": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (2, 6, 7, 5)),
}
# modules that stand for a published layer in another way than one for one
PIECES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fused": (Attention, (2, 5, 12)),
    "split": (Attention, (2, 5, 12)),
    "swapped": (lambda: nn.Linear(12, 10), (2, 5, 12)),
}
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(12), (2, 5, 12)),
    "group_norm": (lambda: nn.GroupNorm(3, 6), (2, 6, 7, 5)),
}
CASES = [(adapter, kind) for adapter in WEIGHT_ADAPTERS for kind in MODULES] + [("norm", kind) for kind in NORMS]
CASES += [(adapter, kind) for adapter in WEIGHT_ADAPTERS for kind in PIECES
          if adapter != "dora_input" and (kind != "split" or adapter in SPLIT)]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def pieces(module: nn.Module, kind: str) -> tuple[TargetModule, ...]:
    """The modules of the target, or the halves of one in another order."""
    if isinstance(module, Attention):
        return tuple(TargetModule(name, getattr(module, name)) for name in ("q", "k", "v"))
    if kind == "swapped":
        return TargetModule("x", module, slice(5, 10)), TargetModule("x", module, slice(0, 5))
    return (TargetModule("x", module),)


class Subject:
    """One module, one adapter on it (attached), an input."""

    def __init__(self, adapter: str, kind: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.adapter = adapter
        make, shape = (MODULES | PIECES | NORMS)[kind]
        self.module = make().requires_grad_(False).to(dtype)
        self.x = torch.randn(shape, dtype=dtype)
        self.plain = self.module(self.x)
        target = TargetSpec("lora_unet_x", pieces(self.module, kind), "denoiser", block=3, split=kind == "split")
        self.make = WEIGHT_ADAPTERS.get(adapter, NormLayer)
        self.layer = self.make(target)
        self.network = LayerNetwork([self.layer], rates=RateRules(denoiser_plus=2.0))
        self.network.attach(train_denoiser=True, train_text_encoder=True)

    def output(self) -> Tensor:
        return self.module(self.x)


@pytest.fixture(
    params=[(*case, dtype) for case in CASES for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}"[0:]
)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(*request.param)


def limit(subject: Subject) -> float:
    """Relative error that rounding explains."""
    return 1e-6 if subject.x.dtype == torch.float32 else 2e-2


def test_starts_without_change(subject: Subject) -> None:
    assert distance(subject.output(), subject.plain) < limit(subject)


def test_output_keeps_the_dtype_and_changes(subject: Subject) -> None:
    randomize(subject.network)
    changed = subject.output()
    assert changed.dtype == subject.x.dtype
    assert distance(changed, subject.plain) > 0.1


@pytest.mark.parametrize("multiplier", [1.0, 0.6, -1.0])
def test_merged_equals_applied(subject: Subject, multiplier: float) -> None:
    randomize(subject.network)
    subject.network.set_multiplier(multiplier)
    applied = subject.output()
    subject.network.merge_into()
    assert distance(applied, subject.plain) > 0.1
    assert distance(subject.output(), applied) < limit(subject)


def test_multiplier_zero_is_the_base(subject: Subject) -> None:
    randomize(subject.network)
    subject.network.set_multiplier(0.0)
    assert torch.equal(subject.output(), subject.plain)


def test_disabled_restores_exactly(subject: Subject) -> None:
    randomize(subject.network)
    changed = subject.output()
    with subject.network.disabled():
        assert torch.equal(subject.output(), subject.plain)
        with subject.network.disabled():
            pass
        assert torch.equal(subject.output(), subject.plain)
    assert torch.equal(subject.output(), changed)


def test_detach_and_attach(subject: Subject) -> None:
    randomize(subject.network)
    changed = subject.output()
    subject.network.detach()
    assert torch.equal(subject.output(), subject.plain)
    for _ in range(2):  # twice is once
        subject.network.attach(train_denoiser=True, train_text_encoder=True)
    assert torch.equal(subject.output(), changed)


def test_saved_and_loaded_is_the_same(subject: Subject) -> None:
    randomize(subject.network)
    changed = subject.output()
    state = subject.network.state(None)
    suffixes = {key.partition(".")[2] for key in state}
    assert suffixes <= set(subject.layer.saved)
    assert all(value.is_contiguous() and value.device.type == "cpu" for value in state.values())
    subject.network.detach()
    other = LayerNetwork([subject.make(subject.layer.target)])
    other.load(state)
    again = other.state(None)
    assert again.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.items())
    other.attach(train_denoiser=True, train_text_encoder=True)
    assert distance(subject.output(), changed) < limit(subject)


@pytest.mark.parametrize("alpha, dtype", [(4.0, torch.float16), (4.0001, torch.float32), (1e5, torch.float32)])
def test_alphas_that_have_no_place_in_half_precision(alpha: float, dtype: torch.dtype) -> None:
    found = in_dtype({"x.alpha": torch.tensor(alpha), "x.lora_up.weight": torch.ones(2)}, torch.float16)
    assert found["x.alpha"].dtype == dtype and float(found["x.alpha"]) == float(torch.tensor(alpha))
    assert found["x.lora_up.weight"].dtype == torch.float16


def test_exact_state_goes_on_exactly(subject: Subject) -> None:
    randomize(subject.network)
    changed = subject.output()
    state = subject.network.exact_state()
    subject.network.detach()
    other = LayerNetwork([subject.make(subject.layer.target)])
    other.attach(train_denoiser=True, train_text_encoder=True)
    other.load_exact_state(state)
    assert torch.equal(subject.output(), changed)
    assert all(torch.equal(value, state[key]) for key, value in other.exact_state().items())


def test_recomputed_gradients_are_the_same(subject: Subject) -> None:
    """Under gradient checkpointing, with modules dropped at random."""
    randomize(subject.network)
    for layer in subject.network.modules():
        if isinstance(layer, AdapterLayer):
            layer.module_dropout = 0.3
    found = []
    for recompute in (False, True):
        subject.network.zero_grad()
        torch.manual_seed(1)
        x = subject.x.clone().requires_grad_()
        output = checkpoint(subject.module, x, use_reentrant=False) if recompute else subject.module(x)
        output.float().square().mean().backward()
        found.append([parameter.grad for parameter in (x, *subject.network.parameters())])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_norms_are_limited(subject: Subject, max_norm: float) -> None:
    randomize(subject.network)
    before = subject.network.exact_state()
    report = subject.network.scale_norms(max_norm)
    same = all(torch.equal(value, before[name]) for name, value in subject.network.exact_state().items())
    assert same == (subject.adapter in UNLIMITED or max_norm > 1e3)
    assert int(report.scaled) == (not same)
    if not same:
        assert float(report.maximum) == pytest.approx(max_norm, rel=1e-3)
        layers = [layer for layer in subject.network.modules() if isinstance(layer, WeightLayer)]
        norms = [
            torch.stack([layer.delta_weight(i).detach().norm() for i in range(len(layer.target.modules))]).norm()
            * layer.scale
            for layer in layers
        ]
        assert float(torch.stack(norms).max()) == pytest.approx(max_norm, rel=1e-3)


def test_state_in_another_dtype(subject: Subject) -> None:
    exact, half = subject.network.state(None), subject.network.state(torch.float16)
    assert {value.dtype for key, value in half.items() if not key.endswith(".alpha")} == {torch.float16}
    assert all(float(half[key]) == float(value) for key, value in exact.items() if key.endswith(".alpha"))


def test_groups_cover_every_parameter_once(subject: Subject) -> None:
    groups = subject.network.param_groups(learning_rate=1e-3)
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(covered) == sorted(id(parameter) for parameter in subject.network.parameters())
    assert subject.network.param_groups(learning_rate=1e-3, unet_lr=0) == []


def test_gradient_reaches_every_parameter_after_one_step(subject: Subject) -> None:
    target = torch.randn_like(subject.plain)
    optimizer = torch.optim.SGD(subject.network.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (subject.output() - target).square().mean().backward()
        optimizer.step()
    for name, parameter in subject.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in subject.module.parameters())


def test_adapter_of_the_base_dtype(subject: Subject) -> None:
    """--full_bf16: the adapter itself is in the dtype of the model."""
    subject.network.to(subject.x.dtype)
    randomize(subject.network)
    assert subject.output().dtype == subject.x.dtype
    subject.output().float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == subject.x.dtype for p in subject.network.parameters())


def test_autocast_is_near_full_precision(subject: Subject) -> None:
    randomize(subject.network)
    exact = subject.output()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = subject.output()
    assert distance(cast, exact) < 2e-2


def test_module_dropout_switches_the_whole_adapter(subject: Subject) -> None:
    randomize(subject.network)
    changed = subject.output()
    for layer in subject.network.modules():
        if isinstance(layer, AdapterLayer):
            layer.module_dropout = 0.5
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        output = subject.output()
        is_on = distance(output, changed) < limit(subject)
        seen.add("off" if torch.equal(output, subject.plain) else "on" if is_on else "other")
    assert seen == {"on", "off"}
    subject.network.eval()
    assert torch.equal(subject.output(), changed)
