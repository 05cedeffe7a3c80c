# SPDX-License-Identifier: Apache-2.0
"""Adapter files in the three formats in which people share them, converted into each other.

    tensors = read_tensors("lora.safetensors")
    headers = {**metadata, **header(tensors, "peft", tables)}
    write_tensors("peft.safetensors", convert(tensors, "peft", tables), headers)

kohya   lora_down / lora_up / alpha / dora_scale
comfy   lora_A / lora_B / alpha / dora_scale; DoRA magnitudes as ComfyUI's formula needs them
peft    lora_A / lora_B / lora_magnitude_vector; alpha / rank is inside lora_B, alpha itself in the file's header
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.formats.adapter_files import by_module, read_metadata, read_tensors, write_tensors
from library.adapters.formats.architecture import NameIndex, PublishedLayer, Tables, blocks_in, index_of
from library.adapters.formats.damage import damaged_if_broken, require_whole
from library.adapters.formats.deltas import adapted_weight, row_norms, scaled_rows
from library.adapters.formats.layer_tensors import (
    ALPHA,
    COMFY_DORA,
    DORA,
    DOWN,
    LORA,
    MID,
    UP,
    as_kohya,
    dora_axis,
    fold_alpha,
    fuse,
    split,
    unfold_alpha,
)
from library.adapters.formats.oft_files import convert_oft, is_bounded, is_oft
from library.adapters.formats.peft_config import ALPHAS
from library.adapters.formats.recognition import FORMATS, Format, architecture_of, format_of, paths_in, require_one
from library.errors import UserError, first_names, retold
from library.text_files import parse_json

__all__ = [
    "FORMATS", "Format", "alphas_in", "architecture_of", "by_module", "convert", "dora_norms", "format_of", "header",
    "layers_in", "read_adapter", "read_metadata", "read_tensors", "to_kohya", "write_tensors",
]  # fmt: skip

Norms = Mapping[str, tuple[Tensor, Tensor]]  # kohya name -> norms of the rows: (of W, of W + change)
Alphas = Mapping[str, tuple[float, torch.dtype] | None]  # kohya name or "*" (all others) -> alpha; None: without
COMFY_ENDINGS = {DOWN: "lora_A.weight", UP: "lora_B.weight", COMFY_DORA: DORA}
NOT_OF_COMFY = {"on_input", "lambda_layer"}  # IA3 and T-LoRA of LyCORIS
PEFT_ENDINGS = {DOWN: "lora_A.weight", UP: "lora_B.weight", DORA: "lora_magnitude_vector"}


# ---- converting ---------------------------------------------------------------------------------------------------


def convert(
    tensors: Mapping[str, Tensor],
    to: str,
    tables: Tables,
    *,
    alphas: Alphas | None = None,
    norms: Norms | None = None,
) -> dict[str, Tensor]:
    """An adapter's tensors in another format.

    alphas: result of `alphas_in` for the file's header. norms: result of `dora_norms`, for DoRA to or from comfy.
    Raises UserError for unknown layers, and for tensors without a name in the format.
    """
    require_whole(tensors)
    if is_oft(tensors):
        return convert_oft(tensors, to, tables)
    if (
        to == "kohya"
        and format_of(tensors, tables) == to
        and not any(key.endswith(f".{COMFY_DORA}") for key in tensors)
    ):
        _layers(tensors, _index(tensors, tables))  # raises for unknown layers
        return dict(tensors)
    index = _index(tensors, tables)
    layers = _restored_layers(tensors, index, alphas)
    return WRITERS[to]({n: (layer, _dora_for(own, n, norms, to)) for n, (layer, own) in layers.items()}, index)


def to_kohya(
    tensors: Mapping[str, Tensor],
    tables: Tables,
    *,
    alphas: Alphas | None = None,
    among: Tables | None = None,
    apart: bool = False,
) -> dict[str, Tensor]:
    """Tensors of any format under kohya keys; those that have kohya keys already are returned as they are.

    DoRA magnitudes of a comfy file stay ComfyUI's, under a name of their own: `deltas.kohya_dora` needs the weights.
    among: the architectures that are possible; None: all `tables`. apart: parts that cannot be one layer keep names
    of their own.
    Raises UserError, also for tensors that are damaged.
    """
    require_whole(tensors)
    if format_of(tensors, tables, among) == "kohya":
        return dict(tensors)
    possible = tables if among is None else among
    if is_bounded(tensors):
        return convert_oft(tensors, "kohya", possible)
    found = _kohya_keys(_restored_layers(tensors, _index(tensors, possible), alphas, apart))
    require_whole(found)
    return found


def read_adapter(
    path: str | Path, tables: Tables, among: Tables | None = None, *, advice: str | None = None, apart: bool = False
) -> dict[str, Tensor]:
    """An adapter file of any format with kohya keys as `to_kohya` gives them, alphas of its header included.

    apart: as for `to_kohya`. advice: given, files whose layers do not tell their architecture are refused with it.
    Raises UserError naming the file.
    """
    tensors = read_tensors(path)
    with retold(lambda line: line if str(path) in line else f"{path}: {line}"):
        found = to_kohya(tensors, tables, alphas=alphas_in(read_metadata(path)), among=among, apart=apart)
        if advice is not None:
            require_one(tensors, tables, among, advice)
    return found


def header(tensors: Mapping[str, Tensor], to: str, tables: Tables) -> dict[str, str]:
    """Header entries of a file in format `to` that converting back restores alpha from."""
    if to == "kohya" or is_oft(tensors):
        return {}
    index = _index(tensors, tables)
    if to == "comfy" and index.architecture.comfy_alpha:
        return {}
    found = {
        name: [float(own[ALPHA]), str(own[ALPHA].dtype).removeprefix("torch.")] if ALPHA in own else None
        for name, (_, own) in _layers(tensors, index).items()
        if UP in own
    }
    if not any(found.values()):
        return {}
    [(most, _)] = Counter(json.dumps(value) for value in found.values()).most_common(1)
    common = json.loads(most)
    return {ALPHAS: json.dumps({"*": common, **{name: a for name, a in found.items() if a != common}})}


def alphas_in(metadata: Mapping[str, str]) -> Alphas | None:
    """The alphas in a header that `header` made; None without. Raises UserError when the entry is damaged."""
    if ALPHAS not in metadata:
        return None
    try:
        entries = parse_json(metadata[ALPHAS])
        return {name: entry and (float(entry[0]), _dtype(entry[1])) for name, entry in entries.items()}
    except (ValueError, AttributeError, TypeError, IndexError):
        raise UserError(f"the header entry {ALPHAS} of the adapter file is not understood") from None


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found


def dora_norms(tensors: Mapping[str, Tensor], weight_of: Callable[[str], Tensor | None], tables: Tables) -> Norms:
    """The `norms` of every DoRA layer. weight_of: kohya name -> the base model's weight, rows as published.

    Raises UserError naming the layers that have no weight.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    missing: list[str] = []
    if is_oft(tensors):
        return found
    for name, (_, own) in _layers(tensors, _index(tensors, tables)).items():
        if COMFY_DORA not in own and not _on_output_axis(own):
            continue
        weight = weight_of(name)
        if weight is None:
            missing.append(name)
        else:
            beside = {suffix: value.to(weight.device) for suffix, value in own.items()}  # the model may be on a card
            with damaged_if_broken(name):
                found[name] = row_norms(weight).cpu(), row_norms(adapted_weight(beside, weight)).cpu()
    if missing:
        raise UserError(
            f"the base model has no weight for {len(missing)} layers of the adapter: {first_names(missing)}"
        )
    return found


