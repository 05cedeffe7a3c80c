# SPDX-License-Identifier: Apache-2.0
"""Splitting and fusing the tensors of an adapter, for layers that are whole in one format and parts in another.

A LoRA on a fused layer has one down matrix and one up matrix whose rows belong to the parts: split, every part has the
same A and its rows of B. A layer that was trained in parts (`split_qkv`) has an up matrix of blocks: split, every part
has its own A and B of the small rank. Tensors here have kohya's suffixes: lora_down.weight, lora_up.weight, alpha ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from library.adapters.formats.architecture import PublishedLayer
from library.errors import UserError
from library.key_tables import part_rows

DOWN, UP, MID, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"
MAGNITUDE = "lora_magnitude_vector"  # PEFT's DoRA: always of the output axis, (out) or for convolutions (1, out, 1, 1)
COMFY_DORA = "dora_scale_of_comfy"  # in memory only: magnitudes of the output axis as ComfyUI's formula needs them
BIAS, BIAS_ADDED = "lora_up.bias", "diff_b"  # PEFT's lora_bias, and what is added to the bias of the layer
LORA = {DOWN, UP, ALPHA, DORA}  # what can be split and fused, and has a name in peft

Tensors = Mapping[str, Tensor]  # of one layer: kohya's suffix -> value


def scale_of(own: Tensors, rank: int | None = None) -> float:
    """alpha / rank; 1 without alpha. rank: None for that of a LoRA's down matrix."""
    return float(own[ALPHA]) / (len(own[DOWN]) if rank is None else rank) if ALPHA in own else 1.0


# ---- alpha --------------------------------------------------------------------------------------------------------


def fold_alpha(own: Tensors) -> dict[str, Tensor]:
    """Multiply alpha / rank into the up matrix, for readers without alpha.

    The up matrix keeps its dtype where nothing is lost in it (a power of two in bfloat16 and float32); else it becomes
    float32, from which `unfold_alpha` finds every half-precision value again.
    """
    up, scale = own[UP], scale_of(own)
    wide = up.double() if up.dtype == torch.float64 else up.float()
    folded = wide * scale
    narrow = folded.to(up.dtype)
    exact = torch.equal(narrow.to(wide.dtype), folded) and torch.equal(folded / scale if scale else folded, wide)
    return {**{name: value for name, value in own.items() if name != ALPHA}, UP: narrow if exact else folded}


def unfold_alpha(own: Tensors, alpha: Tensor) -> dict[str, Tensor]:
    """The inverse of `fold_alpha`, exact but for float32 with a scale that is not a power of two (1 ulp)."""
    scale = float(alpha) / len(own[DOWN])
    up = own[UP].double() if own[DOWN].dtype == torch.float64 else own[UP].float()
    return {ALPHA: alpha, **own, UP: (up / scale).to(own[DOWN].dtype) if scale else own[UP]}


# ---- whole -> parts -----------------------------------------------------------------------------------------------


def split(layer: PublishedLayer, own: Tensors) -> dict[int, dict[str, Tensor]]:
    """Part -> its tensors. Parts that were not trained are left out.

    Raises UserError for tensors that cannot be split: Tucker form, norms, other kinds of adapters.
    """
    if not layer.swap and len(layer.parts) == 1:
        return {0: dict(own)}
    _require_lora(layer, own)
    own = _swapped(layer, own)
    rows = part_rows(len(own[UP]), own[DOWN].shape[1], len(layer.parts))
    ups = own[UP].split(rows)
    found: dict[int, dict[str, Tensor]] = {}
    for i, columns in _own_ranks(ups, own).items():  # copies: files hold no tensor twice, and readers scale in place
        found[i] = {DOWN: own[DOWN][columns].clone(), UP: ups[i][:, columns].clone()}
        if ALPHA in own:  # alpha / rank stays
            found[i][ALPHA] = own[ALPHA] * (len(found[i][DOWN]) / len(own[DOWN]))
        if DORA in own:
            found[i][DORA] = own[DORA].split(rows)[i].clone()
    return found


