# SPDX-License-Identifier: Apache-2.0
"""The figures behind a plan, from a simulated step, the headers of the files, and the optimizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from library.device import is_card
from library.learning import DENOISER
from library.memory.checkpointing import recomputed_blocks
from library.memory.choice import MemoryChoice
from library.memory.estimate import CUDA_CONTEXT, Case, Fixed, Split, Weights
from library.memory.meter import bytes_of
from library.memory.quantise import quantised_names, stored_bytes
from library.planner.optimizer_memory import appetite, float32_copies
from library.planner.planned import Planned
from library.planner.simulation import Simulation, simulate

QUANTISED = ("fp8", "int8", "nf4")


def case_of(planned: Planned) -> Case:
    """The figures of a run: from the simulation of a step, the headers of its files and its optimizer."""
    family, found, kept = planned.family, simulate(planned), planned.storage(DENOISER)
    denoiser = family.empty_denoiser(planned.load_dtype(DENOISER), "plain" if kept in QUANTISED else kept)
    return Case(
        found.step,
        replace(
            weights_of(planned, denoiser, samples=found.samples, hoists=found.hoists),
            split=split_of(planned, denoiser, found.encoder_blocks) if planned.processes > 1 else None,
        ),
        fixed_of(planned, found),
        lambda count, choice: _recomputed(found.encoder_blocks, count, choice),
        lambda count: family.swapped(denoiser, count, planned.learning.swap_options),
        max(0, family.most_swapped(denoiser)) if found.swaps else 0,
        is_card(planned.device) or planned.memory.plan,
    )


def _recomputed(encoder_blocks: int, count: int, choice: MemoryChoice) -> Collection[int]:
    """Text encoders that learn are recomputed with any budget; compiled blocks as a whole only with budget 0."""
    encoders = range(encoder_blocks if choice.activation_budget < 1 else 0)
    budget = choice.activation_budget if not choice.compiled or choice.activation_budget == 0 else 1.0
    own = recomputed_blocks([1.0] * (count - encoder_blocks), budget)
    return [*encoders, *(encoder_blocks + index for index in own)]


def weights_of(planned: Planned, denoiser: nn.Module, *, samples: int, hoists: bool) -> Weights:
    """Bytes of the denoiser's weights, block by block.

    samples: of a micro-batch. hoists: whether modulation weights may be away in a pass.
    """
    family, frozen = planned.family, DENOISER not in planned.learning.changed
    linears = {id(denoiser.get_submodule(name)) for name in quantised_names(denoiser)} if frozen else set()
    modulated = family.modulations(denoiser) if frozen and hoists else None
    layers = modulated[1] if modulated else []
    storages = ("plain", *QUANTISED) if frozen else ("plain",)
    size = lambda module, storage: _bytes(module, storage, linears)
    blocks = family.blocks(denoiser)
    by_block = {s: tuple(size(block, s) for block in blocks) for s in storages}
    inside = {id(layer): i for i, block in enumerate(blocks) for layer in block.modules()}
    sums = {s: [0] * len(blocks) for s in storages}
    for layer, storage in itertools.product(layers, storages):
        if id(layer) in inside:
            sums[storage][inside[id(layer)]] += size(layer, storage)
    item = planned.dtype.itemsize
    largest = (
        max((m.weight.numel() for m in denoiser.modules() if isinstance(m, nn.Linear) and id(m) in linears), default=0)
        * item
    )
    return Weights(
        by_block,
        {s: size(denoiser, s) - sum(by_block[s]) for s in storages},
        cast={s: largest for s in storages if s in QUANTISED and planned.storage(DENOISER) not in QUANTISED},
        modulations={s: tuple(size(layer, s) for layer in layers) for s in storages} if layers else {},
        modulations_in={s: tuple(own) for s, own in sums.items()},
        modulation_outputs=sum(layer.out_features for layer in layers) * samples * item,
    )


def split_of(planned: Planned, denoiser: nn.Module, encoder_blocks: int) -> Split:
    """Bytes of the first of the processes that split the denoiser's weights. Others have as many or fewer rows."""
    weights, processes = weights_of(planned, denoiser, samples=0, hoists=False), planned.processes
    split, learn = planned.split_weights(denoiser), planned.shards_learn
    rows = sum(-(-len(p) // processes) * (p.nbytes // len(p)) for p in split)
    whole = sum(p.nbytes for p in split)
    rest = bytes_of((*denoiser.parameters(), *denoiser.buffers())) - whole
    part, cast = rows / max(1, whole), planned.pass_dtype.itemsize / planned.trained_dtype.itemsize if learn else 1.0
    counts = [sum(p.numel() for p in {*block.parameters()} & split) for block in planned.family.blocks(denoiser)]
    outside = sum(p.numel() for p in split) - sum(counts)
    own, gathered = {}, {}
    for storage, blocks in weights.blocks.items():
        own[storage] = rows + rest if storage == "plain" else int(weights.total(storage) * part)
        sizes = [int(count * planned.trained_dtype.itemsize * cast) for count in counts] if learn else blocks
        unblocked = int(outside * planned.trained_dtype.itemsize * cast) if learn else weights.rest[storage]
        gathered[storage] = unblocked + max(map(sum, itertools.pairwise(sizes)), default=sum(sizes))
    if not learn:
        return Split(own, gathered)
    leaving = planned.pass_dtype.itemsize - planned.trained_dtype.itemsize * part
    gradients = (*(0 for _ in range(encoder_blocks)), *(int(count * leaving) for count in counts))
    return Split(own, gathered, gradients, exchange=2 * 4 * max(counts, default=0))  # sent and received, in float32


def _bytes(module: nn.Module, storage: str, linears: Collection[int]) -> int:
    """Bytes of a module on the meta device whose Linears with these ids are kept in `storage`."""
    total = sum(t.nbytes for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())
    if storage != "plain":
        for child in module.modules():
            if isinstance(child, nn.Linear) and id(child) in linears:
                total += stored_bytes(child, storage) - child.weight.nbytes  # type: ignore[arg-type]
    return total


def fixed_of(planned: Planned, found: Simulation) -> Fixed:
    """Bytes of everything besides the denoiser."""
    count, kind = sum(map(math.prod, found.shapes)), planned.bf16_update
    hunger = appetite(planned.optimizer, torch.float32 if kind != "plain" else found.dtype)
    copies = float32_copies(planned.optimizer, found.shapes) if kind != "plain" else 0
    in_backward = planned.learning.in_backward is not None
    return Fixed(
        others=found.encoders + found.vae + found.batch,
        encoders=_frozen_encoders(planned),
        learning=found.learning,
        average=4 * count if planned.averages_weights else 0,
        gradients=0 if in_backward else count * found.dtype.itemsize,
        gradients_stay=found.flat,
        optimizer=hunger.states(found.shapes) + (2 * count if kind == "kahan" else 0),
        update=hunger.update(found.shapes) + copies,
        in_backward=in_backward,
        context=CUDA_CONTEXT if is_card(planned.device) or planned.memory.plan else 0,
    )


def _frozen_encoders(planned: Planned) -> dict[str, int]:
    """Bytes of the text encoders that run in each step and do not learn, by the way they are kept."""
    family, learning = planned.family, planned.learning.parts
    names = [] if planned.caches_texts else [name for name in family.encoders if name not in learning]
    empty = [family.part(name).empty(planned.load_dtype(name), planned.storage(name)) for name in names]
    sizes = [bytes_of((*module.parameters(), *module.buffers())) for module in empty]
    return {planned.choice.encoder_storage: sum(sizes)}
