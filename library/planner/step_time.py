# SPDX-License-Identifier: Apache-2.0
"""Estimated time of a step with each memory-saving choice, for comparison: operations and bytes over fixed rates.

The rates are those of one common card; another one is faster in everything by about the same factor. What is copied
beside the computation costs what the computation does not hide.
"""

from __future__ import annotations

from library.memory.choice import MemoryChoice
from library.memory.estimate import Case, moved, total_work

FLOPS = 130e12  # a second, of bf16 matrix products: four fifths of an RTX 4090's peak
MEMORY = 0.9e12  # bytes a second
HOST = 25e9  # bytes a second from pinned main memory, PCIe 4.0 x16
COMPILED_MOVES = 0.4  # of the bytes that plain operations move: fused ones read and write once
CAST_BYTES = 5  # moved for each byte-sized weight in each use: 1 read, 2 written, 2 read
BACKWARD = 2 / 3  # of a step without recomputation, roughly


def seconds(case: Case, choice: MemoryChoice) -> float:
    """Estimated seconds per micro-batch."""
    plain, work = case.step.work, total_work(case, choice)
    moves = work.moved * (COMPILED_MOVES if choice.compiled else 1)
    passes = 2 + (work.flops - plain.flops) / max(1, plain.flops / 3)  # how often each weight is used, about
    cast = 0.0 if choice.storage == "plain" else CAST_BYTES * _small(case, choice.storage) * passes / MEMORY
    compute = work.flops / FLOPS + moves / MEMORY + cast
    forward = compute * (1 - BACKWARD) * plain.flops / max(1, work.flops)
    return compute + _stall(case, choice, forward, compute - forward) + _offload(case, choice, compute)


def _small(case: Case, storage: str) -> int:
    """Number of the weights that are cast to the computation's dtype: the bytes that storing them small saves."""
    weights = case.weights
    return weights.total("plain") - weights.total(storage)


def _stall(case: Case, choice: MemoryChoice, forward: float, backward: float) -> float:
    """Waiting for weights from main memory, swapped blocks in each pass, hoisted ones once; and writing them down.

    Of two ways that wait for nothing, the one that moves less is therefore the faster.
    """
    swapped = moved(case, choice)
    hoisted = sum(case.weights.modulations.get(choice.storage, ())) if choice.hoist else 0
    waiting = max(0.0, (swapped + hoisted) / HOST - forward) + max(0.0, swapped / HOST - backward)
    return waiting + (2 * swapped + hoisted) / MEMORY


def _offload(case: Case, choice: MemoryChoice, compute: float) -> float:
    """Offloaded activations are copied out and back beside the computation; each copy has its overhead."""
    if not choice.offload:
        return 0.0
    outputs = [case.step.stored[i].size for block in case.step.blocks for i in block.outputs]
    copies = 2 * sum(outputs) / HOST
    return 0.02 * compute + max(0.0, copies - 0.5 * compute)
