# SPDX-License-Identifier: Apache-2.0
"""Compiled blocks with recomputation inside: torch.compile compiles each kind of block once.

    compiled = CompiledBlocks(family.blocks(denoiser), backend="inductor", budget=0.0, dynamic=False)
    code = CompiledCode(kept_folder(None), compiled.key(device))
    compiled.warm(passes, trained, device, code)  # before the first step, so that no step waits for a compiler
    compiled.set_budget(0.0); compiled.forwards.undo()

The result of a block must not depend on what was compiled before, or a resumed run would differ in the last digits.
Shapes are therefore static, or dynamic from the start (by default torch starts static and prefers the latest variant),
and without gradients (previews, validation) blocks run uncompiled.

A block that draws random numbers (dropout) is recomputed from outside: partitioners do not repeat draws.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch.fx.experimental._config as shape_config
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TorchDynamoException

from library.device import is_out_of_memory, kept_random_state
from library.errors import UserError
from library.log import get_logger, progress
from library.memory.checkpointing import ForwardFunction, ReplacedForwards, recomputed, recomputed_blocks
from library.memory.compiled_code import CompiledCode

log = get_logger()

PARTITIONING = ("inductor", "aot_eager")  # backends that split forward and backward by activation_memory_budget
MOST_VARIANTS = 4096  # variants of one kind of block: one per shape, adapter rank and adapter strength
DRAWS = {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "bernoulli", "normal", "uniform"}


# ---- is there a compiler? -------------------------------------------------------------------------------------------


def missing_compiler(backend: str, device: torch.device) -> str | None:
    """The compiler that `backend` needs and this machine lacks; None when nothing is missing."""
    if backend != "inductor":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type != "cpu" and not has_triton():
        return "Triton"
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "a C++ compiler"
    return None


# ---- blocks ---------------------------------------------------------------------------------------------------------


class CompiledBlocks:
    """The blocks of a denoiser, compiled when they are first called with gradients.

    budget: share of the activations that is kept for the backward pass. dynamic: one graph for all shapes instead of
    one per shape, for runs with more than a few shapes. Attach adapters first: their hooks become part of the block.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], backend: str = "inductor", *, budget: float = 1.0, dynamic: bool = False
    ) -> None:
        self.forwards = ReplacedForwards(blocks)
        self.backend, self.dynamic, self.budget = backend, dynamic, budget
        self.kinds: list[BlockKind] = []
        _make_repeatable()
        self.set_budget(budget)

    def set_budget(self, budget: float) -> None:
        """Keep about this share of the activations. Everything is compiled again, so call it rarely."""
        self.forwards.undo()
        self.budget = budget
        again = set(recomputed_blocks([1.0] * len(self.forwards.blocks), budget))
        kinds: dict[Hashable, BlockKind] = {}
        for index, block in enumerate(self.forwards.blocks):
            kind = signature(block)
            if kind not in kinds:
                kinds[kind] = BlockKind(type(block).__name__, self.backend, budget, self.dynamic)
            plain = self.forwards.before[index]
            self.forwards.replace(index, kinds[kind].forward(plain, again=index in again))
        self.kinds = list(kinds.values())

    def key(self, device: torch.device) -> Hashable:
        """A key that is equal for runs that may use each other's compiled code; torch tells apart what it misses."""
        blocks = tuple(dict.fromkeys(map(signature, self.forwards.blocks)))
        return torch.__version__, platform.machine(), str(device), self.backend, self.dynamic, self.budget, blocks

    def uncompilable(self) -> set[str]:
        """Names of the kinds whose compilation has failed."""
        return {kind.name for kind in self.kinds if kind.broken}

    def give_up(self, error: BaseException) -> None:
        """Run all blocks uncompiled from now on, and log why: of a backward pass nobody knows which block it is."""
        for kind in self.kinds:
            kind.broken = True
        log.warning(f"--compile: the blocks cannot be compiled and run without: {_reason(error)}")

    def warm(
        self, passes: Sequence[Callable[[], Tensor]], trained: Sequence[Tensor], device: torch.device,
        code: CompiledCode,
    ) -> None:  # fmt: skip
        """Compile ahead of the first step, forward and backward, and keep the code (see `warm`).

        If code of an earlier run does not work, everything is compiled again; if new code does not, blocks run
        uncompiled.
        """
        try:
            if code.found and self._fails_with_kept(code, lambda: warm(passes, trained, device)):
                code.forget()
                torch.compiler.reset()
                self.set_budget(self.budget)
            if not code.found:
                warm(passes, trained, device)
        except Exception as error:
            if _is_of_run(error):
                raise
            self.give_up(error)
        else:
            code.keep(self.uncompilable())

    def _fails_with_kept(self, code: CompiledCode, run: Callable[[], None]) -> bool:
        """Whether `run` fails with the code of an earlier run; logged. What that one could not compile may fail."""
        known = code.uncompilable
        for kind in self.kinds:
            kind.must_compile = kind.name not in known
        try:
            run()
        except Exception as error:
            if _is_of_run(error):
                raise
            log.warning(f"--compile: {code.archive} does not work, everything is compiled again: {_reason(error)}")
            return True
        finally:
            for kind in self.kinds:
                kind.must_compile = False
        return False


