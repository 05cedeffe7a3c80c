# SPDX-License-Identifier: Apache-2.0
"""What PEFT says of an adapter beside its tensors: in adapter_config.json, or in the header of a file of diffusers.

PEFT's tensors have no alpha. The scale is lora_alpha / r, with rsLoRA lora_alpha / sqrt(r), and both may be other
numbers for some layers (alpha_pattern, rank_pattern). Without the configuration the scale is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.adapters.formats.architecture import PEFT_WRAPPER, unwrapped
from library.adapters.formats.layer_tensors import DOWN
from library.adapters.formats.peft_folder import CONFIG
from library.adapters.formats.recognition import parse
from library.errors import UserError
from library.log import get_logger
from library.text_files import parse_json

PEFT_METADATA = "lora_adapter_metadata"  # header entry of diffusers: ranks and alphas of its LoraConfig
ALPHAS = "lora_alphas"  # header entry of ours
# Fields that change what the tensors mean in a way that no other format can say
REFUSED = (
    "fan_in_fan_out", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip
# First values that PEFT takes out of the base model: the tensors belong to what is left of it
OF_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "eva_residual", "lora_ga")


def with_alphas(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], file: Path, config_file: Path
) -> dict[str, Tensor]:
    """The tensors, with an alpha for each layer whose scale the header or adapter_config.json tells."""
    if PEFT_METADATA in metadata:
        where = f"{file}: the header entry {PEFT_METADATA}"
        return _with_alphas(tensors, _object(metadata[PEFT_METADATA], where), where, of_parts=True)
    wrapped = any(PEFT_WRAPPER in key for key in tensors)
    if not wrapped or ALPHAS in metadata:
        return tensors
    if config_file.is_file():
        try:
            text = config_file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{config_file} cannot be read ({error})") from None
        config = _object(text, str(config_file))
        _refuse(config, config_file)
        return _with_alphas(tensors, config, str(config_file), of_parts=False)
    if not any(key.endswith(".alpha") for key in tensors):
        get_logger().warning(
            "%s: the scale of this adapter is unknown, it is in PEFT's %s, which is not beside it: taken as 1",
            file, CONFIG,
        )  # fmt: skip
    return tensors


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not understood ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is not understood (it is not an object)")
    return found


def _refuse(config: Mapping[str, Any], where: Path) -> None:
    """Raises UserError for what PEFT has and adapter files of other programs have not."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {kind} is not read, only LORA")
    given = [name for name in REFUSED if config.get(name)]
    if config.get("bias", "none") != "none":
        given.append("bias")
    if given:
        raise UserError(f"{where}: {', '.join(given)} has no meaning here; only LoRA matrices, DoRA and lora_bias have")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(OF_CHANGED_BASE):
        raise UserError(
            f"{where}: init_lora_weights {start} changes the base model; save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _with_alphas(
    tensors: dict[str, Tensor], config: Mapping[str, Any], where: str, *, of_parts: bool
) -> dict[str, Tensor]:
    """of_parts: the entries have the name of a model before them, `transformer.lora_alpha`."""
    found = dict(tensors)
    try:
        for key, value in tensors.items():
            layer, suffix = parse(key) or (key, "")
            own = unwrapped(layer)
            start = f"{own.partition('.')[0]}." if of_parts else ""
            if suffix != DOWN or f"{start}lora_alpha" not in config or f"{layer}.alpha" in tensors:
                continue
            own = own.removeprefix(start)
            rank = len(value)
            told = _of_layer(
                own, config.get("rank_pattern"), config.get("r", rank)
            )  # of a header only the alphas are used
            if int(told) != rank:
                raise UserError(f"{where} is of another adapter: rank {told} for {own}, which has {rank} in the file")
            alpha = float(_of_layer(own, config.get(f"{start}alpha_pattern"), config[f"{start}lora_alpha"]))
            # rsLoRA divides by sqrt(rank), every other reader by rank
            found[f"{layer}.alpha"] = torch.tensor(alpha * rank**0.5 if config.get(f"{start}use_rslora") else alpha)
    except (ValueError, TypeError, AttributeError, OverflowError, re.error) as error:
        raise UserError(f"{where} is not understood ({error})") from None
    return found


def _of_layer(name: str, patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
    """The number of the first pattern that fits the end of a layer's name, as PEFT finds it."""
    return next((n for p, n in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name)), otherwise)
