# SPDX-License-Identifier: Apache-2.0
"""Adapter files: reading, writing, and the three formats in which people share them (names: format_tables.py).

    tensors = read_tensors("lora.safetensors")
    write_tensors("peft.safetensors", convert(tensors, "peft"), {**metadata, **header(tensors, "peft")})

kohya   lora_down / lora_up / alpha / dora_scale
comfy   lora_A / lora_B / alpha / dora_scale; DoRA magnitudes as ComfyUI's formula needs them
peft    lora_A / lora_B / lora_magnitude_vector; alpha / rank is inside lora_B, alpha itself in the file's header
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from library.errors import UserError, first_names
from networks.format_layers import (
    ALPHA,
    DORA,
    DOWN,
    LORA,
    MID,
    UP,
    adapted_weight,
    fold_alpha,
    fuse,
    on_output_axis,
    row_norms,
    scale_rows,
    split,
    unfold_alpha,
)
from networks.format_oft import convert_oft, is_oft
from networks.format_tables import ARCHITECTURES, BY_NAME, Architecture, Index, Layer, blocks_in, index_of

Format = Literal["kohya", "comfy", "peft"]
FORMATS: tuple[Format, ...] = ("kohya", "comfy", "peft")
Norms = Mapping[str, tuple[Tensor, Tensor]]  # kohya name -> norms of the rows: (of W, of W + change)
Alphas = Mapping[str, tuple[float, torch.dtype] | None]  # kohya name or "*" (all others) -> alpha; None: without
TORCH_SUFFIXES = (".pt", ".ckpt", ".pth", ".bin")
ALPHAS = "lora_alphas"  # header entry: kohya name -> [alpha, dtype] or null, "*" stands for all other layers
PEFT_METADATA = "lora_adapter_metadata"  # header entry of diffusers: ranks and alphas of its LoraConfig

COMFY_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
PEFT_PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
# Flat names with the path of diffusers: of OneTrainer, and of older FLUX trainers
FLAT_PEFT_PREFIXES = ("lora_transformer_", "lora_unet_transformer_blocks_", "lora_unet_single_transformer_blocks_")
# Of U-Nets: kohya's own names for Stable Diffusion 1.x and 2.x, and flat names of diffusers for XL
FLAT_UNET_PREFIXES = ("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_")
# What follows the path of a layer -> kohya's suffix ("": as it stands). In peft files an adapter's name may be inside.
ENDINGS = tuple(
    (re.compile(rf"(.+)\.({ending})"), suffix)
    for ending, suffix in (
        (r"lora_A(?:\.\w+)?\.weight", DOWN),
        (r"lora_B(?:\.\w+)?\.weight", UP),
        (r"lora(?:_linear_layer)?\.down\.weight", DOWN),
        (r"lora(?:_linear_layer)?\.up\.weight", UP),
        (r"lora_magnitude_vector(?:\.\w+)*", DORA),
        (r"alpha|dora_scale|lora_(?:down|up|mid)\.weight|w_norm|b_norm|diff|diff_b|hada_\w+|lokr_\w+", ""),
    )
)
COMFY_ENDINGS = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
PEFT_ENDINGS = {DOWN: "lora_A.weight", UP: "lora_B.weight", DORA: "lora_magnitude_vector"}


# ---- files --------------------------------------------------------------------------------------------------------


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter file. Raises UserError when it is missing, damaged or holds something else.

    Alphas that diffusers wrote into the header come as tensors `<layer>.alpha`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such adapter file")
    try:
        if path.suffix in TORCH_SUFFIXES:
            found = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file

            found = load_file(path)
    except Exception as error:  # readers raise many kinds; each means the same to the user
        raise UserError(f"{path}: not a readable adapter file ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no adapter tensors")
    return _with_peft_alphas(found, read_metadata(path), path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header entries of a .safetensors file; none for other files."""
    if Path(path).suffix in TORCH_SUFFIXES:
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Write with safetensors, or with torch (no metadata) when the suffix says so."""
    path = Path(path)
    if path.suffix in TORCH_SUFFIXES:
        torch.save(dict(tensors), path)
    else:
        from safetensors.torch import save_file

        save_file(dict(tensors), path, metadata=dict(metadata or {}) or None)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`name.suffix` keys as name -> suffix -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, suffix = key.partition(".")
        found.setdefault(name, {})[suffix] = value
    return found


def _with_peft_alphas(tensors: dict[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    """With the alphas of `lora_adapter_metadata`: `<part>.lora_alpha`, `.alpha_pattern`, `.use_rslora`."""
    if PEFT_METADATA not in metadata:
        return tensors
    try:
        config = json.loads(metadata[PEFT_METADATA])
        found = dict(tensors)
        for key, value in tensors.items():
            layer, suffix = _parse(key) or (key, "")
            part = layer.partition(".")[0]
            if suffix != DOWN or f"{part}.lora_alpha" not in config or f"{layer}.alpha" in tensors:
                continue
            own = layer.removeprefix(f"{part}.")
            patterns = config.get(f"{part}.alpha_pattern") or {}
            chosen = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", own)), None)
            alpha = float(config[f"{part}.lora_alpha"] if chosen is None else chosen)
            # rsLoRA divides by sqrt(rank), every other reader by rank
            found[f"{layer}.alpha"] = torch.tensor(
                alpha * len(value) ** 0.5 if config.get(f"{part}.use_rslora") else alpha
            )
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the header entry {PEFT_METADATA} is not understood ({error})") from None
    return found


# ---- which format, which architecture -----------------------------------------------------------------------------


def _parse(key: str) -> tuple[str, str] | None:
    """(path of the layer, kohya's suffix) of a key; None when its ending is unknown."""
    if key.startswith("lora_"):
        name, _, suffix = key.partition(".")
        return (name, suffix) if suffix else None
    for pattern, suffix in ENDINGS:
        found = pattern.fullmatch(key)
        if found is not None:
            return found[1], suffix or found[2]
    return None


def _paths(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path as in the file -> kohya's suffix -> tensor. Raises UserError naming the keys that are not understood."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        parsed = _parse(key)
        if parsed is None:
            unknown.append(key)
        else:
            found.setdefault(parsed[0], {})[parsed[1]] = value
    if unknown:
        raise UserError(f"{len(unknown)} keys of the adapter file are not understood: {first_names(unknown)}")
    return found


def architecture_of(tensors: Mapping[str, Tensor]) -> str:
    """Name in `format_tables.BY_NAME` of the architecture that has every layer of the file.

    Raises UserError saying which one is nearest and what it lacks. Adapters of text encoders alone fit several
    architectures: the first is taken.
    """
    paths = _paths(tensors)
    blocks = blocks_in(paths)
    missing = {a.name: [p for p in paths if index_of(a, blocks).find(p) is None] for a in ARCHITECTURES}
    name = min(missing, key=lambda name: len(missing[name]))
    lacks = missing[name]
    if lacks and all(path in lacks for path in paths if not path.startswith(("lora_te", "text_encoder"))):
        known = ", ".join(a.title for a in ARCHITECTURES)
        raise UserError(f"the adapter is for no architecture that is known ({known}): {first_names(lacks)}")
    if lacks:
        what = f"{BY_NAME[name].title} comes nearest but has not"
        raise UserError(f"{len(lacks)} of {len(paths)} layers of the adapter are unknown: {what} {first_names(lacks)}")
    return "sd2" if name == "sd1" and _is_sd2(tensors) else name


def _is_sd2(tensors: Mapping[str, Tensor]) -> bool:
    """Stable Diffusion 1.x and 2.x have the same names; the text is 768 and 1024 wide."""
    reads_text = re.compile(r".*(attn2[._]to_[kv]|self_attn[._][qkv]_proj)\W.*(down|lora_A)\b.*")
    return any(
        reads_text.fullmatch(key) and value.dim() > 1 and value.shape[1] == 1024 for key, value in tensors.items()
    )


def _of_deep_unet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the layers of a file are in Stable Diffusion XL and not all in 1.x: its attention is deeper."""
    try:
        return architecture_of(tensors) == "sdxl"
    except UserError:
        return False


def format_of(tensors: Mapping[str, Tensor]) -> Format:
    """Which of the three formats the keys are closest to."""
    if any(key.startswith(COMFY_PREFIXES) for key in tensors):
        return "comfy"
    if any(key.startswith((*PEFT_PREFIXES, *FLAT_PEFT_PREFIXES, "base_model.")) for key in tensors):
        return "peft"
    if any(key.startswith(FLAT_UNET_PREFIXES) for key in tensors):
        return "peft" if _of_deep_unet(tensors) else "kohya"
    bare = [path for key in tensors if (parsed := _parse(key)) and "." in (path := parsed[0])]
    blocks = blocks_in(bare)
    places = [index_of(a, blocks).find(path) for a in ARCHITECTURES for path in bare]
    known = [place for place in places if place is not None]
    if not known:
        return "kohya"
    return "peft" if any(place.part is not None for place in known) else "comfy"


# ---- converting ---------------------------------------------------------------------------------------------------


def convert(
    tensors: Mapping[str, Tensor],
    to: str,
    *,
    alphas: Alphas | None = None,
    norms: Norms | None = None,
    architecture: str | None = None,
) -> dict[str, Tensor]:
    """An adapter's tensors in another format.

    alphas: what `alphas_in` found in the file's header. norms: of `dora_norms`, for DoRA to or from comfy.
    architecture: name in `format_tables.BY_NAME`; found from the keys when None.
    Raises UserError for unknown layers, and for tensors that the format has no name for.
    """
    if is_oft(tensors):
        return convert_oft(tensors, to, architecture)
    came = format_of(tensors)
    if came == to == "kohya":
        return dict(tensors)
    index = _index(tensors, architecture)
    layers: Layers = _layers(tensors, index)
    if alphas is not None:
        layers = {name: (layer, _restored(own, name, alphas)) for name, (layer, own) in layers.items()}
    if (came == "comfy") != (to == "comfy"):
        layers = {n: (layer, _dora_for(own, n, norms, to)) for n, (layer, own) in layers.items()}
    return WRITERS[to](layers, index.architecture)


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any format as kohya keys; tensors that have kohya keys already are returned as they are."""
    if format_of(tensors) == "kohya":
        return dict(tensors)
    return convert(tensors, "kohya")


def read_adapter(path: str | Path) -> dict[str, Tensor]:
    """An adapter file of any format with kohya keys, alphas of its header included."""
    tensors = read_tensors(path)
    if format_of(tensors) == "kohya":
        return tensors
    return convert(tensors, "kohya", alphas=alphas_in(read_metadata(path)))


def header(tensors: Mapping[str, Tensor], to: str, *, architecture: str | None = None) -> dict[str, str]:
    """What the header of a file in format `to` must have so that the way back restores alpha."""
    if to == "kohya" or is_oft(tensors):
        return {}
    index = _index(tensors, architecture)
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
    """The entry that `header` made, read. Raises UserError when it is damaged."""
    if ALPHAS not in metadata:
        return None
    try:
        entries = json.loads(metadata[ALPHAS])
        return {name: entry and (float(entry[0]), _dtype(entry[1])) for name, entry in entries.items()}
    except (ValueError, AttributeError, TypeError, IndexError):
        raise UserError(f"the header entry {ALPHAS} of the adapter file is not understood") from None


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(name)
    return found


def dora_norms(tensors: Mapping[str, Tensor], weight_of: Callable[[str], Tensor | None]) -> Norms:
    """The `norms` of every DoRA layer. weight_of: kohya name -> the base model's weight, rows as published.

    Raises UserError naming the layers that have no weight.
    """
    if is_oft(tensors):
        return {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    missing: list[str] = []
    for name, (_, own) in _layers(tensors, _index(tensors, None)).items():
        if not on_output_axis(own):
            continue
        weight = weight_of(name)
        if weight is None:
            missing.append(name)
        else:
            beside = {suffix: value.to(weight.device) for suffix, value in own.items()}  # the model may be on a card
            found[name] = row_norms(weight).cpu(), row_norms(adapted_weight(beside, weight)).cpu()
    if missing:
        raise UserError(
            f"the base model has no weight for {len(missing)} layers of the adapter: {first_names(missing)}"
        )
    return found


def layers_in(tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """kohya name -> layer of an adapter in any format."""
    return {name: layer for name, (layer, _) in _layers(tensors, _index(tensors, None)).items()}


def _index(tensors: Mapping[str, Tensor], architecture: str | None) -> Index:
    return index_of(BY_NAME[architecture or architecture_of(tensors)], blocks_in(_paths(tensors)))


Layers = Mapping[str, tuple[Layer, Mapping[str, Tensor]]]  # kohya name -> (layer, kohya's suffix -> tensor)


def _layers(tensors: Mapping[str, Tensor], index: Index) -> dict[str, tuple[Layer, dict[str, Tensor]]]:
    """Whole published layers. Raises UserError for paths that the architecture has not."""
    whole: dict[str, tuple[Layer, dict[str, Tensor]]] = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    unknown: list[str] = []
    for path, own in _paths(tensors).items():
        place = index.find(path)
        if place is None:
            unknown.append(path)
            continue
        own = _dora_as_kohya(own)
        name = place.layer.kohya
        if place.part is None:
            whole[name] = place.layer, own
        else:
            parts.setdefault(name, {})[place.part] = own
            whole[name] = place.layer, {}  # keeps the order of the file
    if unknown:
        title = index.architecture.title
        raise UserError(f"{len(unknown)} layers of the adapter file are not in {title}: {first_names(unknown)}")
    return {name: (layer, fuse(layer, parts[name]) if name in parts else own) for name, (layer, own) in whole.items()}


def _dora_as_kohya(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes with one axis per axis of the weight: peft has (out) for Linear, (1, out, 1, 1) for convolutions."""
    if DORA not in own or DOWN not in own or UP not in own:
        return own
    axes, rows = own[DOWN].dim(), len(own[UP])
    if own[DORA].dim() == 1 or (own[DORA].dim() == 4 and own[DORA].shape[:2] == (1, rows) and rows > 1):
        return {**own, DORA: own[DORA].reshape(rows, *[1] * (axes - 1))}
    return own


def _restored(own: Mapping[str, Tensor], name: str, alphas: Alphas) -> Mapping[str, Tensor]:
    entry = alphas.get(name, alphas.get("*"))
    if entry is None or ALPHA in own or UP not in own:
        return own
    alpha, dtype = entry
    return unfold_alpha(own, torch.tensor(alpha, dtype=dtype))


def _dora_for(own: Mapping[str, Tensor], name: str, norms: Norms | None, to: str) -> Mapping[str, Tensor]:
    """Magnitudes for ComfyUI, which divides by the norm of W where all others divide by the norm of W + change."""
    if not on_output_axis(own):
        return own
    if norms is None or name not in norms:
        raise UserError(
            f"{name} is a DoRA: ComfyUI scales it by the base model's weights, so the comfy format cannot be written "
            "or read without them (--base_model)"
        )
    base, changed = norms[name]
    return scale_rows(own, base / changed if to == "comfy" else changed / base)


# ---- writers ------------------------------------------------------------------------------------------------------


def _write_kohya(layers: Layers, architecture: Architecture) -> dict[str, Tensor]:
    return {f"{name}.{suffix}": value for name, (_, own) in layers.items() for suffix, value in own.items()}


def _write_comfy(layers: Layers, architecture: Architecture) -> dict[str, Tensor]:
    """ComfyUI knows every suffix of kohya below a dotted path too; the Tucker form only with kohya's suffixes."""
    found: dict[str, Tensor] = {}
    for layer, own in layers.values():
        names = {} if MID in own else COMFY_ENDINGS
        ready = own if architecture.comfy_alpha or UP not in own else fold_alpha(own)
        found |= {f"{layer.comfy}.{names.get(suffix, suffix)}": value for suffix, value in ready.items()}
    return found


def _write_peft(layers: Layers, architecture: Architecture) -> dict[str, Tensor]:
    foreign = [
        f"{name} ({', '.join(sorted(own))})"
        for name, (_, own) in layers.items()
        if not {DOWN, UP} <= set(own) <= LORA or (DORA in own and not on_output_axis(own))
    ]
    if foreign:
        raise UserError(f"{len(foreign)} adapters have no name in the peft format: {first_names(foreign)}")
    found: dict[str, Tensor] = {}
    for layer, own in layers.values():
        for i, part in split(layer, fold_alpha(own)).items():
            if DORA in part:  # (out) for Linear, (1, out, 1, 1) for convolutions
                dora = part[DORA]
                part[DORA] = dora.flatten() if part[DOWN].dim() == 2 else dora.transpose(0, 1).contiguous()
            found |= {f"{layer.parts[i]}.{PEFT_ENDINGS[suffix]}": value for suffix, value in part.items()}
    return found


WRITERS: dict[str, Callable[[Layers, Architecture], dict[str, Tensor]]] = {
    "kohya": _write_kohya,
    "comfy": _write_comfy,
    "peft": _write_peft,
}
