# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks give what eager blocks give, with every budget, adapter and draw, and one kind is compiled once.

Without the code generator of inductor, which takes minutes: tests/trainers/test_memory_runs.py has a run with it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from library.adapters.adapter_network import AdapterNetwork
from library.families.sd.unet_blocks import unet_blocks
from library.memory import compiling
from library.memory.compiled_code import CACHE_VARIABLE, VARIABLES, CompiledCode, kept_folder
from library.memory.compiling import CompiledBlocks, missing_compiler, warm

BLOCKS, HEAD = 2, 8


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_flux(**arguments: str) -> tuple[nn.Module, list[nn.Module], AdapterNetwork]:
    """A tiny FLUX, of single blocks only, with LoRA on every Linear of its blocks, far from zero."""
    from diffusers import FluxTransformer2DModel

    from networks.lora_flux import create_network

    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        num_layers=0, num_single_layers=BLOCKS, attention_head_dim=HEAD, num_attention_heads=2, in_channels=8,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    model.requires_grad_(False).train()
    network = create_network(1.0, 2, 1, None, [], model, neuron_dropout=None, **arguments)
    network.attach(train_denoiser=True, train_text_encoder=False)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, list(model.single_transformer_blocks), network.train()


def loss_of(model: nn.Module, tokens: int = 6, words: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    answer = model(
        hidden_states=random(2, tokens, 8), encoder_hidden_states=random(2, words, 12),
        pooled_projections=random(2, 8), timestep=random(2).sigmoid(), guidance=torch.ones(2),
        img_ids=random(tokens, 3).round(), txt_ids=torch.zeros(words, 3), return_dict=False,
    )[0]  # fmt: skip
    return answer.square().mean()


def step(model: nn.Module, network: nn.Module, **sizes: int) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes kept between forward and backward besides weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *network.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, **sizes)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(value.abs().max()) for value in expected[1].values())
    assert max(float((found[1][n] - v).abs().max()) for n, v in expected[1].items()) < 1e-5 * largest


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def test_every_budget_equals_eager_and_keeps_less() -> None:
    model, blocks, network = make_flux()
    expected, kept = step(model, network), {}
    compiled = CompiledBlocks(blocks, "aot_eager", budget=1)
    for budget in (1, 0.5, 0):
        compiled.set_budget(budget)
        found = step(model, network)
        assert_same(found, expected)
        kept[budget] = found[2]
    assert kept[0] < 0.4 * kept[1] and kept[0] < kept[0.5] < kept[1]
    compiled.forwards.undo()
    assert step(model, network)[2] == expected[2]
    assert not any(kind.broken or kind.outside for kind in compiled.kinds)


@pytest.mark.parametrize(
    "arguments",
    [{"rank_dropout": "0.3", "module_dropout": "0.3"}, {"dora_wd": "True"}],
    ids=["dropout", "dora"],
)
def test_adapters_are_part_of_it(arguments: dict[str, str]) -> None:
    model, blocks, network = make_flux(**arguments)
    expected = step(model, network)
    compiled = CompiledBlocks(blocks, "aot_eager", budget=0)
    assert_same(step(model, network), expected)
    assert not any(kind.broken for kind in compiled.kinds)
    assert all(kind.outside == ("rank_dropout" in arguments) for kind in compiled.kinds)


def test_a_backend_that_cannot_split_is_recomputed_from_outside() -> None:
    model, blocks, network = make_flux()
    expected = step(model, network)
    CompiledBlocks(blocks, "eager", budget=0)
    found = step(model, network)
    assert_same(found, expected)
    assert found[2] < 0.3 * expected[2]


