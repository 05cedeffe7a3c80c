# SPDX-License-Identifier: Apache-2.0
"""The difference of two checkpoints as a LoRA: which layers get one, and the nearest matrices of a rank."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.lora_math import as_tensors, clamped, has_kernel, spectrum
from library.adapters.surgery.tool_files import (
    KnownArchitectures,
    WeightFile,
    device_named,
    dtype_named,
    open_checkpoint,
    save_lora,
    spec_of,
)
from library.adapters.surgery.tool_options import PairOptions, SaveOptions
from library.errors import UserError
from library.log import get_logger, progress
from library.weights.grown_input import is_grown, padded

TEXT = re.compile(r"lora_te[12]?_.*_(self_attn_[kvq]_proj|self_attn_o(ut)?_proj|mlp_(fc\d|\w+_proj))")  # no T5


@dataclass(frozen=True)
class Extraction:
    """The options of an extraction."""

    models: PairOptions
    save: SaveOptions
    device: str | None
    conv_dim: int | None = None
    clamp_quantile: float = 0.99
    min_diff: float = 0.0
    load_precision: str | None = None
    v_prediction: bool = False
    architectures: tuple[str, ...] | None = None  # names of those that the script or its options are for; None: all


def extract(asked: Extraction, known: KnownArchitectures) -> None:
    """Read both files layer by layer, decompose the differences, write the LoRA. Raises UserError."""
    device = device_named(asked.device)
    original_path, tuned_path = asked.models.model_org, asked.models.model_tuned
    assert original_path and tuned_path
    original, layers = open_checkpoint("--model_org", original_path, known)
    tuned, tuned_layers = open_checkpoint("--model_tuned", tuned_path, known)
    if tuned_layers.architecture is not layers.architecture:
        first, second = layers.architecture.title, tuned_layers.architecture.title
        raise UserError(f"--model_org is {first} and --model_tuned is {second}: they must be of one architecture")
    if asked.architectures is not None and layers.architecture.name not in asked.architectures:
        wanted = " or ".join(table.title for table in known.tables if table.name in asked.architectures)
        raise UserError(f"--model_org {original_path} is {layers.architecture.title}, {wanted} was asked for")
    has_conv = asked.conv_dim is not None
    names = chosen_layers(layers, conv=has_conv)
    _require_same_shapes(names, layers, tuned_layers, f"--model_tuned {tuned_path}")
    others = chosen_layers(tuned_layers, conv=has_conv)
    _require_same_shapes(others, tuned_layers, layers, f"--model_org {original_path}")
    files = CheckpointPair(original, tuned, layers, tuned_layers, dtype_named(asked.load_precision), device)
    names = files.without_same_encoders(names, asked.min_diff)
    found: dict[str, dict[str, Tensor]] = {}
    with progress(len(names), "layers") as bar:
        for name in names:
            found[name] = _nearest(files.difference(name), asked)
            bar.advance()
    found |= files.new_inputs()
    task = {"ss_task": "edit"} if any("diff" in own for own in found.values()) else {}
    save_lora(asked.save, found, {**_metadata(asked, layers), **task})


def chosen_layers(layers: CheckpointLayers, *, conv: bool) -> list[str]:
    """The layers that get a LoRA, as in a new network of the architecture. conv: include those of residual blocks."""
    architecture = layers.architecture
    patterns = [TEXT, architecture.new_layers]
    if conv and architecture.conv_layers is not None:
        patterns.append(architecture.conv_layers)
    return [
        name
        for name in layers.places
        if len(layers.shape(name)) > 1 and any(pattern.fullmatch(name) for pattern in patterns)
    ]


def _require_same_shapes(names: Sequence[str], layers: CheckpointLayers, tuned: CheckpointLayers, file: str) -> None:
    """Raise UserError when `tuned`, the layers of `file`, lacks some. It may lack a text encoder as a whole."""
    there = {"unet", *(name.split("_")[1] for name in names if name in tuned.places)}
    missing = [name for name in names if name not in tuned.places and name.split("_")[1] in there]
    other = [name for name in names if name in tuned.places and tuned.shape(name) != layers.shape(name)]
    for wrong, what in ((missing, "lacks"), (other, "has another shape of")):
        if wrong:
            raise UserError(f"{file} {what} {wrong[0]} ({len(wrong)} layers): it is another model, or incomplete")


@dataclass(frozen=True)
class CheckpointPair:
    """The original and the tuned checkpoint."""

    original: WeightFile
    tuned: WeightFile
    layers: CheckpointLayers
    tuned_layers: CheckpointLayers
    dtype: torch.dtype | None  # that the weights are rounded to first
    device: torch.device

    def difference(self, name: str) -> Tensor:
        """W of the tuned model minus W of the original, float32. Raises UserError when it is not finite."""
        first = self.layers.weight(self.original, name, self.dtype).to(self.device, torch.float32)
        change = self.tuned_layers.weight(self.tuned, name, self.dtype).to(self.device, torch.float32) - first
        if not torch.isfinite(change).all():
            raise UserError(f"{name}: the weights of one of the models are not finite")
        return change

    def new_inputs(self) -> dict[str, dict[str, Tensor]]:
        """The whole change of a first convolution that reads reference pictures in the tuned model alone."""
        found = {}
        for name in self.layers.places.keys() & self.tuned_layers.places.keys():
            shape = self.tuned_layers.shape(name)
            if is_grown(self.layers.shape(name), shape):
                old = padded(self.layers.weight(self.original, name, self.dtype).float(), shape[1])
                found[name] = {"diff": self.tuned_layers.weight(self.tuned, name, self.dtype).float() - old}
        return found

    def without_same_encoders(self, names: Sequence[str], min_diff: float) -> list[str]:
        """The layers without those of text encoders that one file lacks, or that differ by no more than `min_diff`."""
        encoders: dict[str, list[str]] = {}
        for name in names:
            if not name.startswith("lora_unet_"):
                encoders.setdefault(name.split("_")[1], []).append(name)
        left: set[str] = set()
        for encoder, own in encoders.items():
            if any(name not in self.tuned_layers.places for name in own):
                get_logger().warning("text encoder (%s): only one of the models has it; it gets no LoRA", encoder)
                left.update(own)
            elif all(float(self.difference(name).abs().max()) <= min_diff for name in own):
                get_logger().info("text encoder (%s): no difference above %g; it gets no LoRA", encoder, min_diff)
                left.update(own)
        return [name for name in names if name not in left]


def _nearest(difference: Tensor, asked: Extraction) -> dict[str, Tensor]:
    """The LoRA of the wanted rank that is nearest to a difference."""
    shape = tuple(difference.shape)
    wanted = asked.conv_dim if has_kernel(shape) and asked.conv_dim is not None else asked.models.dim
    rank = min(wanted, shape[0], shape[1])
    up, down = clamped(*spectrum(difference.flatten(1)).cut(rank), asked.clamp_quantile)
    return as_tensors(up, down, shape, rank)


def _metadata(asked: Extraction, layers: CheckpointLayers) -> dict[str, str]:
    facts = layers.architecture.facts(layers.shapes.keys(), asked.v_prediction)
    arguments = {} if asked.conv_dim is None else {"conv_dim": asked.conv_dim, "conv_alpha": float(asked.conv_dim)}
    metadata = {
        "ss_v2": str(facts.version.startswith("sd_v2")),
        "ss_base_model_version": facts.version,
        "ss_network_module": facts.network,
        "ss_network_dim": str(asked.models.dim),
        "ss_network_alpha": str(float(asked.models.dim)),
        "ss_network_args": json.dumps({name: str(value) for name, value in arguments.items()}),
    }
    if asked.save.no_metadata:
        return metadata
    assert asked.save.save_to is not None
    return metadata | spec_of(facts, asked.save.save_to, lora=True)
