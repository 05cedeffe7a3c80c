# SPDX-License-Identifier: Apache-2.0
"""The memory-saving methods of a run: they prepare the denoiser, surround its passes, and can be extended later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from library.errors import UserError, raise_problems
from library.families.family import ModelFamily
from library.families.finetune_options import FineTuneOptions
from library.log import get_logger
from library.memory.block_swap import BlockSwap, moved_bytes
from library.memory.checkpointing import Recomputation, recomputed_blocks
from library.memory.choice import MemoryChoice
from library.memory.compiled_code import CompiledCode, kept_folder
from library.memory.compiling import CompiledBlocks, missing_compiler
from library.memory.hoisting import Hoisting
from library.memory.offload import Offload
from library.memory.options import AUTO, MemoryOptions
from library.memory.pinning import Pinning
from library.memory.quantise import check_available
from library.memory.slots import saved_bytes
from library.optim.in_backward import InBackward

log = get_logger()
MOST_STATIC_SHAPES = 3  # more share one dynamic graph: compiling takes minutes per shape


class Memory:
    """The memory-saving methods applied to the denoiser's blocks. Made when the denoiser has its adapters."""

    def __init__(
        self, family: ModelFamily, denoiser: nn.Module, choice: MemoryChoice, options: MemoryOptions,
        swap_options: FineTuneOptions | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.swap_options = swap_options
        self.family, self.denoiser, self.choice, self.options, self.device = family, denoiser, choice, options, device
        self.blocks = family.blocks(denoiser)
        self.compiled: CompiledBlocks | None = None
        self.code: CompiledCode | None = None  # of this run's compiled blocks
        self.recomputation: Recomputation | None = None  # None: compiled blocks recompute by themselves
        self.swap: BlockSwap | None = None
        self.hoisting: Hoisting | None = None
        self.offload: Offload | None = None
        self.pinning = Pinning(device)
        self._trained: list[Tensor] = []
        self.most_samples: int | None = None  # samples of a micro-batch in one pass

    def prepare(self, *, shapes: int) -> None:
        """Hoist, compile or recompute, and swap. shapes: the number of different sizes of pictures and batches."""
        choice = self.choice
        if choice.hoist:
            modulations = self.family.modulations(self.denoiser)
            assert modulations is not None  # `check_choice` has said so
            self.hoisting = Hoisting(*modulations, self.device, blocks=self.blocks, pinning=self.pinning)
            self.hoisting.install()
        if choice.compiled and self.can_compile():
            dynamic = static_shapes(self.family, shapes) == 0
            self.compiled = CompiledBlocks(
                self.blocks, self.options.dynamo_backend, budget=choice.activation_budget, dynamic=dynamic
            )
            self.code = CompiledCode(kept_folder(self.options.compile_cache_dir), self.compiled.key(self.device))
        else:
            self.recomputation = Recomputation(self.blocks)
            self.recomputation.set_budget(choice.activation_budget)
        self.exchange(choice.blocks_to_swap)
        if moves_weights(choice, self.swap_options):
            waiting = self.swap.swapped if self.swap is not None else []
            place(self.denoiser, self.device, but=[*waiting, *(self.hoisting.linears if self.hoisting else ())])

    def can_compile(self) -> bool:
        """Whether this machine has a compiler; warns if not."""
        lacking = missing_compiler(self.options.dynamo_backend, self.device)
        if lacking is not None:
            log.warning(f"--compile: no effect, this machine has no {lacking}")
        return lacking is None

    def compile_ahead(self, passes: Sequence[Callable[[], Tensor]], trained: Sequence[Tensor]) -> None:
        """Compile the blocks before the first step, if they are compiled. Arguments: those of `CompiledBlocks.warm`."""
        if self.compiled is not None and self.code is not None:
            self.compiled.warm(passes, trained, self.device, self.code)

    def keep_code(self) -> None:
        """Keep for later runs what was compiled since the first step."""
        if self.compiled is not None and self.code is not None:
            self.code.keep(self.compiled.uncompilable())

    def close(self) -> None:
        """Remove the folder of compiled code."""
        if self.code is not None:
            self.code.close()

    def exchange(self, count: int) -> None:
        """Swap `count` blocks, as --blocks_to_swap counts them, to main memory from now on.

        If this runs out of memory halfway, it can be called again with another number.
        """
        self.choice = replace(self.choice, blocks_to_swap=count)
        waiting = self.family.swapped(self.denoiser, count, self.swap_options)
        if self.swap is not None:
            self.swap.change(waiting)
        elif waiting:
            self.swap = BlockSwap(self.blocks, waiting, self.device, without=self._hoisted, pinning=self.pinning)
            self.swap.install()
        self._join_offload()

    @property
    def _hoisted(self) -> Sequence[Tensor]:
        return self.hoisting.tensors if self.hoisting is not None else ()

    def move_activations(self, trained: Iterable[Tensor]) -> None:
        """--cpu_offload_checkpointing. trained: weights that learn, at their final location."""
        if self.choice.offload:
            self._trained = [*trained]
            self.offload = Offload(self.device, pinning=self.pinning)
            self._join_offload()

    def _join_offload(self) -> None:
        """Tell activation offloading which tensors are weights, and block swapping about the offloading."""
        if self.offload is None:
            return
        self.offload.keep([*self.denoiser.parameters(), *self.denoiser.buffers(), *self._trained])
        if self.swap is not None:
            self.swap.rest = self.offload.pack, self.offload.unpack

    def changed(self, parameters: Sequence[Tensor]) -> None:
        """Notify block swapping that these weights were updated."""
        if self.swap is not None:
            self.swap.changed(parameters)

    def steps_in_backward(self, optimizer: InBackward) -> None:
        """Update all weights of a block that have a gradient before the block leaves the card."""
        if self.swap is not None:
            self.swap.before_leaving = optimizer.step_now

    def around(self) -> AbstractContextManager[None]:
        """Context manager that surrounds each prediction."""
        return self.offload.forward() if self.offload is not None else nullcontext()

    def home(self) -> None:
        """Make all weights readable until the next pass."""
        for keeper in (self.swap, self.hoisting):
            if keeper is not None:
                keeper.home()

    def stop_compiling(self, error: Exception) -> bool:
        """Run the blocks uncompiled if `error` is the compiler's. Returns whether the step can be taken again."""
        compiles = self.compiled is not None and any(not kind.broken for kind in self.compiled.kinds)
        if self.compiled is None or not compiles or not isinstance(error, TorchDynamoException):
            return False
        self.compiled.give_up(error)
        return True

    # ---- shrinking --------------------------------------------------------------------------------------------------

    def ways_to_shrink(self, batch_size: int) -> Iterator[tuple[str, Callable[[], None]]]:
        """Ways to reduce the memory of the next attempt, cheapest first: (description, action).

        Each saves memory, and is not offered again once it was tried, even if it failed.
        """
        if self._keeps_activations():
            yield "all activations are recomputed from now on (--gradient_checkpointing)", self._recompute_all
        most = min(self.most_samples or batch_size, batch_size)
        if most > 1:
            half = -(-most // 2)
            limit = partial(setattr, self, "most_samples", half)
            yield f"batches go through the model {half} samples at a time from now on", limit
        more = self._more_blocks()
        if more is not None:
            yield (
                f"{more} blocks wait in main memory from now on (--blocks_to_swap {more})",
                lambda: self.exchange(more),
            )

    def _keeps_activations(self) -> bool:
        """Whether a block is not recomputed yet but could be. Compiled blocks decide for themselves."""
        if self.recomputation is None:
            return False
        weights = self.recomputation.weights
        return len(recomputed_blocks(weights, self.choice.activation_budget)) < len(weights)

    def _recompute_all(self) -> None:
        assert self.recomputation is not None
        self.choice = replace(self.choice, activation_budget=0.0)
        self.recomputation.set_budget(0.0)

    def _more_blocks(self) -> int | None:
        """The next larger number of swapped blocks: a quarter of all more, or the first that saves more; or None."""
        if self.device.type == "cpu" or self.learns or (self.swap_options and self.swap_options.swaps_blocks):
            return None
        now, most = self.choice.blocks_to_swap, self.family.most_swapped(self.denoiser)
        sizes = moved_bytes(self.blocks, self._hoisted)
        first = min(most, now + max(1, most // 4))
        larger = (count for count in range(first, most + 1) if self._saved(sizes, count) > self._saved(sizes, now))
        return next(larger, None)

    def _saved(self, sizes: Sequence[int], count: int) -> int:
        """Bytes of device memory that swapping `count` blocks saves. sizes: bytes of each block."""
        return saved_bytes([sizes[index] for index in self.family.swapped(self.denoiser, count, self.swap_options)])

    @property
    def learns(self) -> bool:
        """Whether the denoiser's own weights learn."""
        return any(parameter.requires_grad for parameter in self.denoiser.parameters())

    def recover(self) -> None:
        """Reset the state left behind by an interrupted pass."""
        if self.swap is not None:
            self.swap.reset()


def static_shapes(family: ModelFamily, shapes: int) -> int:
    """How many of the sizes of pictures and batches are compiled one by one; 0: one dynamic graph serves all."""
    return 0 if family.text_length_varies or shapes > MOST_STATIC_SHAPES else shapes


def check_choice(
    options: MemoryOptions, family: ModelFamily, swap_options: FineTuneOptions | None, *, learning: frozenset[str],
    changed: frozenset[str], in_backward: bool, deepspeed: bool, average: bool,
) -> None:  # fmt: skip
    """Raises UserError if the machine, the model or the method does not support the memory options.

    learning: models that get gradients. changed: those whose own weights learn. average: --ema_decay.
    """
    choice = MemoryChoice.of(options)
    automatic, own = options.blocks_to_swap == AUTO, swap_options is not None and swap_options.swaps_blocks
    flags, swapping = {flag.split()[0]: flag for flag in choice.flags()}, automatic or swaps(choice, swap_options)
    if automatic:
        flags["--blocks_to_swap"] = f"--blocks_to_swap {AUTO}"
    problems = [*_machine_problems(choice, options)]
    if automatic and own:
        problems.append(
            f"--blocks_to_swap {AUTO} chooses how many blocks are swapped: leave out --double_blocks_to_swap and "
            "--single_blocks_to_swap"
        )
    if choice.storage != "plain" and "denoiser" in changed:
        flag = next(f for f in flags if f in ("--fp8_base", "--fp8_base_unet", "--base_quant"))
        problems.append(f"{flag} is for frozen models, and here the denoiser's own weights learn: leave it out")
    if deepspeed:
        moved = [f for f in ("--blocks_to_swap", "--hoist_modulation") if f in flags]
        problems += [f"{flag} does not work with --deepspeed, which moves weights itself" for flag in moved]
    if swapping and "denoiser" in changed:
        if not in_backward:
            problems.append("--blocks_to_swap needs --fused_backward_pass where the denoiser's own weights learn")
        if average:
            problems.append("--ema_decay looks at all weights in each step, which --blocks_to_swap takes off the card")
    if choice.hoist:
        problems += _hoisting_problems(family, learning, changed)
    if swapping and not problems:
        family.swapped(family.empty_denoiser(), choice.blocks_to_swap, swap_options)
    raise_problems(problems)


def _machine_problems(choice: MemoryChoice, options: MemoryOptions) -> Iterator[str]:
    if choice.storage == "nf4":
        try:
            check_available("nf4")
        except UserError as error:
            yield from error.problems
    folder = options.compile_cache_dir
    if folder and Path(folder).expanduser().is_file():
        yield f"--compile_cache_dir: {folder} is a file; a folder is needed"


def _hoisting_problems(family: ModelFamily, learning: frozenset[str], changed: frozenset[str]) -> Iterator[str]:
    if "denoiser" in changed:
        yield "--hoist_modulation is for adapters: here the modulation's own weights learn"
    if family.modulations(family.empty_denoiser()) is None:
        yield "--hoist_modulation: this model has no modulation layers in its blocks; leave it out"
    elif learning - {"denoiser"} and "denoiser" not in changed:
        yield "--hoist_modulation needs text encoders that do not learn: add --network_train_unet_only, or leave it out"


def swaps(choice: MemoryChoice, swap_options: FineTuneOptions | None) -> bool:
    return bool(choice.blocks_to_swap) or (swap_options is not None and swap_options.swaps_blocks)


def moves_weights(choice: MemoryChoice, swap_options: FineTuneOptions | None) -> bool:
    """Whether weights of the denoiser stay in main memory, so that it must not be loaded onto the card as a whole."""
    return choice.hoist or swaps(choice, swap_options)


def place(module: nn.Module, device: torch.device, *, but: Sequence[nn.Module]) -> None:
    """Move a module's weights to `device`, except for those inside `but`."""
    left = {id(child) for part in but for child in part.modules()}
    for child in module.modules():
        if id(child) not in left:
            child._apply(lambda tensor: tensor.to(device), recurse=False)
