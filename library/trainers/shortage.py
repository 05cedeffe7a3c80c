# SPDX-License-Identifier: Apache-2.0
"""What becomes of a run where memory runs out: goes on with less, or ends with one line and nothing lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from library.device import NEEDS_LESS, fits, is_out_of_memory, reason_of
from library.errors import UserError
from library.types import EncodeImages


class DoesNotFit(UserError):
    """A step needs more memory than there is, whatever was tried. The weights are those from before the step."""

    def __init__(self, step: int, reason: str, tried: Sequence[str]) -> None:
        """step: counted from 0. tried: what the run was made smaller by."""
        after = f", also after this: {'; '.join(tried)}" if tried else ", and nothing makes it smaller by itself"
        super().__init__(f"out of memory in step {step + 1} ({reason}){after}. {NEEDS_LESS[0].upper()}{NEEDS_LESS[1:]}")


class HalfDone(UserError):
    """Memory ran out when weights may have been stepped: the step can be neither finished nor taken again."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(
            f"out of memory in step {step + 1} ({reason}) when some weights may have been changed already, so that it "
            "cannot be taken again, and nothing is saved: continue from the last state (--resume latest, where "
            f"--save_state wrote one) with less. {NEEDS_LESS[0].upper()}{NEEDS_LESS[1:]}"
        )


@contextmanager
def changing_weights(step: int) -> Iterator[None]:
    """Around the optimizer's step. Raises HalfDone where memory runs out in it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = reason_of(error)
    else:
        return
    raise HalfDone(step, reason)  # outside of the except clause: the error's frames hold tensors


def encoded(encode: EncodeImages, pixels: Tensor, seeds: list[int]) -> Tensor:
    """The latents of these pictures; encoded in halves where they do not fit on the card together."""
    found: list[Tensor] = []
    if len(seeds) == 1:
        return encode(pixels, seeds)
    if fits(lambda: found.append(encode(pixels, seeds))):
        return found[0]
    half = len(seeds) // 2
    return torch.cat([encoded(encode, pixels[:half], seeds[:half]), encoded(encode, pixels[half:], seeds[half:])])
