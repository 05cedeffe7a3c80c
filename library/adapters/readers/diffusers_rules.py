# SPDX-License-Identifier: Apache-2.0
"""diffusers 0.42, `load_lora_weights` of each pipeline: which files it converts, what it leaves, what it refuses.

A U-Net's pipelines convert kohya files whole or not at all; those of FLUX.1 know the blocks of the real model;
those of FLUX.2 convert kohya's names, and ComfyUI's where no alpha is beside a LoRA; Lumina's converts ComfyUI's names,
of whole blocks. HunyuanImage-2.1 has no such method there, but its transformer has: `load_lora_adapter(...,
prefix="transformer")`. The others take the formats that the table of their layers names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from library.adapters.formats.architecture import LayerPart
from library.adapters.formats.layer_tensors import ALPHA
from library.adapters.readers.reading import NamedModel, Names, Program, Reading, ReadLayer, grouped, split_key, take
from library.errors import first_names

FLAT = ("lora_te_", "lora_te1_", "lora_te2_", "lora_unet_")
KOHYA = {"lora_down.weight", "lora_up.weight", "alpha"}
PEFT = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha")  # of FLUX.2
FLUX_BLOCKS = {"double": 19, "single": 38}
FLUX_LINEAR1, LUMINA_QKV = 21504, 3840  # rows that are written into its converters
T5 = ("lora_te2_", "lora_te3_")
INSIDE = re.compile(r"lora_unet_(double|single)_blocks_(\d+)_.+")
ATTENTION = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)$")
# Layers of FLUX.1 outside of the blocks: converted to names that the transformer has not
OUTSIDE = re.compile(r"lora_unet_(guidance_in|img_in|txt_in|time_in|vector_in|final_layer).*")
# Layers of FLUX.2 whose kohya names it converts; others are left out
FLUX2_KNOWN = re.compile(
    r"lora_unet_((double|single)_blocks_.+|img_in|txt_in|time_in_(in|out)_layer|final_layer_linear)"
)
NOT_LORA = "all keys must have 'lora' in them, and {} have not: {}"


def read_diffusers(tensors: Mapping[str, Tensor], model: NamedModel) -> Reading:
    reading = Reading("peft")
    dropped = [key for key in tensors if "dora_scale" in key]  # with a warning
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    CONVERTERS.get(model.name, _of_formats)(reading, kept, model)
    reading.unread += dropped
    return reading


# ---- Stable Diffusion ---------------------------------------------------------------------------------------------


def _of_unet(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    if not all(key.startswith(FLAT) for key in tensors):
        _of_peft(reading, tensors, model)
        return
    strays = _not_plain(tensors)
    if strays:
        reading.refused = f"it converts plain LoRA only, and {len(strays)} keys are of another kind: "
        reading.refused += first_names(strays)
    else:
        take(reading, tensors, _flat_names(model), ("LoRA",), KOHYA)
        _one_alpha(reading)


def _not_plain(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys that are not down, up or alpha of a layer with all of its matrices."""
    found = grouped(tensors)
    plain = {name for name, own in found.items() if {"lora_down.weight", "lora_up.weight"} <= own.keys() <= KOHYA}
    return [key for name, own in found.items() if name not in plain for key in own.values()]


def _flat_names(model: NamedModel) -> Names:
    """kohya's names, and in a U-Net those after the path in diffusers."""
    names: dict[str, LayerPart] = {}
    for layer in model.layers():
        names[layer.kohya] = LayerPart(layer)
        if not layer.encoder:
            path = layer.parts[0].removeprefix("unet.").replace(".", "_")
            names[f"lora_unet_{path}"] = LayerPart(layer)
        elif layer.kohya.startswith(("lora_te_", "lora_te1_")):
            own = layer.kohya.partition("_text_model_")[2]
            names |= dict.fromkeys(
                (f"{prefix}_text_model_{own}" for prefix in ("lora_te", "lora_te1")), LayerPart(layer)
            )
    return names


