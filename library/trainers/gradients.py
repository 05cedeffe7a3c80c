# SPDX-License-Identifier: Apache-2.0
"""The gradients of one optimizer step over its micro-batches, also where a step does not fit at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from library.device import fits, free_memory, is_out_of_memory, reason_of, seed_everything
from library.log import get_logger
from library.rng import derive_seed, torch_generator
from library.trainers.forward import Forward
from library.trainers.memory import Memory
from library.trainers.shortage import DoesNotFit, HalfDone
from library.trainers.updates import Updates
from library.types import Batch

log = get_logger()


@dataclass
class Gradients:
    """Forward and backward passes of a step.

    Noise, timesteps and dropout are keyed by the seed and `Batch.position` only: however many processes share the
    batches of a step, the same are drawn.
    """

    forward: Forward
    updates: Updates
    memory: Memory
    accelerator: Accelerator
    seed: int
    may_retry: bool  # not where other processes are in the middle of the same step
    tried: list[str] = field(default_factory=list)  # what the run was made smaller by, as it was said

    def of(self, batches: Sequence[Batch], step: int) -> Tensor:
        """The mean loss of the micro-batches of `step` (0-dim), with all gradients in place.

        When memory runs out on the way, the same batches with the same noise are taken again with a smaller footprint.
        Raises DoesNotFit when there is none, HalfDone when weights have been stepped in the backward pass already.
        """
        while True:
            try:
                return self._learn_all(batches)
            except Exception as error:
                if not self.may_retry or not is_out_of_memory(error):
                    raise
                reason = reason_of(error)
            self._shrink(batches, step, reason)  # outside of the except clause: the error's frames hold tensors

    def _learn_all(self, batches: Sequence[Batch]) -> Tensor:
        if self.may_retry:
            self.updates.hold_room()
        total = torch.zeros((), device=self.forward.device)
        for index, batch in enumerate(batches):
            last, share = index == len(batches) - 1, 1 / len(batches)
            total += self._learn(batch, share=share, is_last=last)
        return total

    def _learn(self, batch: Batch, *, share: float, is_last: bool) -> Tensor:
        """Backward pass of one micro-batch's mean loss times `share`, which is returned."""
        generator = torch_generator(self.seed, "noise", batch.position, 0, device=self.forward.device)
        seed_everything(derive_seed(self.seed, "dropout", batch.position, 0))
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

    def _shrink(self, batches: Sequence[Batch], step: int, reason: str) -> None:
        """Forget the step that did not fit, and make the next try smaller in the first way that fits itself."""
        if self.updates.in_backward is not None and self.updates.in_backward.started:
            raise HalfDone(step, reason)
        largest = max(batch.size for batch in batches)
        while fits(self._forget) and (way := next(self.memory.ways_to_shrink(largest), None)):
            what, action = way
            if fits(action):
                self.tried.append(what)
                log.warning(f"out of memory in step {step + 1}: {what}; the step is taken again")
                return
            self.tried.append(f"{what} (for which there was no memory)")
            log.warning(f"out of memory in step {step + 1}, and again on the way to this: {what}")
        raise DoesNotFit(step, reason, self.tried)

    def _forget(self) -> None:
        """Let go of all that a step holds which ended half done."""
        self.updates.release_room()
        self.updates.zero_gradients()
        self.memory.recover()
        free_memory()
