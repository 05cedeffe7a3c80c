# SPDX-License-Identifier: Apache-2.0
"""Files of the LoRA tools: adapters, checkpoints tensor by tensor, and their metadata."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.adapters.file_readers import OFT
from library.adapters.formats.architecture import Architecture, FileFacts, Tables
from library.adapters.formats.conversion import architecture_of, by_module, read_adapter, read_metadata
from library.adapters.formats.layer_tensors import DOWN, Tensors
from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.lora_math import has_kernel
from library.adapters.surgery.tool_options import PRECISIONS, SaveOptions
from library.errors import StopTraining, UserError, retold
from library.io.atomic import atomic_write
from library.io.checkpoint import save_tensors
from library.io.metadata import VERSION, SpecFacts, base_name, modelspec
from library.io.options import MetadataOptions
from library.io.tensor_file import check_safetensors, data_bytes, data_chunks, header_bytes, ordered_names
from library.key_tables import Shapes
from library.weights.weight_files import SafetensorsFile, ScaledFile, WeightFile, open_weights

LORA_KEYS = ("ss_v2", "ss_base_model_version", "ss_task")  # that a merged LoRA takes over from the files it is made of
ADVICE = "convert it with convert_lora.py --base_model first"  # where names of layers do not tell the architecture


def dtype_named(precision: str | None) -> torch.dtype | None:
    """The dtype of --save_precision."""
    return None if precision is None else getattr(torch, PRECISIONS[precision])


def device_named(name: str | None) -> torch.device:
    """The --device. Raises UserError when it does not work."""
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: not possible here ({reason})") from None
    return device


@dataclass(frozen=True)
class KnownArchitectures:
    """The model families, as far as the tools need them.

    of_checkpoint: by the names and shapes of a file's tensors; None for an architecture without a table.
    describe: what such a file is, e.g. "a VAE, not a checkpoint"; None for names that are not known at all.
    """

    tables: Tables
    of_checkpoint: Callable[[Shapes], Architecture | None]
    describe: Callable[[Shapes], str | None]


# ---- adapter files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFile:
    """An adapter file in kohya's names."""

    path: str
    layers: dict[str, dict[str, Tensor]]  # kohya name -> suffix -> tensor
    metadata: dict[str, str]

    def architecture(self, tables: Tables) -> Architecture:
        """The architecture that it is for. Raises UserError when none has these layers."""
        names = {name: f"lora_{name.removeprefix(OFT)}" if name.startswith(OFT) else name for name in self.layers}
        tensors = {f"{names[n]}.{suffix}": value for n, own in self.layers.items() for suffix, value in own.items()}
        with retold(lambda line: f"{self.path}: {line}"):
            return architecture_of(tensors, tables)


def read_lora(path: str, tables: Tables, architecture: Architecture | None = None) -> LoraFile:
    """An adapter file of any of the three formats. Raises UserError naming it, also when it is damaged.

    architecture: of the model at hand, into which parts of a layer can be merged each on its own.
    """
    among = None if architecture is None else (architecture,)
    with retold(lambda line: line if path in line else f"{path}: {line}"):
        tensors = read_adapter(path, tables, among, advice=ADVICE, apart=architecture is not None)
    return LoraFile(path, by_module(tensors), read_metadata(path))


def common_architecture(files: Sequence[LoraFile], tables: Tables) -> Architecture:
    """The architecture that all files are for. Raises UserError when there are several."""
    found = {file.path: file.architecture(tables) for file in files}
    if len(set(found.values())) > 1:
        which = ", ".join(f"{path} is for {architecture.title}" for path, architecture in found.items())
        raise UserError(f"--models are for different architectures: {which}")
    return next(iter(found.values()))


def save_lora(save: SaveOptions, layers: Mapping[str, Tensors], metadata: Mapping[str, str]) -> None:
    """Write a LoRA, weights and alphas in the wanted precision. Raises UserError when a number is too large for it."""
    assert save.save_to is not None
    tensors = {f"{name}.{suffix}": value for name, own in layers.items() for suffix, value in own.items()}
    Path(save.save_to).parent.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(save.save_to, tensors, metadata, dtype=dtype_named(save.save_precision) or torch.float32)
    except StopTraining as error:
        raise UserError(f"{error}; give another --save_precision") from None


# ---- checkpoints --------------------------------------------------------------------------------------------------


def open_checkpoint(name: str, path: str, known: KnownArchitectures) -> tuple[WeightFile, CheckpointLayers]:
    """A checkpoint in published names, and where its layers are. `name`: the option. Raises UserError."""
    file = open_weights(Path(path))
    architecture = known.of_checkpoint(file.shapes)
    if architecture is None:
        titles = ", ".join(table.title for table in known.tables)
        what = known.describe(file.shapes) or "a checkpoint of another architecture"
        raise UserError(f"{name} {path} is {what.partition(':')[0]}; the tools know {titles}")
    layers = CheckpointLayers(architecture, file.shapes)
    if not any(name.startswith("lora_unet_") for name in layers.places):
        if all(layer.ours == (layer.published,) for layer in architecture.denoiser(1)):
            raise UserError(f"{name} {path} has not the names of diffusers: give the denoiser's file of its folder")
        raise UserError(f"{name} {path} has the names of diffusers: give the single file in published names")
    return file, layers


