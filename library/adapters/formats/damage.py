# SPDX-License-Identifier: Apache-2.0
"""Checks of the tensors of an adapter file, before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from library.adapters.formats.layer_tensors import ALPHA, DOWN, MID, UP
from library.errors import UserError, first_names

# what torch raises where tensors are damaged
BROKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError)
WHOLE_NUMBERS = (ALPHA, "on_input")  # tensors that may be integers


@contextmanager
def damaged_if_broken(name: str) -> Iterator[None]:
    """Context for arithmetic with the tensors of layer `name`: errors of torch become a UserError about damage."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"{name} is damaged ({(str(error).splitlines() or [type(error).__name__])[0]})") from None


def require_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError naming damaged tensors: inf or nan, an alpha that is not one number, matrices that do not fit."""
    wrong = [f"{key} {problem}" for key, value in tensors.items() if (problem := _problem(key, value))]
    wrong += [f"{name} {problem}" for name, problem in _ranks(tensors)]
    if wrong:
        raise UserError(f"the adapter file is damaged: {len(wrong)} of {len(tensors)} tensors: {first_names(wrong)}")


def _problem(key: str, value: Tensor) -> str | None:
    kind = key.rpartition(".")[2]
    dtype = str(value.dtype).removeprefix("torch.")
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        return "is not a plain tensor"
    if value.is_complex() or not (value.is_floating_point() or kind in WHOLE_NUMBERS):
        return f"is {dtype}"
    if kind in WHOLE_NUMBERS:
        if value.numel() != 1:
            return f"has the shape {tuple(value.shape)}, one number is needed"
        return None if bool(torch.isfinite(value.double()).all()) else f"is {float(value)}"
    if not value.numel():
        return f"is empty, of the shape {tuple(value.shape)}"
    return None if bool(torch.isfinite(value.float()).all()) else "is not finite"


def _ranks(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of matrices that cannot be multiplied: name -> what is wrong."""
    found: list[tuple[str, str]] = []
    for key, down in tensors.items():
        name = key.removesuffix(f".{DOWN}")
        up, mid = tensors.get(f"{name}.{UP}"), tensors.get(f"{name}.{MID}")
        if name == key or up is None:
            continue
        if down.dim() < 2 or up.dim() < 2 or up.shape[1] != len(down) or up.shape[2:].numel() != 1:
            found.append((name, f"has a down matrix of {tuple(down.shape)} and an up matrix of {tuple(up.shape)}"))
        elif mid is not None and (mid.dim() != 4 or mid.shape[:2] != (len(down),) * 2 or down.shape[2:].numel() != 1):
            found.append((name, f"has a middle matrix of {tuple(mid.shape)} for rank {len(down)}"))
    return found
