# SPDX-License-Identifier: Apache-2.0
"""ComfyUI 0.3.64 and Forge (of lllyasviel): which key names they know, and what they do with the others.

Both map names to the weights of the model that is loaded. ComfyUI leaves unknown keys and logs them; Forge, with an
older copy of the same tables, refuses a file with more than twelve of them. FLUX.2 and Anima are newer than that
ComfyUI: their names are those of later versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from library.adapters.formats.architecture import LayerPart, PublishedLayer, flat
from library.adapters.readers.reading import SUFFIXES, NamedModel, Names, Program, Reading, take
from library.errors import first_names

FLUX = ("flux", "chroma", "flux2")
MOST_UNKNOWN = 12  # keys that Forge forgives
CLIP = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
# What ComfyUI's table from diffusers to FLUX has outside of the blocks; FLUX.2 embeds the time by other names
FLUX_OUTSIDE = ("final_layer.", "img_in", "time_in.", "txt_in", "vector_in.", "guidance_in.")
FLUX2_OUTSIDE = ("final_layer.", "img_in", "txt_in")
ENDINGS = frozenset(SUFFIXES) - {"lora_magnitude_vector", "lora_magnitude_vector.weight"}
# T5's number among the text encoders -> the kohya prefixes under which each program finds it
T5_COMFY = {"flux": ("lora_te2", "lora_te3"), "sd3": ("lora_te3",), "chroma": ("lora_te1",)}
T5_FORGE = ("lora_te3",)


def comfy_names(model: NamedModel) -> Names:
    names: dict[str, LayerPart] = {}
    for layer in model.layers():
        place = LayerPart(layer)
        names[layer.comfy] = place
        if layer.encoder:
            names |= dict.fromkeys(_encoder_names(layer, T5_COMFY.get(model.name, ())), place)
            names |= {layer.kohya: place} if layer.encoder.flat_in_comfy else {}
            continue
        names[layer.comfy_flat] = place
        names |= _unet_names(layer, "lycoris")
        if "peft" in model.formats("ComfyUI") and not layer.parts[0].startswith("unet."):
            names |= _part_names(layer, model)
    return names


def forge_names(model: NamedModel) -> Names:
    names: dict[str, LayerPart] = {}
    for layer in model.layers():
        place = LayerPart(layer)
        if layer.encoder:
            names |= dict.fromkeys(_encoder_names(layer, T5_FORGE), place)
            continue
        names |= {f"lora_unet_{flat(layer.published)}": place, layer.comfy: place} | _unet_names(layer)
        if model.name == "flux":
            parts = _part_names(layer, model)
            names |= {name: parts[name] for name in layer.parts if name in parts}
    return names


def _encoder_names(layer: PublishedLayer, t5: tuple[str, ...]) -> Iterator[str]:
    """The flat names, and those of diffusers, of an encoder's layer."""
    path = layer.published
    if layer.comfy.startswith("text_encoders.t5xxl."):
        yield from (f"{prefix}_{flat(path)}" for prefix in t5)
    elif ".clip_" in layer.comfy and (path.endswith(CLIP) or path == "text_projection"):
        second = ".clip_g." in layer.comfy
        yield from (f"{prefix}_{flat(path)}" for prefix in (("lora_te2",) if second else ("lora_te", "lora_te1")))
        yield f"{'text_encoder_2' if second else 'text_encoder'}.{path}"


def _unet_names(layer: PublishedLayer, *flat_prefixes: str) -> dict[str, LayerPart]:
    """The names of a U-Net's layer after its path in diffusers."""
    if not layer.parts[0].startswith("unet."):
        return {}
    path = layer.parts[0].removeprefix("unet.")
    dotted = path.replace(".to_", ".processor.to_")
    dotted = dotted[:-2] if dotted.endswith(".to_out.0") else dotted
    found = [dotted, f"unet.{dotted}", *(f"{prefix}_{flat(path)}" for prefix in ("lora_unet", *flat_prefixes))]
    return dict.fromkeys(found, LayerPart(layer))


def _part_names(layer: PublishedLayer, model: NamedModel) -> dict[str, LayerPart]:
    """The names of a transformer's layer in diffusers: each part is some rows of it."""
    outside = FLUX2_OUTSIDE if model.name == "flux2" else FLUX_OUTSIDE
    if model.name in FLUX and not ("_blocks." in layer.published or layer.published.startswith(outside)):
        return {}
    found: dict[str, LayerPart] = {}
    for i, name in enumerate(layer.parts):
        path = name.removeprefix("transformer.")
        names = [name, f"lycoris_{flat(path)}", f"lora_transformer_{flat(path)}"]
        names += [f"base_model.model.{path}"] if model.name == "sd3" else []
        found |= dict.fromkeys(names, LayerPart(layer, i))
    return found


def read_comfy(tensors: Mapping[str, Tensor], model: NamedModel) -> Reading:
    reading = Reading("comfy")
    kinds = ("LoRA", "LoHa", "LoKr", "GLoRA", "OFT", "BOFT", "norm", "full")
    take(reading, tensors, comfy_names(model), kinds, ENDINGS)
    return reading


def read_forge(tensors: Mapping[str, Tensor], model: NamedModel) -> Reading:
    reading = Reading("forge")
    take(reading, tensors, forge_names(model), ("LoRA", "LoHa", "LoKr", "norm", "full"), ENDINGS)
    count = len(reading.unread)
    if count > MOST_UNKNOWN:
        reading.refused = f"{count} of {len(tensors)} keys are unknown to it, {MOST_UNKNOWN} are forgiven: "
        reading.refused += first_names(reading.unread)
    return reading


COMFY = Program("ComfyUI", read_comfy)
FORGE = Program("Forge", read_forge)