def open_encoder(path: str, encoder: str, architecture: Architecture) -> tuple[WeightFile, CheckpointLayers]:
    """The file of one text encoder ("clip_l", "t5xxl" ...) of an architecture. Raises UserError."""
    file = open_weights(Path(path))
    layers = CheckpointLayers(architecture, file.shapes, encoder=encoder)
    if not layers.places:
        raise UserError(f"--{encoder} {path} has no layers of that text encoder in {architecture.title}")
    return file, layers


def write_checkpoint(
    path: str,
    file: WeightFile,
    tensor: Callable[[str], Tensor],
    changed: Iterable[str],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    *,
    grown: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Write all tensors of `file`, as `tensor` returns them, one at a time, in `dtype` or in that of the file.

    grown: names of tensors that have other shapes than in the file -> these shapes.
    Without a dtype, fp8 weights with scales beside them become bfloat16.
    Raises UserError when a weight is not finite.
    """
    changed = set(changed)
    layout = {name: _empty_like(file, name, dtype) for name in file.shapes}
    layout |= {name: layout[name].new_empty(shape) for name, shape in (grown or {}).items()}

    def ready(name: str) -> Tensor:
        value = tensor(name).to(layout[name].dtype).contiguous()
        if name in changed and not torch.isfinite(value.float()).all():
            raise UserError(
                f"{path} is not written: {name} is not finite in {str(value.dtype).removeprefix('torch.')}; "
                "give another --save_precision or smaller --ratios"
            )
        return value

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix != ".safetensors":
        save_tensors(target, {name: ready(name) for name in layout}, {}, hashes=False)
        return
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as out:
            out.write(header_bytes(layout, metadata))
            for name in ordered_names(layout):
                for chunk in data_chunks({name: ready(name)}):
                    out.write(chunk)
                    digest.update(chunk)

    check = lambda temporary: check_safetensors(temporary, digest.hexdigest())
    atomic_write(target, write, check, size=data_bytes(layout))


def _empty_like(file: WeightFile, name: str, dtype: torch.dtype | None) -> Tensor:
    """A meta tensor with the shape and dtype that are written."""
    stored = file.tensor(name).dtype
    if isinstance(file, ScaledFile) and stored == torch.float32 and len(file.shapes[name]) > 1:
        stored = torch.bfloat16
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    return torch.empty(file.shapes[name], dtype=wanted, device="meta")


# ---- what a file says of itself -----------------------------------------------------------------------------------


def spec_of(facts: FileFacts, save_to: str, *, lora: bool, merged_from: str | None = None) -> dict[str, str]:
    """The modelspec.* entries of a new file."""
    spec = SpecFacts(
        architecture=facts.architecture + ("/lora" if lora else ""),
        implementation=facts.implementation if lora else facts.published,
        prediction_type=facts.prediction,
        resolution=(facts.size, facts.size),
        version=VERSION,
    )
    given = MetadataOptions(metadata_title=Path(save_to).stem, metadata_merged_from=merged_from)
    return modelspec({}, spec, given, now=time.time())


def titles(files: Iterable[tuple[str, Mapping[str, str]]]) -> str:
    """modelspec.merged_from: the titles of the files, or their base names."""
    found = (meta.get("modelspec.title") or re.sub(r"\.\w+$", "", base_name(path)) for path, meta in files)
    return ", ".join(found)


def checkpoint_metadata(file: WeightFile) -> dict[str, str]:
    """The header entries of a checkpoint."""
    return dict(file.metadata) if isinstance(file, SafetensorsFile) else {}


def merged_metadata(
    files: Sequence[LoraFile], layers: Mapping[str, Tensors], save: SaveOptions, tables: Tables, *, arguments: str = ""
) -> dict[str, str]:
    """Header of a merged LoRA: the minimum that readers need, and modelspec.* with merged_from."""
    facts = common_architecture(files, tables).facts((), False)
    found = {"ss_v2": str(facts.version.startswith("sd_v2")), "ss_base_model_version": facts.version}
    for file in reversed(files):  # the first one that says so
        found |= {key: file.metadata[key] for key in LORA_KEYS if key in file.metadata}
    modules = [file.metadata["ss_network_module"] for file in files if "ss_network_module" in file.metadata]
    found["ss_network_module"] = modules[0] if modules else facts.network
    found |= dims_in(layers)
    if arguments:
        found["ss_network_args"] = arguments
    if save.no_metadata:
        return found
    assert save.save_to is not None
    spec = spec_of(facts, save.save_to, lora=True, merged_from=titles((file.path, file.metadata) for file in files))
    kept = ("modelspec.architecture", "modelspec.prediction_type", "modelspec.resolution")
    told = {key: files[0].metadata[key] for key in kept if key in files[0].metadata}
    return {**found, **spec, **told}


def dims_in(layers: Mapping[str, Tensors]) -> dict[str, str]:
    """ss_network_dim and ss_network_alpha: the one value of all layers, or "Dynamic".

    Convolutions with a kernel count only where there is nothing else: their ranks have entries of their own.
    """
    loras = [own for own in layers.values() if DOWN in own]
    main = [own for own in loras if not has_kernel(own[DOWN].shape)] or loras
    dims = {len(own[DOWN]) for own in main}
    alphas = {float(own["alpha"]) for own in main if "alpha" in own}
    return {
        "ss_network_dim": str(dims.pop()) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
