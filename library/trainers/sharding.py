# SPDX-License-Identifier: Apache-2.0
"""Checks of options that do not work with weights split over processes (--shard_base)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from library.data.scan import Scan
from library.errors import UserError
from library.learning import Learning
from library.memory.choice import MemoryChoice
from library.memory.options import AUTO
from library.optim.optimizers import OptimizerChoice
from library.trainers.options import TrainerOptions


def check_sharding(options: TrainerOptions, learning: Learning, optimizer: OptimizerChoice, found: Scan) -> None:
    """Raises UserError listing everything that does not work with --shard_base, if it is given."""
    if options.distributed.shard_base and (problems := [*_problems(options, learning, optimizer, found)]):
        raise UserError(problems)


def check_split_states(options: TrainerOptions, optimizer: OptimizerChoice) -> None:
    """Raises UserError if DeepSpeed splits states that cannot be put together again."""
    state = options.state
    saved = state.save_state or state.save_state_on_train_end or bool(state.resume)
    if saved and options.distributed.splits_states and optimizer.row.block != 1:
        raise UserError(
            f"--optimizer_type {optimizer.name} has states for more than one number, and with --deepspeed they may be "
            "in two processes: leave out --save_state and --resume, or take AdamW, Lion or SGDNesterov"
        )


def _problems(options: TrainerOptions, learning: Learning, optimizer: OptimizerChoice, found: Scan) -> Iterator[str]:
    memory, choice = options.memory, MemoryChoice.of(options.memory)
    if options.distributed.deepspeed:
        yield "--shard_base and --deepspeed each split a run between processes: give one of them"
    swaps = memory.blocks_to_swap == AUTO or choice.blocks_to_swap
    if swaps or (learning.swap_options is not None and learning.swap_options.swaps_blocks):
        yield "--shard_base does not work with --blocks_to_swap: both decide where a block's weights are; give one"
    for flag in [flag for flag in choice.flags() if flag in ("--hoist_modulation", "--cpu_offload_checkpointing")]:
        yield f"--shard_base does not work with {flag}, which must know where the weights are: leave it out"
    if choice.compiled:
        yield "--shard_base does not work with --compile, which would compile the gathering, too: leave it out"
    if options.precision.mixed_precision == "fp16":
        yield "--shard_base needs --mixed_precision bf16 or no: fp16 has not been tried with it"
    if learning.reads_weights:
        yield "--shard_base is for the networks of this program: third-party modules may read weights at any time"
    if learning.changed and torch.__version__ < "2.9":
        yield f"--shard_base needs torch 2.9 or newer for full training, this is {torch.__version__}"
    if learning.in_backward is not None:
        yield "--shard_base does not work with --fused_backward_pass: leave it out"
    if learning.changed and optimizer.row.block is None:
        yield (
            f"--optimizer_type {optimizer.name} computes something over a whole weight, of which each process has a "
            "part with --shard_base: take AdamW, Lion, SGDNesterov, one of their 8-bit forms or a ScheduleFree one"
        )
    if options.loss.masked_prior_weight:
        yield (
            "--shard_base: all processes must make the same passes, and --masked_prior_weight asks for one more where "
            "a batch has masks: leave one of them out"
        )
    subsets = {id(subset.config): subset.config for subset in found.subsets}.values()
    if any(subset.custom_attributes.get("diff_output_preservation") for subset in subsets):
        yield (
            "--shard_base: all processes must make the same passes, and custom_attributes.diff_output_preservation "
            "asks for one more with some batches: remove it"
        )