def _one_alpha(reading: Reading) -> None:
    """Text encoders, and the attention of a U-Net, get the alpha that most layers of that model have."""
    models: dict[str, list[ReadLayer]] = {}
    for entries in reading.entries.values():
        for entry in entries:
            if ALPHA in entry.tensors and entry.tensors[ALPHA].numel() == 1:
                models.setdefault(entry.place.layer.parts[0].partition(".")[0], []).append(entry)
    for own in models.values():
        [(alpha, _)] = Counter(float(entry.tensors[ALPHA]) for entry in own).most_common(1)
        for entry in own:
            if entry.place.layer.encoder or ATTENTION.search(entry.place.layer.parts[0]):
                entry.tensors[ALPHA] = torch.tensor(alpha, dtype=torch.float64)


# ---- names of diffusers -------------------------------------------------------------------------------------------


def _of_peft(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    foreign = [key for key in tensors if "lora" not in key]
    if foreign:
        reading.refused = NOT_LORA.format(len(foreign), first_names(foreign))
    else:
        _take_parts(reading, tensors, model)


def _take_parts(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    """Layers under their names in diffusers. Only the CLIPs are loaded as text encoders."""
    names: dict[str, LayerPart] = {}
    for layer in model.layers():
        if layer.encoder and (".clip_" not in layer.comfy):
            continue
        names |= {part: LayerPart(layer, None if len(layer.parts) == 1 and not layer.swap else i)
                  for i, part in enumerate(layer.parts)}  # fmt: skip
    magnitudes = [key for key in tensors if key.startswith("text_encoder") and "lora_magnitude_vector" in key]
    reading.unread += magnitudes  # transformers, which loads them, has other names
    take(reading, {k: v for k, v in tensors.items() if k not in magnitudes}, names, ("LoRA",), (*PEFT, "alpha"))


# ---- FLUX.1 and Chroma --------------------------------------------------------------------------------------------


def _of_flux(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    if not any(".lora_down.weight" in key for key in tensors):
        if not any("lora" in key for key in tensors):
            reading.refused = NOT_LORA.format(len(tensors), first_names([*tensors]))
            return
        _take_parts(reading, tensors, model)
        return
    reading.refused = _flux_trouble(tensors, model)
    if reading.refused is None:
        names = {layer.kohya: LayerPart(layer) for layer in model.layers() if not layer.kohya.startswith(T5)}
        inside = {key: value for key, value in tensors.items() if not OUTSIDE.fullmatch(split_key(key)[0])}
        reading.unread += [key for key in tensors if key not in inside]
        take(reading, inside, names, ("LoRA",), KOHYA)


def _flux_trouble(tensors: Mapping[str, Tensor], model: NamedModel) -> str | None:
    """Why its converter ends with an error."""
    known = {layer.kohya for layer in model.layers()}
    strays: list[str] = []
    for name, own in grouped(tensors).items():
        if name.startswith("lora_unet_"):
            converted = OUTSIDE.fullmatch(name) or (name in known and _is_block(name))
            strays += [key for ending, key in own.items() if not converted or ending not in KOHYA]
    if strays:
        return f"{len(strays)} keys are unknown to it: {first_names(strays)}"
    for key, value in tensors.items():
        if key.endswith("_linear1.lora_up.weight") and len(value) != FLUX_LINEAR1:
            return f"it knows layers of {FLUX_LINEAR1} rows only, {key} has {len(value)}"
    return None


def _is_block(name: str) -> bool:
    """Whether it is of a block that FLUX.1 has."""
    found = INSIDE.fullmatch(name)
    return found is not None and int(found[2]) < FLUX_BLOCKS[found[1]]


# ---- FLUX.2 ---------------------------------------------------------------------------------------------------------


def _of_flux2(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    layers = [layer for layer in model.layers() if not layer.encoder]
    if any(".lora_down.weight" in key for key in tensors):
        names = {layer.kohya: LayerPart(layer) for layer in layers if FLUX2_KNOWN.fullmatch(layer.kohya)}
        take(reading, tensors, names, ("LoRA",), KOHYA)
    elif any(key.startswith("diffusion_model.") for key in tensors):
        names = {layer.comfy: LayerPart(layer) for layer in layers}
        kind, endings = ("LoKr", LOKR) if any(".lokr_" in key for key in tensors) else ("LoRA", PEFT[:2])
        strays = [key for key in tensors if split_key(key)[0] not in names or split_key(key)[1] not in endings]
        if strays:
            reading.refused = f"{len(strays)} keys are unknown to it: {first_names(strays)}"
        else:
            take(reading, tensors, names, (kind,), endings)
    elif any(".lokr_" in key for key in tensors):
        reading.refused = f"it finds no layers of these names: {first_names([*tensors])}"
    else:
        _of_peft(reading, tensors, model)


# ---- others ------------------------------------------------------------------------------------------------------


def _of_formats(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    """Converters that only rename. An alpha beside lora_A and lora_B is an error there."""
    formats = model.formats("diffusers")
    layers = [layer for layer in model.layers() if not layer.encoder]
    if "kohya" in formats and all(key.startswith("lora_unet_") for key in tensors):
        take(reading, tensors, {layer.kohya: LayerPart(layer) for layer in layers}, ("LoRA",), KOHYA)
    elif "comfy" in formats and any(key.startswith("diffusion_model.") for key in tensors):
        foreign = [key for key in tensors if not key.endswith(PEFT)]
        reading.refused = f"{len(foreign)} keys are unknown to it: {first_names(foreign)}" if foreign else None
        take(reading, tensors, {layer.comfy: LayerPart(layer) for layer in layers}, ("LoRA",), PEFT)
    else:
        _of_peft(reading, tensors, model)


def _of_lumina(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    if not any(key.startswith("diffusion_model.") for key in tensors):
        _of_peft(reading, tensors, model)
        return
    reading.refused = _lumina_trouble(tensors)
    if reading.refused is None:
        names = {layer.comfy: LayerPart(layer) for layer in model.layers() if not layer.encoder}
        take(reading, tensors, names, ("LoRA",), PEFT)


def _lumina_trouble(tensors: Mapping[str, Tensor]) -> str | None:
    """Its converter wants every layer of each block, and none outside of the blocks."""
    paths = {split_key(key)[0].removeprefix("diffusion_model.") for key in tensors}
    blocks = {match[0] for path in paths if (match := re.match(r"(layers|noise_refiner|context_refiner)\.\d+", path))}
    wanted = set()
    for block in blocks:
        own = ["attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
        own += [] if block.startswith("context") else ["adaLN_modulation.1"]
        wanted |= {f"{block}.{name}" for name in own}
    if paths != wanted:
        return f"it wants every layer of each block and no others: {first_names(sorted(paths ^ wanted))}"
    foreign = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign:
        return f"{len(foreign)} keys are unknown to it: {first_names(foreign)}"
    wrong = [key for key, value in tensors.items() if ".qkv.lora_B" in key and len(value) != LUMINA_QKV]
    return f"it knows a qkv of {LUMINA_QKV} rows only: {first_names(wrong)}" if wrong else None


def _of_anima(reading: Reading, tensors: Mapping[str, Tensor], model: NamedModel) -> None:
    """diffusers' names and ComfyUI's, also side by side. An alpha, which would have no effect, is refused."""
    foreign = [key for key in tensors if "lora" not in key]
    if foreign:
        reading.refused = NOT_LORA.format(len(foreign), first_names(foreign))
        return
    names = {name: LayerPart(layer) for layer in model.layers() if not layer.encoder
             for name in (layer.comfy, *layer.parts)}  # fmt: skip
    take(reading, tensors, names, ("LoRA",), PEFT)


CONVERTERS: Mapping[str, Callable[[Reading, Mapping[str, Tensor], NamedModel], None]] = {
    "sd1": _of_unet, "sd2": _of_unet, "sdxl": _of_unet, "flux": _of_flux, "chroma": _of_flux, "lumina": _of_lumina,
    "anima": _of_anima,
    "flux2": _of_flux2,
    "hunyuan_image": _take_parts,
}  # fmt: skip
DIFFUSERS = Program("diffusers", read_diffusers)
