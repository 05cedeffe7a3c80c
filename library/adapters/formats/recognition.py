# SPDX-License-Identifier: Apache-2.0
"""What the keys of an adapter file mean: layer and kind of tensor, and from all of them architecture and format.

Endings that are unknown and layers that the architecture has not are named in one line, and never make another file
of the others. Where names fit several architectures, the widths of the matrices or the model at hand decide.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from library.adapters.formats.architecture import (
    PEFT_WRAPPER,
    Architecture,
    NameIndex,
    PublishedLayer,
    Tables,
    blocks_in,
    index_of,
)
from library.adapters.formats.layer_tensors import BIAS, DOWN, MAGNITUDE, UP, inputs_of
from library.errors import UserError, first_names

Format = Literal["kohya", "comfy", "peft"]
FORMATS: tuple[Format, ...] = ("kohya", "comfy", "peft")
COMFY_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
PEFT_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", PEFT_WRAPPER)
OFT_PREFIX = "oft_unet_"
BUNDLED = "bundle_emb."  # embeddings that OneTrainer writes beside an adapter
FLAT_PREFIXES = ("lora_", "lycoris_")  # what follows has no dots before the kind of tensor
# What follows the path of a layer -> kohya's suffix ("": as it stands). In peft files an adapter's name may be inside.
ENDINGS = tuple(
    (re.compile(rf"(.+)\.({ending})"), suffix)
    for ending, suffix in (
        (r"lora_A(?:\.\w+)?\.weight", DOWN),
        (r"lora_B(?:\.\w+)?\.weight", UP),
        (r"lora_B(?:\.\w+)?\.bias", BIAS),
        (r"lora(?:_linear_layer)?\.down\.weight", DOWN),
        (r"lora(?:_linear_layer)?\.up\.weight", UP),
        (r"lora_magnitude_vector(?:\.\w+)*", MAGNITUDE),
        (
            r"alpha|dora_scale|lora_(?:down|up|mid)\.weight|w_norm|b_norm|diff|diff_b|hada_\w+|lokr_\w+"
            r"|oft_blocks(?:\.\d+)?|rescale|(?:a1|a2|b1|b2|bm|q_layer|p_layer)\.weight|lambda_layer|on_input",
            "",
        ),
    )
)
Paths = dict[str, dict[str, Tensor]]  # path as in the file -> kohya's suffix -> tensor


# ---- one key ------------------------------------------------------------------------------------------------------


def parse(key: str) -> tuple[str, str] | None:
    """(path of the layer, kohya's suffix) of a key; None when its ending is unknown."""
    if key.startswith(FLAT_PREFIXES):
        name, _, suffix = key.partition(".")
        return (name, suffix) if suffix else None
    for pattern, suffix in ENDINGS:
        found = pattern.fullmatch(key)
        if found is not None:
            return found[1], suffix or found[2]
    return None


# ---- all keys -----------------------------------------------------------------------------------------------------


def paths_in(tensors: Mapping[str, Tensor]) -> Paths:
    """The tensors by path and kind. Raises UserError naming the keys that are not understood."""
    rotations = [key for key in tensors if key.startswith(OFT_PREFIX)]
    if rotations:
        raise UserError(f"OFT has no names in other formats than kohya: {first_names(rotations)}")
    found, unknown = _sorted(tensors)
    if unknown:
        raise UserError(
            f"{len(unknown)} keys of the adapter file are not understood, {len(tensors) - len(unknown)} are: "
            f"{first_names(unknown)}"
        )
    return found


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[Paths, list[str]]:
    """The tensors by path and kind, and the keys whose ending is unknown."""
    found: Paths = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        parsed = parse(key)
        if parsed is None:
            unknown.append(key)
        else:
            found.setdefault(parsed[0], {})[parsed[1]] = value
    return found, unknown


def architecture_of(tensors: Mapping[str, Tensor], tables: Tables) -> Architecture:
    """The architecture that has every layer of the file: the first one, if several have.

    Raises UserError as `architectures_of` does.
    """
    return architectures_of(tensors, tables)[0]


def architectures_of(tensors: Mapping[str, Tensor], tables: Tables) -> list[Architecture]:
    """The architectures that have every layer of the file: several only where neither names nor widths decide.

    tables: those that are possible. Adapters of text encoders alone fit several: the first is taken.
    Raises UserError saying which architecture comes nearest and which layers it lacks.
    """
    paths = paths_in(tensors)
    missing = _missing(paths, tables)
    nearest = min(missing, key=lambda architecture: len(missing[architecture]))
    lacks = missing[nearest]
    if lacks and all(path in lacks for path in paths if not path.startswith(("lora_te", "text_encoder"))):
        known = ", ".join(architecture.title for architecture in missing)
        raise UserError(f"the adapter is for no architecture that is known ({known}): {first_names(lacks)}")
    if lacks:
        what = f"{nearest.title} comes nearest but has not"
        raise UserError(f"{len(lacks)} of {len(paths)} layers of the adapter are unknown: {what} {first_names(lacks)}")
    return [*_told_apart([architecture for architecture in missing if not missing[architecture]], paths)]


def require_one(tensors: Mapping[str, Tensor], tables: Tables, among: Tables | None, advice: str) -> None:
    """Raises UserError when several architectures have layers of these names, but other ones.

    among: the architectures that are possible; None: all `tables`. advice: how a user can decide it.
    """
    if format_of(tensors, tables, among) == "kohya":
        return
    fitting = architectures_of(tensors, tables if among is None else among)
    if len(fitting) > 1:
        titles = " and ".join(architecture.title for architecture in fitting)
        raise UserError(f"the layers' names fit {titles} alike, and their widths are of none of them: {advice}")


def _missing(paths: Paths, tables: Tables) -> dict[Architecture, list[str]]:
    """Architecture -> paths of the file that it does not have."""
    blocks = blocks_in(paths)
    return {a: [path for path in paths if index_of(a, blocks).find(path) is None] for a in tables}


def _told_apart(fitting: Sequence[Architecture], paths: Paths) -> Sequence[Architecture]:
    """Those of the architectures that a file with these paths can be for: one, or several that mean other layers."""
    if len(fitting) == 1:
        return fitting
    layers = {a: _layers(a, paths) for a in fitting}
    signs = {a: _signs(a, layers[a], paths) for a in fitting}
    best = [a for a in fitting if signs[a] == max(signs.values())]
    denoiser = {a: [name for name, layer in layers[a].items() if not layer.encoder] for a in best}
    own = [a for a in best if all(layers[a][path].kohya == path for path in denoiser[a])]
    if own or len(best) == 1 or not denoiser[best[0]]:
        return (own or best)[:1]
    meant = [{layer.kohya for layer in layers[a].values()} for a in best]
    return best[:1] if all(names == meant[0] for names in meant) else best


def _layers(architecture: Architecture, paths: Collection[str]) -> dict[str, PublishedLayer]:
    """Path -> layer."""
    index = index_of(architecture, blocks_in(paths))
    return {path: place.layer for path in paths if (place := index.find(path)) is not None}


def _signs(architecture: Architecture, layers: Mapping[str, PublishedLayer], paths: Paths) -> int:
    """How many layers tell that a file is for this architecture: by the width of the states or the text they read.

    One more where the file has a layer in all blocks but the last one, as the architecture does.
    """
    found = 0
    for path, layer in layers.items():
        widths = [widths for ending, widths in architecture.inputs.items() if re.search(ending, layer.kohya)]
        found += any(inputs_of(paths[path]) in some for some in widths)
    names = {layer.kohya for layer in layers.values()}
    blocks = {int(number[1]) for name in names if (number := re.match(r"lora_unet_joint_blocks_(\d+)_", name))}
    if architecture.not_in_last_block and blocks:
        having = {n for n in blocks if f"lora_unet_joint_blocks_{n}_{architecture.not_in_last_block}" in names}
        found += having == blocks - {max(blocks)} != set()
    return found


def architectures_with(names: Iterable[str], tables: Tables) -> Tables | None:
    """The architectures whose layers have these kohya names; None when no architecture has any of them."""
    names = [*names]
    counts = {a: sum(layer.kohya == name for name, layer in _layers(a, names).items()) for a in tables}
    most = max(counts.values(), default=0)
    return [architecture for architecture, count in counts.items() if count == most] if most else None


def _nearest_format(paths: Paths, tables: Tables) -> tuple[Format | None, bool]:
    """The format of the layers that the nearest architecture has (None: has none), and whether it has all of them."""
    if not tables:
        return None, False
    missing = _missing(paths, tables)
    nearest = min(missing, key=lambda architecture: len(missing[architecture]))
    known = set(paths).difference(missing[nearest])
    return _format_of_places(index_of(nearest, blocks_in(paths)), known) if known else None, not missing[nearest]


def format_of(tensors: Mapping[str, Tensor], tables: Tables, among: Tables | None = None) -> Format:
    """Which of the three formats the layers that are understood are in; without any, what the keys begin with.

    among: the architectures that are possible, where a model is at hand. A file may be for another one, and a small
    model may have layers that the published ones of its architecture have not.
    """
    paths, _ = _sorted(tensors)
    found, is_whole = _nearest_format(paths, tables)
    if among is not None:
        own, has_all = _nearest_format(paths, among)
        if has_all or not (is_whole and found == "kohya"):
            found = own
    if found is not None:
        return found
    starts: dict[Format, tuple[str, ...]] = {"comfy": COMFY_PREFIXES, "peft": PEFT_PREFIXES}
    return next((name for name, start in starts.items() if any(key.startswith(start) for key in tensors)), "kohya")


def _format_of_places(index: NameIndex, paths: Iterable[str]) -> Format:
    """One layer in diffusers' parts makes a file one of diffusers; kohya's names are in all formats of encoders."""
    found: Format = "kohya"
    for path in paths:
        place = index.find(path)
        if place is None:
            continue
        if place.part is not None:
            return "peft"
        if place.is_comfy(path):
            found = "comfy"
    return found
