# SPDX-License-Identifier: Apache-2.0
"""The gradients of one optimizer step over its micro-batches, also where a step does not fit at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from library.device import free_memory, seed_everything
from library.log import get_logger
from library.rng import derive_seed, torch_generator
from library.trainers.forward import Forward
from library.trainers.memory import Memory, is_out_of_memory
from library.trainers.updates import Updates
from library.types import Batch

log = get_logger()


@dataclass
class Gradients:
    """Forward and backward passes of a step. Noise and dropout depend on the micro-step and the rank only."""

    forward: Forward
    updates: Updates
    memory: Memory
    accelerator: Accelerator
    seed: int
    rank: int
    may_retry: bool  # not where other processes are in the middle of the same step

    def of(self, batches: Sequence[Batch], first_micro_step: int, step: int) -> Tensor:
        """The mean loss of the micro-batches of `step` (0-dim), with all gradients in place.

        When memory runs out on the way, the same batches with the same noise are taken again with a smaller footprint.
        """
        while True:
            total = torch.zeros((), device=self.forward.device)
            try:
                for index, batch in enumerate(batches):
                    last, share = index == len(batches) - 1, 1 / len(batches)
                    total += self._learn(batch, first_micro_step + index, share=share, is_last=last)
                return total
            except Exception as error:
                ways = self._ways_to_go_on(error, batches)
                if not ways:
                    raise
            self._shrink(step, *ways[0])  # outside of the except clause: the error's frames hold the step's tensors

    def _learn(self, batch: Batch, micro_step: int, *, share: float, is_last: bool) -> Tensor:
        """Backward pass of one micro-batch's mean loss times `share`, which is returned."""
        generator = torch_generator(self.seed, "noise", micro_step, self.rank, device=self.forward.device)
        seed_everything(derive_seed(self.seed, "dropout", micro_step, self.rank))
        total = torch.zeros((), device=self.forward.device)
        there = batch.to(self.forward.device)
        noised = self.forward.noised(there, generator)
        parts = list(self.forward.parts(there, noised, self.memory.most_samples, batch.cond))
        for index, (part, noised) in enumerate(parts):
            with self.updates.backward(is_last=is_last and index == len(parts) - 1):
                loss = self.forward.losses(part, noised).sum() * (share / batch.size)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _ways_to_go_on(self, error: Exception, batches: Sequence[Batch]) -> list[tuple[str, Callable[[], None]]]:
        """After `error` in a step: what would make it smaller. Nothing where that is not the matter, or is too late."""
        stepped = self.updates.in_backward is not None and self.updates.in_backward.started
        if not is_out_of_memory(error) or not self.may_retry or stepped:
            return []
        return list(self.memory.ways_to_shrink(max(batch.size for batch in batches)))

    def _shrink(self, step: int, what: str, action: Callable[[], None]) -> None:
        """Forget the step that did not fit, and do as `what` says."""
        self.updates.zero_gradients()
        self.memory.recover()
        free_memory()
        action()
        log.warning(f"out of memory in step {step + 1}: {what}; the step is taken again")
