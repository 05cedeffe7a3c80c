# SPDX-License-Identifier: Apache-2.0
"""Out of memory: the run continues with a smaller footprint, or ends with one line and without losing a state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.device import NEEDS_LESS, fits, free_memory, is_out_of_memory, reason_of
from library.errors import UserError
from library.log import get_logger
from library.trainers.memory import Memory
from library.trainers.updates import Updates
from library.types import EncodeImages

log = get_logger()


class DoesNotFit(UserError):
    """A step needs more memory than there is, after all attempts. The weights are those before the step."""

    def __init__(self, step: int, reason: str, tried: Sequence[str]) -> None:
        """step: counted from 0. tried: what was done to reduce memory."""
        after = f", also after this: {'; '.join(tried)}" if tried else ", and nothing makes it smaller by itself"
        super().__init__(f"out of memory in step {step + 1} ({reason}){after}. {NEEDS_LESS[0].upper()}{NEEDS_LESS[1:]}")


class HalfDone(UserError):
    """Memory ran out after some weights may have been updated: the step can neither be finished nor repeated."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"out of memory in step {step + 1} ({reason}) when some weights may have been changed already, so that it "
            "cannot be taken again, and nothing is saved: continue from the last state (--resume latest, where "
            f"--save_state wrote one) with less. {NEEDS_LESS[0].upper()}{NEEDS_LESS[1:]}"
        )


@contextmanager
def changing_weights(step: int) -> Iterator[None]:
    """Context manager around the optimizer's step. Raises HalfDone if memory runs out in it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = reason_of(error)
    else:
        return
    raise HalfDone(step, reason)  # outside of the except clause: the error's frames hold tensors


@dataclass
class Retry:
    """Computes the gradients of a step; if they do not fit, reduces the footprint and computes them again."""

    updates: Updates
    memory: Memory
    allowed: bool  # False with several processes, which are in the middle of the same step
    tried: list[str] = field(default_factory=list)  # what was done to reduce memory, as logged

    def __call__(self, gradients: Callable[[], Tensor], *, largest_batch: int, step: int) -> Tensor:
        """The result of `gradients`, which must compute the same each time it is called.

        An error of the compiler in the backward pass is another reason to call it again: blocks then run uncompiled.
        largest_batch: samples of the largest micro-batch. Raises DoesNotFit if nothing makes the step smaller, and
        HalfDone if weights were already updated in the backward pass.
        """
        while True:
            try:
                if self.allowed:
                    self.updates.hold_room()
                return gradients()
            except Exception as error:
                if not self.allowed or not (is_out_of_memory(error) or self._uncompile(error)):
                    raise
                reason = reason_of(error) if is_out_of_memory(error) else None
            # outside of the except clause: the error's frames hold tensors
            if reason is not None:
                self._shrink(largest_batch, step, reason)
            else:
                self._forget()

    def _uncompile(self, error: Exception) -> bool:
        """Whether `error` is the compiler's and the step can be taken again without it."""
        started = self.updates.in_backward is not None and self.updates.in_backward.started
        return not started and self.memory.stop_compiling(error)

    def _shrink(self, largest_batch: int, step: int, reason: str) -> None:
        """Discard the step that did not fit, and reduce memory in the first way that itself fits."""
        if self.updates.in_backward is not None and self.updates.in_backward.started:
            raise HalfDone(step, reason)
        while fits(self._forget) and (way := next(self.memory.ways_to_shrink(largest_batch), None)):
            what, action = way
            if fits(action):
                self.tried.append(what)
                log.warning(f"out of memory in step {step + 1}: {what}; the step is taken again")
                return
            self.tried.append(f"{what} (for which there was no memory)")
            log.warning(f"out of memory in step {step + 1}, and again on the way to this: {what}")
        raise DoesNotFit(step, reason, self.tried)

    def _forget(self) -> None:
        """Free everything that an unfinished step holds."""
        self.updates.release_room()
        self.updates.zero_gradients()
        self.memory.recover()
        free_memory()


def encoded(encode: EncodeImages, pixels: Tensor, seeds: list[int]) -> Tensor:
    """Encode pictures to latents, in halves if they do not fit on the card together."""
    found: list[Tensor] = []
    if len(seeds) == 1:
        return encode(pixels, seeds)
    if fits(lambda: found.append(encode(pixels, seeds))):
        return found[0]
    half = len(seeds) // 2
    return torch.cat([encoded(encode, pixels[:half], seeds[:half]), encoded(encode, pixels[half:], seeds[half:])])