class BlockKind:
    """Blocks of one class with the same shapes, which share compiled code."""

    def __init__(self, name: str, backend: str, budget: float, dynamic: bool) -> None:
        self.name, self.backend, self.dynamic = name, backend, dynamic
        self.broken = False  # compilation has failed
        self.must_compile = False  # raise an error of the compiler instead of running uncompiled
        self.outside = backend not in PARTITIONING  # recomputation is around the compiled code instead of inside
        self.budget = budget
        self._code: dict[FunctionType, FunctionType] = {}
        self._backend = self._make_backend()

    def _make_backend(self) -> Callable[..., Any]:
        compile_graph = lookup_backend(self.backend)

        def compile_with_budget(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
            inside = 1.0 if self.outside else float(self.budget)
            if inside < 1 and draws(graph):
                self.outside = True
                raise RuntimeError("draws random numbers")  # makes `forward` start again
            with functorch_config.patch(activation_memory_budget=inside):
                return compile_graph(graph, inputs)

        return compile_with_budget

    def forward(self, plain: ForwardFunction, *, again: bool) -> ForwardFunction:
        """The replacement of `plain`. again: recompute it from outside when the budget cannot be applied inside."""
        compiled: ForwardFunction = torch.compile(
            self._own(plain), backend=self._backend, fullgraph=True, dynamic=self.dynamic
        )
        eager, surrounded = (recomputed(plain), recomputed(compiled)) if again else (plain, compiled)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.broken or not torch.is_grad_enabled():
                return eager(*args, **kwargs)
            outside = self.outside
            try:
                return (surrounded if outside else compiled)(*args, **kwargs)
            except TorchDynamoException as error:
                if outside == self.outside:
                    if self.must_compile:
                        raise
                    self.give_up(error)
            return forward(*args, **kwargs)

        return forward

    def give_up(self, error: BaseException) -> None:
        """Run blocks of this kind uncompiled from now on, and log why."""
        self.broken = True
        log.warning(f"--compile: {self.name} cannot be compiled and runs without: {_reason(error)}")

    def _own(self, plain: ForwardFunction) -> ForwardFunction:
        """`plain` with its own code object for this kind: torch stores and looks up compiled code by code object."""
        if not isinstance(plain, MethodType) or not isinstance(plain.__func__, FunctionType):
            return plain
        function = plain.__func__
        if function not in self._code:
            code = function.__code__.replace()
            parts = function.__globals__, function.__name__, function.__defaults__, function.__closure__
            copy = FunctionType(code, *parts)
            copy.__kwdefaults__ = function.__kwdefaults__
            self._code[function] = copy
        return MethodType(self._code[function], plain.__self__)


def _is_of_run(error: BaseException) -> bool:
    """Whether an error has nothing to do with compilation: too little memory, a picture that cannot be read."""
    return is_out_of_memory(error) or isinstance(error, UserError)


def _reason(error: BaseException) -> str:
    """An error of the compiler in one line: its first line says where it came from, the second what it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def signature(block: nn.Module) -> Hashable:
    """A key that is equal for blocks that are likely to share a graph; torch's guards catch what it misses."""
    weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    hooks = tuple(len(module._forward_hooks) for module in block.modules())
    return type(block), weights, hooks


def draws(graph: fx.GraphModule) -> bool:
    """Whether a graph draws random numbers, for example for dropout."""
    graphs = [module.graph for module in graph.modules() if isinstance(module, fx.GraphModule)]
    return any(_draws(node) for inner in graphs for node in inner.nodes)


def _draws(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention":
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) != 0)
    if "dropout" not in name:
        return name.rstrip("_") in DRAWS
    rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return bool(rate != 0 and training is not False)


def _make_repeatable() -> None:
    """Configure torch so that compiled code depends on the shapes of a call, and not on earlier calls."""
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MOST_VARIANTS)
    dynamo_config.accumulated_recompile_limit = max(dynamo_config.accumulated_recompile_limit, MOST_VARIANTS)
    dynamo_config.specialize_float = True  # otherwise a second adapter strength turns it into a variable
    shape_config.use_duck_shape = False  # otherwise sizes that are equal in the first call have to be so in all


# ---- before the first step ------------------------------------------------------------------------------------------


def warm(passes: Sequence[Callable[[], Tensor]], trained: Sequence[Tensor], device: torch.device) -> None:
    """Compile ahead of the first step: run each forward pass (one per shape, returns a loss) and its backward pass.

    Leaves no trace: random states are restored, and no gradient reaches a parameter or the hooks that step in the
    backward pass. trained: tensors whose gradients are computed, so that the backward pass goes through all blocks;
    those of the first block are enough and save the memory for all gradients.
    """
    with kept_random_state(device), progress(len(passes), "compiling", "shape") as bar:
        for run in passes:
            torch.autograd.grad(run(), list(trained), allow_unused=True)
            bar.advance()