def test_a_kind_is_compiled_once_and_shapes_do_not_depend_on_those_before() -> None:
    """There are two graphs: inputs of the first block have no gradient, those of the others are pieces of a tensor."""
    model, blocks, network = make_flux()
    sizes: tuple[dict[str, int], ...] = ({"tokens": 6, "words": 6}, {"tokens": 4})
    expected = [step(model, network, **size) for size in sizes]
    for dynamic, graphs in ((True, [2, 2]), (False, [2, 4])):
        torch._dynamo.reset()
        counters.clear()
        compiled = CompiledBlocks(blocks, "aot_eager", budget=0, dynamic=dynamic)
        for size, plain, count in zip(sizes, expected, graphs, strict=True):
            assert_same(step(model, network, **size), plain)
            assert compilations() == count
        compiled.forwards.undo()


def test_strength_of_adapters_and_no_gradients() -> None:
    model, blocks, network = make_flux()
    with torch.no_grad():
        plain = loss_of(model)
    network.set_multiplier(0.5)
    weaker = step(model, network)
    network.set_multiplier(1.0)
    CompiledBlocks(blocks, "aot_eager", budget=0)
    with torch.no_grad():
        assert torch.equal(loss_of(model), plain) and compilations() == 0
    step(model, network)
    network.set_multiplier(0.5)
    assert_same(step(model, network), weaker)


def test_what_cannot_be_compiled_runs_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.linear(x).tanh()

    torch.manual_seed(0)
    blocks, x = nn.Sequential(Odd(), Odd()), torch.randn(3, 4)
    expected = torch.autograd.grad(blocks(x).sum(), list(blocks.parameters()))
    CompiledBlocks(list(blocks), "aot_eager", budget=0)
    logger = logging.getLogger("trainyard")
    logger.addHandler(caplog.handler)
    try:
        found = torch.autograd.grad(blocks(x).sum(), list(blocks.parameters()))
    finally:
        logger.removeHandler(caplog.handler)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    lines = {record.getMessage() for record in caplog.records if record.name == "trainyard"}
    assert len(lines) == 1 and lines.pop().startswith("--compile: Odd cannot be compiled and runs without: ")


def test_warming_leaves_no_trace() -> None:
    model, blocks, network = make_flux(rank_dropout="0.3")
    expected = step(model, network)
    network.zero_grad(set_to_none=True)
    heard: list[Tensor] = []
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(heard.append)
    before, state = network.state(None), torch.get_rng_state()
    CompiledBlocks(blocks, "aot_eager", budget=0)
    warm([lambda: loss_of(model), lambda: loss_of(model, 4)], list(network.parameters()), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state) and not heard
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state(None).items())
    count = compilations()
    assert_same(step(model, network), expected)
    step(model, network, tokens=4)
    assert compilations() == count > 0


def test_blocks_of_a_unet() -> None:
    from tests.tiny import tiny_modules

    unet = tiny_modules()[0]
    unet.train().requires_grad_(True)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, unet.config.cross_attention_dim)
        loss = unet(x, torch.tensor([500]), context).sample.square().mean()
        return list(torch.autograd.grad(loss, list(unet.parameters())))

    expected = gradients()
    compiled = CompiledBlocks(unet_blocks(unet), "aot_eager", budget=0)
    found = gradients()
    largest = max(float(value.abs().max()) for value in expected)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5 * largest
    assert not any(kind.broken for kind in compiled.kinds) and compilations() >= len(compiled.kinds)


def test_folder_of_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "torch"))
    assert kept_folder(None) == tmp_path / "torch" and kept_folder(tmp_path / "own") == tmp_path / "own"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept_folder(None) == tmp_path / ".cache" / "trainyard" / "compiled"


# ---- code of earlier runs -------------------------------------------------------------------------------------------


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("--compile: ")]


def files_in(code: CompiledCode) -> dict[str, bytes]:
    return {
        path.relative_to(code.folder).as_posix(): path.read_bytes() for path in code.folder.rglob("*") if path.is_file()
    }


