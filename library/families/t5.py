# SPDX-License-Identifier: Apache-2.0
"""States of T5 in a Cond, for FLUX.1, Chroma and SD3: all of one length, or without padding and with a mask."""

from __future__ import annotations

from torch import nn

from library.device import on_device
from library.types import Cond, Tokens
from library.weights.text_encoders import t5_states

T5 = "t5xxl"  # name of the encoder, and of its states: (B, length, width)
MASK = f"{T5}_mask"  # (B, length) bool: True where the model may attend


def encode_t5(encoder: nn.Module, tokens: Tokens, *, masked: bool, more: int = 0) -> Cond:
    """The last states of T5. With `masked`, they are cut to the longest caption and are zero where the mask is False.

    more: number of padding tokens that the model may attend to.
    """
    device = next(encoder.parameters()).device
    ids = on_device(tokens.ids[T5], device)
    if not masked:
        return {T5: t5_states(encoder, ids, None)}
    lengths = tokens.lengths[T5]
    longest = min(max(lengths) + more, ids.shape[1])
    words = tokens.mask(T5, longest, device) if min(lengths) < longest else None
    states = t5_states(encoder, ids[:, :longest], words)
    seen = tokens.mask(T5, longest, device, more=more)
    return {T5: states.masked_fill(~seen.unsqueeze(-1), 0), MASK: seen}


def cut_padding(parts: list[Cond], cond: Cond) -> list[Cond]:
    """Cut the states of each part of a batch, one per caption, to the length that the mask of `cond` gives."""
    lengths = cond[MASK].sum(1).tolist() if MASK in cond else ()
    for part, length in zip(parts, lengths):
        part |= {key: part[key][:length] for key in (T5, MASK)}
    return parts
