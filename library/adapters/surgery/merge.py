# SPDX-License-Identifier: Apache-2.0
"""Merging for the command line: adapters into the files of a model, or several LoRAs into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.adapters.formats.architecture import Architecture, Tables
from library.adapters.formats.layer_tensors import MID, Tensors
from library.adapters.surgery.block_ratios import strengths
from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.checkpoint_merge import Adapter, MergedWeights
from library.adapters.surgery.lora_math import ADDED, Change, as_tensors, change_of, is_lora, joined, not_lora, summed
from library.adapters.surgery.tool_files import (
    KnownArchitectures,
    LoraFile,
    WeightFile,
    checkpoint_metadata,
    common_architecture,
    dtype_named,
    merged_metadata,
    open_checkpoint,
    open_encoder,
    read_lora,
    save_lora,
    spec_of,
    titles,
    write_checkpoint,
)
from library.adapters.surgery.tool_options import ENCODERS, MergeOptions, ModelsOptions
from library.errors import UserError, first_names
from library.log import get_logger
from library.rng import torch_generator

WeightedLora = tuple[LoraFile, Callable[[str], float]]  # a file, and how strongly each of its layers is merged


@dataclass(frozen=True)
class ModelPart:
    """A file of a model that adapters are merged into, and the file to write."""

    option: str  # "sd_model", or the name of a text encoder: "clip_l"
    path: str
    save_to: str
    encoder: str | None = None  # for the file of one text encoder


def merge(asked: MergeOptions, known: KnownArchitectures) -> None:
    """Read, merge, write: into the given files of a model, or without them into one LoRA. Raises UserError."""
    files = ((name, read, write) for name, (read, write) in asked.parts.items() if read and write)
    parts = [ModelPart(name, read, write, ENCODERS.get(name)) for name, read, write in files]
    if parts:
        merge_into_parts(asked, parts, known)
    else:
        loras = read_weighted(asked.models, known.tables)
        found = common_architecture([file for file, _ in loras], known.tables)
        require_architecture(found, asked.architectures, "--models are", known.tables)
        merge_into_one(asked, loras, known.tables)


def read_weighted(
    models: ModelsOptions, tables: Tables, architecture: Architecture | None = None
) -> list[WeightedLora]:
    """The files of --models with their ratios. architecture: of the model at hand. Raises UserError."""
    files = [read_lora(path, tables, architecture) for path in models.models]
    numbers: Sequence[Sequence[float] | None] = models.block_ratios() or [None] * len(files)
    return [(file, strengths(ratio, own)) for file, ratio, own in zip(files, models.ratios, numbers)]


def require_architecture(found: Architecture, wanted: Sequence[str] | None, what: str, tables: Tables) -> None:
    """Raises UserError when a file is for another architecture than the script. wanted: None for all."""
    if wanted is not None and found.name not in wanted:
        titles_wanted = " and ".join(table.title for table in tables if table.name in wanted)
        raise UserError(f"{what} for {found.title}; this script is for {titles_wanted}: use merge_lora.py")


# ---- into a model -------------------------------------------------------------------------------------------------


def merge_into_parts(asked: MergeOptions, parts: Sequence[ModelPart], known: KnownArchitectures) -> None:
    """Every file of the model with the adapters in it. All files are checked before the first is written."""
    denoiser = next((part for part in parts if part.encoder is None), None)
    own = None if denoiser is None else open_part(denoiser, known, None)[1].architecture
    loras = read_weighted(asked.models, known.tables, own)
    architecture = own or common_architecture([file for file, _ in loras], known.tables)
    opened = [(part, *open_part(part, known, architecture)) for part in parts]
    for part, _, layers in opened:
        what = f"--{part.option} {part.path} is"
        require_architecture(layers.architecture, asked.architectures, what, known.tables)
    adapters = [Adapter(file.path, file.layers, strength) for file, strength in loras]
    merged = [(part, file, MergedWeights(file, layers, adapters)) for part, file, layers in opened]
    _report_left(parts, [weights for _, _, weights in merged])
    dtype = dtype_named(asked.save.save_precision)
    for part, file, weights in merged:
        metadata = _part_metadata(part, file, weights.layers, loras, asked.save.no_metadata)
        write_checkpoint(part.save_to, file, weights.tensor, weights.changed, metadata, dtype, grown=weights.grown)
        report_merged(part.save_to, weights)


def report_merged(path: str, weights: MergedWeights) -> None:
    """Log the number of layers with changed weights, and warn about adapters that change nothing."""
    get_logger().info("%s: %d layers merged", path, len(weights.moved))
    same = [name for name in dict.fromkeys(weights.used) if name not in weights.moved]
    if same:
        get_logger().warning("%s: %d layers of the adapters change nothing: %s", path, len(same), first_names(same))


def open_part(
    part: ModelPart, known: KnownArchitectures, architecture: Architecture | None
) -> tuple[WeightFile, CheckpointLayers]:
    """One file of the model. A text encoder does not tell its architecture: the denoiser does, else the adapters."""
    if part.encoder is None:
        return open_checkpoint(f"--{part.option}", part.path, known)
    assert architecture is not None
    return open_encoder(part.path, part.encoder, architecture)


def _report_left(parts: Sequence[ModelPart], merged: Sequence[MergedWeights]) -> None:
    """Warn about layers that none of the files has. Raises UserError when the denoiser lacks some, or for no layer."""
    used = {name for weights in merged for name in weights.used}
    left = [*dict.fromkeys(name for weights in merged for name in weights.left if name not in used)]
    missing = [name for name in left if name.startswith("lora_unet_")]
    if missing and any(part.encoder is None for part in parts):
        raise UserError(f"the model lacks {len(missing)} layers of the adapters: {first_names(missing)}")
    if not used:
        raise UserError(f"none of the adapters' layers is in the given files: {first_names(left)}")
    if left:
        get_logger().warning(
            "%d layers of the adapters are of models that are not given and are not merged: %s",
            len(left), first_names(left),
        )  # fmt: skip


def _part_metadata(
    part: ModelPart, file: WeightFile, layers: CheckpointLayers, loras: Sequence[WeightedLora], no_metadata: bool
) -> dict[str, str]:
    """Header of a merged file: the source's entries, with new modelspec.* except for what only the source knows."""
    found = checkpoint_metadata(file)
    if no_metadata or part.encoder is not None:
        return {key: value for key, value in found.items() if not key.startswith("modelspec.")}
    sources = [(part.path, found), *((share.path, share.metadata) for share, _ in loras)]
    facts = layers.architecture.facts(layers.shapes.keys(), False)
    spec = spec_of(facts, part.save_to, lora=False, merged_from=titles(sources))
    new = ("modelspec.title", "modelspec.date", "modelspec.merged_from", "modelspec.implementation_version")
    stale = ("modelspec.hash_sha256", "modelspec.thumbnail")
    kept = {key: value for key, value in found.items() if key not in (*new, *stale)}
    return {**spec, **kept}