def _own_ranks(ups: Sequence[Tensor], own: Tensors) -> dict[int, slice]:
    """Part -> the ranks that it uses: its own block where the up matrix is made of blocks, else all of them."""
    rank, count = ups[0].shape[1], len(ups)
    used = [up.ne(0).any(0) for up in ups]
    equal = {i: slice(i * rank // count, (i + 1) * rank // count) for i in range(count)}
    if rank % count == 0 and count > 1 and all(not _outside(used[i], block) for i, block in equal.items()):
        return equal
    spans = {i: mask.nonzero().flatten().tolist() for i, mask in enumerate(used) if mask.any()}
    blocks = {i: slice(ranks[0], ranks[-1] + 1) for i, ranks in spans.items()}
    edges = [0, *(edge for block in blocks.values() for edge in (block.start, block.stop)), rank]
    one_after_the_other = all(before == after for before, after in zip(edges[::2], edges[1::2]))
    if one_after_the_other and blocks and count > 1 and DORA not in own:
        return blocks
    return {i: slice(0, rank) for i in range(count)}


def _outside(used: Tensor, block: slice) -> bool:
    return bool(used[: block.start].any() or used[block.stop :].any())


# ---- parts -> whole -----------------------------------------------------------------------------------------------


def fuse(layer: PublishedLayer, parts: Mapping[int, Tensors]) -> dict[str, Tensor]:
    """The inverse of `split`. Raises UserError for what cannot be one layer."""
    if not layer.swap and len(layer.parts) == 1:
        return dict(parts[0])
    for own in parts.values():
        _require_lora(layer, own)
        if DORA in own and dora_axis(own[DORA]) == "input":
            raise UserError(
                f"{layer.kohya}: DoRA over input columns of {len(parts)} parts of one layer has no name in other "
                "formats, only DoRA over output rows has"
            )
    if len(parts) == len(layer.parts) and _share_down(parts):
        first = parts[0]
        whole = {**first, UP: torch.cat([parts[i][UP] for i in range(len(parts))])}
    else:
        whole = _blocks(layer, parts)
    if any(DORA in own for own in parts.values()):
        if len(parts) < len(layer.parts) or any(DORA not in own for own in parts.values()):
            raise UserError(f"{layer.kohya}: DoRA on some parts of a fused layer only has no name in other formats")
        whole[DORA] = torch.cat([parts[i][DORA] for i in range(len(parts))])
    return _swapped(layer, whole)


def _share_down(parts: Mapping[int, Tensors]) -> bool:
    first = parts[0]
    same = all(scale_of(own) == scale_of(first) and (ALPHA in own) == (ALPHA in first) for own in parts.values())
    return same and all(torch.equal(own[DOWN], first[DOWN]) for own in parts.values())


def _blocks(layer: PublishedLayer, parts: Mapping[int, Tensors]) -> dict[str, Tensor]:
    """Downs stacked, ups as diagonal blocks; the rows of missing parts are zero."""
    scales = {scale_of(own) for own in parts.values()}
    if len(scales) > 1:  # no alpha can say that
        parts = {i: fold_alpha(own) for i, own in parts.items()}
    columns = []
    for i in range(len(layer.parts)):
        if i in parts:
            columns.append(parts[i][UP])
        else:
            columns.append(next(iter(parts.values()))[UP].new_zeros(_rows(layer, i, parts), 0))
    present = [parts[i] for i in sorted(parts)]
    whole = {DOWN: torch.cat([own[DOWN] for own in present]), UP: torch.block_diag(*columns)}
    if all(ALPHA in own for own in present):
        whole[ALPHA] = torch.stack([own[ALPHA] for own in present]).sum()
    return whole


def _rows(layer: PublishedLayer, missing: int, parts: Mapping[int, Tensors]) -> int:
    """Number of rows of a part that the file lacks, from the most similar part that it has."""
    width = layer.widths[missing]
    like = min(parts, key=lambda i: abs(layer.widths[i] - width))
    return round(len(parts[like][UP]) * width / layer.widths[like])


def _swapped(layer: PublishedLayer, own: Tensors) -> dict[str, Tensor]:
    if not layer.swaps(len(own[UP]), own[DOWN].shape[1]):
        return dict(own)
    turned = {UP, *([DORA] if DORA in own and dora_axis(own[DORA]) == "output" else [])}
    return {name: torch.cat(value.chunk(2)[::-1]) if name in turned else value for name, value in own.items()}


def _require_lora(layer: PublishedLayer, own: Tensors) -> None:
    foreign = sorted(set(own) - LORA)
    if foreign or DOWN not in own or UP not in own:
        raise UserError(
            f"{layer.kohya} ({', '.join(sorted(own))}): only LoRA and DoRA can be split into parts or fused"
        )


# ---- what a file's keys mean --------------------------------------------------------------------------------------


def dora_axis(magnitude: Tensor) -> Literal["output", "input"]:
    """Which axis of the weight the magnitudes of kohya's `dora_scale` belong to: (out, 1 ...) or (1, in ...)."""
    return "input" if magnitude.dim() > 1 and magnitude.shape[0] == 1 != magnitude.numel() else "output"


def as_kohya(own: Tensors, *, comfy: bool) -> dict[str, Tensor]:
    """Tensors of one layer with kohya's meaning, which the key alone decides: no shape tells it of a square layer.

    comfy: the layer has its name in the comfy format, where magnitudes of the output axis are ComfyUI's.
    """
    found = dict(own)
    if MAGNITUDE in found:
        magnitude = found.pop(MAGNITUDE)
        if magnitude.dim() == 1:
            magnitude = magnitude.reshape(-1, *[1] * (own[DOWN].dim() - 1 if DOWN in own else 1))
        elif magnitude.dim() > 2:
            magnitude = magnitude.transpose(0, 1)
        found[DORA] = magnitude.contiguous()
    elif comfy and DORA in found and dora_axis(found[DORA]) == "output":
        found[COMFY_DORA] = found.pop(DORA)
    if BIAS in found and DOWN in found:
        found[BIAS_ADDED] = found.pop(BIAS) * scale_of(own)
    return found


def inputs_of(own: Tensors) -> int:
    """Inputs of the layer that these tensors are for, 0 where they do not tell."""
    pairs = (("lokr_w1", "lokr_w2"), ("lokr_w1_b", "lokr_w2"), ("lokr_w1", "lokr_w2_b"), ("lokr_w1_b", "lokr_w2_b"))
    singles = ((name,) for name in (DOWN, "hada_w1_b", "diff", "a2.weight"))
    for names in (*singles, *pairs):
        if all(name in own and own[name].dim() > 1 for name in names):
            return math.prod(own[name].shape[1] for name in names)
    return 0