def test_only_what_is_complete_is_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is killed leaves nothing; of an archive that is damaged anywhere nothing is used."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    first = CompiledCode(tmp_path / "kept", "key")
    assert os.environ[CACHE_VARIABLE] == str(first.folder) and not first.found and files_in(first) == {}
    (first.folder / "ab").mkdir()
    (first.folder / "ab" / "half.so").write_bytes(b"of a compiler that was killed")
    beside = CompiledCode(tmp_path / "kept", "key")
    assert not beside.found and files_in(beside) == {}
    beside.close()
    (first.folder / "ab" / "half.so").write_bytes(b"whole" * 100)
    first.keep({"Odd"})
    first.close()
    assert not first.folder.exists()
    (archive,) = (tmp_path / "kept").iterdir()

    second, other = CompiledCode(tmp_path / "kept", "key"), CompiledCode(tmp_path / "kept", "another key")
    assert second.found and second.uncompilable == {"Odd"} and files_in(second)["ab/half.so"] == b"whole" * 100
    assert not other.found and other.uncompilable == frozenset()
    content, time = archive.read_bytes(), archive.stat().st_mtime_ns
    second.keep({"Odd"})
    assert archive.stat().st_mtime_ns == time  # nothing is new
    assert lines_of(caplog) == []
    damages = [content[:cut] for cut in range(0, len(content), 40)]
    places = (45, content.index(b"PK\x01\x02") + 16)  # the bytes of a file, and its checksum
    damages += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in places]
    for damaged in damages:
        caplog.clear()
        archive.write_bytes(damaged)
        third = CompiledCode(tmp_path / "kept", "key")
        assert not third.found and files_in(third) == {}
        (line,) = lines_of(caplog)
        assert line.startswith(f"--compile: {archive} is damaged, everything is compiled again: ")
        third.close()
    other.close()
    second.close()
    assert {name: os.environ.get(name) for name in VARIABLES} == before


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    code = CompiledCode(tmp_path / "file", "key")
    code.keep([])
    code.close()
    (line,) = lines_of(caplog)
    assert "cannot be written, the next run compiles again: " in line


class Failing:
    """A compiler that fails while a file in the folder of code says so: in the forward pass or in the backward pass."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self.folder, self.calls = folder, 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def compiler(name: str) -> Callable[..., Any]:
            def compile_graph(inner: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
                self.calls += 1
                file = self.folder() / "fails"

                def run(*args: Any) -> Any:
                    if file.is_file() and file.read_text(encoding="utf-8") == name:
                        raise BackendCompilerFailed(self, OSError("file too short"), None)
                    return inner(*args)

                return make_boxed_func(run)

            return compile_graph

        return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))(graph, inputs)


@pytest.mark.parametrize("fails", ["forward", "backward"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept code", "new code"])
def test_errors_of_either_pass(
    fails: str, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept code that does not work is compiled again; new code that does not work is not used."""
    model, blocks, network = make_flux()
    expected = step(model, network)
    code = CompiledCode(tmp_path / "kept", "key")
    compiler = Failing(lambda: code.folder)
    monkeypatch.setattr(compiling, "lookup_backend", lambda name: compiler)
    compiled = CompiledBlocks(blocks, "aot_eager", budget=1)
    (code.folder / "fails").write_text(fails, encoding="utf-8")
    code.found = kept
    compiled.warm([lambda: loss_of(model)], list(network.parameters()), torch.device("cpu"), code)
    (line,) = lines_of(caplog)
    if kept:
        assert line.startswith(f"--compile: {code.archive} does not work, everything is compiled again: ")
        assert code.archive.is_file() and compiled.uncompilable() == set()
    else:
        assert "file too short" in line and line.count("run without" if fails == "backward" else "runs without") == 1
        assert compiled.uncompilable() and (fails == "forward") == code.archive.is_file()
    count = compiler.calls
    assert_same(step(model, network), expected)
    assert compiler.calls == count
    code.close()


def test_missing_compiler() -> None:
    assert missing_compiler("aot_eager", torch.device("cpu")) is None
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert missing_compiler("inductor", torch.device("cpu")) == "a C++ compiler"