# ---- several into one ---------------------------------------------------------------------------------------------


def merge_into_one(asked: MergeOptions, loras: Sequence[WeightedLora], tables: Tables) -> None:
    """Merge several LoRAs into one: by summing their matrices or, exactly, by concatenating them (--concat)."""
    found: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, layers in same_layers(loras, tables).items():
        try:
            if all(set(own) <= ADDED for own, _ in layers):
                found[name] = added(name, layers)
            elif asked.merge.concat:
                found[name] = concatenated(name, layers, asked.merge.shuffle)
            else:
                found[name] = _summed(name, layers)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems[:3] + [f"and {len(problems) - 3} layers more"] * (len(problems) > 3))
    save_lora(asked.save, found, merged_metadata([file for file, _ in loras], found, asked.save, tables))


def same_layers(loras: Sequence[WeightedLora], tables: Tables) -> dict[str, list[tuple[Tensors, float]]]:
    """Layer -> its tensors in each file that has it, with the ratio there; under one name, in the order of files."""
    architecture = common_architecture([file for file, _ in loras], tables)
    found: dict[str, list[tuple[Tensors, float]]] = {}
    for file, strength in loras:
        layers = CheckpointLayers(architecture, dict.fromkeys(file.layers, ()))
        for name, own in file.layers.items():
            layer = layers.canonical(name)
            kohya = name if layer is None else layer.kohya
            found.setdefault(kohya, []).append((own, strength(kohya)))
    return found


def concatenated(name: str, layers: Sequence[tuple[Tensors, float]], shuffle: bool) -> dict[str, Tensor]:
    """The ranks of all files concatenated: exactly the sum of the changes. Raises UserError."""
    change = exact_sum(name, layers)
    up, down = change.up, change.down
    if shuffle:
        order = torch.randperm(change.rank, generator=torch_generator("shuffle", name))
        up, down = up[:, order], down[order]
    return as_tensors(up, down, change.shape, change.rank)


def exact_sum(name: str, layers: Sequence[tuple[Tensors, float]], device: torch.device | str = "cpu") -> Change:
    """Σ ratio · ΔW of one layer of all files. Raises UserError."""
    try:
        return joined([(change_of(name, own, device), factor) for own, factor in layers])
    except ValueError as error:
        raise UserError(f"{name} is not the same layer in all files ({error})") from None


def _summed(name: str, layers: Sequence[tuple[Tensors, float]]) -> dict[str, Tensor]:
    for own, _ in layers:
        if not is_lora(own):
            raise UserError(not_lora(name, own))
        if MID in own:
            raise UserError(f"{name} is in Tucker form and cannot be summed: use --concat or svd_merge_lora.py")
    try:
        return summed(layers)
    except ValueError as error:
        raise UserError(f"{name} cannot be summed ({error}): use --concat or svd_merge_lora.py") from None


def added(layer: str, layers: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """The sum of changes of norms or whole weights, which is exact. Raises UserError for different shapes."""
    names = [*dict.fromkeys(name for own, _ in layers for name in own)]
    parts = {name: [own[name].float() * factor for own, factor in layers if name in own] for name in names}
    if any(len({value.shape for value in values}) > 1 for values in parts.values()):
        raise UserError(f"{layer} is not the same layer in all files (its shapes differ)")
    return {name: torch.stack(values).sum(0) for name, values in parts.items()}