def layers_in(tensors: Mapping[str, Tensor], tables: Tables) -> dict[str, PublishedLayer]:
    """kohya name -> layer of an adapter in any format. tables: the architectures that are possible."""
    return {name: layer for name, (layer, _) in _layers(tensors, _index(tensors, tables)).items()}


def _index(tensors: Mapping[str, Tensor], tables: Tables) -> NameIndex:
    return index_of(architecture_of(tensors, tables), blocks_in(paths_in(tensors)))


Layers = Mapping[str, tuple[PublishedLayer, Mapping[str, Tensor]]]  # kohya name -> (layer, kohya's suffix -> tensor)


def _layers(
    tensors: Mapping[str, Tensor], index: NameIndex, apart: bool = False
) -> dict[str, tuple[PublishedLayer, dict[str, Tensor]]]:
    """Whole published layers, or parts of them. index: of an architecture that has every layer."""
    whole: dict[str, tuple[PublishedLayer, dict[str, Tensor]]] = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    twice: list[str] = []
    for path, own in paths_in(tensors).items():
        place = index.find(path)
        assert place is not None  # `architecture_of` has found every layer
        with damaged_if_broken(path):
            own = as_kohya(own, comfy=place.is_comfy(path))
        name = place.layer.kohya
        if place.part in parts.get(name, {}) or (name in whole and None in (place.part, *parts.get(name, (None,)))):
            twice.append(path)
        elif place.part is None:
            whole[name] = place.layer, own
        else:
            parts.setdefault(name, {})[place.part] = own
            whole[name] = place.layer, {}  # keeps the order of the file
    if twice:
        raise UserError(f"{len(twice)} layers are in the adapter file under two names: {first_names(twice)}")
    found: dict[str, tuple[PublishedLayer, dict[str, Tensor]]] = {}
    for name, (layer, own) in whole.items():
        try:
            with damaged_if_broken(name):
                found[name] = (layer, fuse(layer, parts[name])) if name in parts else (layer, own)
        except UserError:
            if not apart:
                raise
            found |= {layer.apart(i): (layer, dict(part)) for i, part in parts[name].items()}
    return found


