# SPDX-License-Identifier: Apache-2.0
"""Adapter files: reading, writing, and the two ways to name a Stable Diffusion LoRA's tensors.

kohya:  lora_unet_mid_block_attentions_0_proj_in.lora_down.weight            (underscores; alpha beside it)
peft:   unet.mid_block.attentions.0.proj_in.lora_A.weight                     (diffusers; the scale is inside lora_B)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from library.errors import UserError, first_names
from networks.spec import TargetSpec
from networks.targets import DENOISER_PREFIX, ENCODER_PREFIX, published_encoder_path

TORCH_SUFFIXES = (".pt", ".ckpt", ".pth", ".bin")
PEFT_PREFIXES = {"unet.": DENOISER_PREFIX, "text_encoder.": ENCODER_PREFIX}
# endings in files of diffusers (new, old) and PEFT -> ours
PEFT_ENDINGS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector.default.weight": "dora_scale",
    "alpha": "alpha",
}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter file. Raises UserError when it is missing, damaged or holds something else."""
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
    return found


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


def is_peft(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(tuple(PEFT_PREFIXES)) for key in tensors)


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft keys as kohya keys; tensors that have kohya keys already are returned as they are.

    Raises UserError with the number of keys that are neither.
    """
    if not is_peft(tensors):
        return dict(tensors)
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        name = _kohya_key(key)
        if name is None:
            unknown.append(key)
        else:
            found[name] = value
    if unknown:
        raise UserError(f"{len(unknown)} keys of the adapter file are not understood: {first_names(unknown)}")
    for key, value in found.items():
        if key.endswith(".dora_scale") and value.dim() == 1:
            down = found.get(key.replace("dora_scale", "lora_down.weight"))
            found[key] = value.reshape(-1, *[1] * (1 if down is None else down.dim() - 1))
        elif key.endswith(".dora_scale") and value.dim() == 4:
            found[key] = value.transpose(0, 1)  # peft: (1, out, 1, 1)
    return found


def _kohya_key(key: str) -> str | None:
    prefix = next((p for p in PEFT_PREFIXES if key.startswith(p)), None)
    ending = next((e for e in PEFT_ENDINGS if key.endswith("." + e)), None)
    if prefix is None or ending is None:
        return None
    path = key[len(prefix) : -len(ending) - 1]
    if prefix == "text_encoder.":
        path = published_encoder_path(path)
    return f"{PEFT_PREFIXES[prefix]}_{path.replace('.', '_')}.{PEFT_ENDINGS[ending]}"


def to_peft(tensors: Mapping[str, Tensor], targets: Iterable[TargetSpec]) -> dict[str, Tensor]:
    """Plain and DoRA tensors with kohya keys as peft keys. `targets` know the dotted paths.

    alpha / rank goes into lora_B, so that every reader arrives at the trained weight. Raises UserError for
    layers that peft has no name for (Tucker form, norms) and for names that are no target.
    """
    prefixes = {"denoiser": "unet", "text_encoder": "text_encoder"}
    paths = {target.name: f"{prefixes[target.part]}.{target.modules[0].path}" for target in targets}
    found: dict[str, Tensor] = {}
    foreign: list[str] = []
    for name, own in by_module(tensors).items():
        if name not in paths or not {"alpha", "lora_down.weight", "lora_up.weight", "dora_scale"} >= set(own):
            foreign.append(name)
            continue
        down, up = own["lora_down.weight"], own["lora_up.weight"]
        scale = float(own["alpha"]) / len(down) if "alpha" in own else 1.0
        found[f"{paths[name]}.lora_A.weight"] = down
        found[f"{paths[name]}.lora_B.weight"] = (up.float() * scale).to(up.dtype)
        if "dora_scale" in own:
            magnitude = own["dora_scale"]  # (out, 1) here; peft has (out,) for Linear, (1, out, 1, 1) for convolutions
            found[f"{paths[name]}.lora_magnitude_vector"] = (
                magnitude.flatten() if down.dim() == 2 else magnitude.transpose(0, 1)
            )
    if foreign:
        raise UserError(f"{len(foreign)} adapters have no name in the peft format: {first_names(foreign)}")
    return found