def _restored_layers(
    tensors: Mapping[str, Tensor], index: NameIndex, alphas: Alphas | None, apart: bool = False
) -> Layers:
    """The layers, with the alphas of a header."""
    layers = _layers(tensors, index, apart)
    if alphas is None:
        return layers
    return {name: (layer, _restored(own, name, alphas)) for name, (layer, own) in layers.items()}


def _restored(own: Mapping[str, Tensor], name: str, alphas: Alphas) -> Mapping[str, Tensor]:
    entry = alphas.get(name, alphas.get("*"))
    if entry is None or ALPHA in own or UP not in own:
        return own
    alpha, dtype = entry
    return unfold_alpha(own, torch.tensor(alpha, dtype=dtype))


def _on_output_axis(own: Mapping[str, Tensor]) -> bool:
    return DORA in own and dora_axis(own[DORA]) == "output"


def _dora_for(own: Mapping[str, Tensor], name: str, norms: Norms | None, to: str) -> Mapping[str, Tensor]:
    """Magnitudes for ComfyUI, which divides by the norm of W where all others divide by the norm of W + change."""
    came, wanted = (COMFY_DORA, DORA) if to != "comfy" else (DORA, COMFY_DORA)
    if came not in own or dora_axis(own[came]) == "input":
        return own
    if norms is None or name not in norms:
        raise UserError(
            f"{name} is a DoRA: ComfyUI scales it by the base model's weights, so the comfy format cannot be written "
            "or read without them (--base_model)"
        )
    base, changed = norms[name]
    rest = {suffix: value for suffix, value in own.items() if suffix != came}
    with damaged_if_broken(name):
        return {**rest, wanted: scaled_rows(own[came], base / changed if to == "comfy" else changed / base)}


# ---- writers ------------------------------------------------------------------------------------------------------


def _kohya_keys(layers: Layers) -> dict[str, Tensor]:
    return {f"{name}.{suffix}": value for name, (_, own) in layers.items() for suffix, value in own.items()}


def _write_comfy(layers: Layers, index: NameIndex) -> dict[str, Tensor]:
    """ComfyUI knows nearly every suffix of kohya below a dotted path too; Tucker form only with kohya's suffixes."""
    foreign = [f"{name} ({', '.join(sorted(own))})" for name, (_, own) in layers.items() if NOT_OF_COMFY & set(own)]
    if foreign:
        raise UserError(f"{len(foreign)} adapters have no name in the comfy format: {first_names(foreign)}")
    found: dict[str, Tensor] = {}
    for layer, own in layers.values():
        names = {COMFY_DORA: DORA} if MID in own else COMFY_ENDINGS
        ready = own if index.architecture.comfy_alpha or UP not in own else fold_alpha(own)
        found |= {f"{layer.comfy}.{names.get(suffix, suffix)}": value for suffix, value in ready.items()}
    return found


def _write_peft(layers: Layers, index: NameIndex) -> dict[str, Tensor]:
    foreign = [
        f"{name} ({', '.join(sorted(own))})"
        for name, (_, own) in layers.items()
        if not {DOWN, UP} <= set(own) <= LORA or (DORA in own and not _on_output_axis(own))
    ]
    if foreign:
        raise UserError(f"{len(foreign)} adapters have no name in the peft format: {first_names(foreign)}")
    found: dict[str, Tensor] = {}
    for layer, own in layers.values():
        with damaged_if_broken(layer.kohya):
            for i, part in split(layer, fold_alpha(own)).items():
                if DORA in part:  # (out) for Linear, (1, out, 1, 1) for convolutions
                    dora = part[DORA]
                    part[DORA] = dora.flatten() if part[DOWN].dim() == 2 else dora.transpose(0, 1).contiguous()
                found |= {f"{layer.parts[i]}.{PEFT_ENDINGS[suffix]}": value for suffix, value in part.items()}
    return found


WRITERS: dict[str, Callable[[Layers, NameIndex], dict[str, Tensor]]] = {
    "kohya": lambda layers, index: _kohya_keys(layers),
    "comfy": _write_comfy,
    "peft": _write_peft,
}
