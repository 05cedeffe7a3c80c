# SPDX-License-Identifier: Apache-2.0
"""Loading of modules from a path or hub id: find the files, build an empty module, put the file's tensors into it.

The module is built without memory for its parameters, and the tensors of the file become its parameters. Nothing is
copied unless another dtype or device is asked for, so peak memory stays near the size of the loaded module.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.device import free_memory
from library.errors import UserError, first_names, nearest
from library.key_tables import Rule, Shapes, file_shapes, read
from library.memory.precision import cast_when_used, castable_weights
from library.memory.quantise import Storage, quantise
from library.text_files import parse_json
from library.weights.fingerprints import weights_fingerprint
from library.weights.quantised_loading import Quantiser
from library.weights.weight_files import WEIGHT_SUFFIXES, WeightFile, open_weights

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "models"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BASE_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".bf16", ".fp16")  # full weights first
PIPELINE_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*.json")
SKIPPED_FILES = ("safety_checker/*", "feature_extractor/*", "*non_ema*", "*openvino*", "*flax*", "*.onnx*")


@dataclass(frozen=True)
class Part:
    """One module of a model: how to build it, and where its weights are."""

    what: str  # for messages: "U-Net"
    file: WeightFile
    prefix: str  # of its names in the file
    build: Callable[[], nn.Module]  # a `functools.partial` with its configuration; so is `rules` if it has arguments
    rules: Callable[[nn.Module], tuple[Rule, ...]]
    settings: str = ""  # other things that its outputs depend on: part of the fingerprint
    finish: Callable[[nn.Module], None] | None = None  # called with the module once its weights are loaded
    spare: str = ""  # beginning of names below the prefix that belong to it and are not used
    extras: tuple[str, ...] = ()  # further tensors of published files: regular expressions on whole names
    # width of a published model -> its numbers of blocks, by their keys in the configuration
    published_depths: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def blank(self) -> nn.Module:
        """The module from `build`, its parameters on the meta device."""
        return build_empty(self.build)

    def expected(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Names of the weights in the file -> the shapes that each may have there. Cached."""
        found = _expected(_Maker((_key(self.build), _key(self.rules)), self.build, self.rules))
        return {self.prefix + name: shapes for name, shapes in found.items()}

    def load(self, dtype: torch.dtype | None, device: torch.device | str, *, storage: Storage = "plain") -> nn.Module:
        """The module with its weights, frozen, in evaluation mode. dtype None: that of the file, bfloat16 for fp8.

        storage: how matrices are kept. "half": those stored in half precision or fp8 stay so and are cast when they are
        used, for a module that computes in `dtype` only (see library.memory.precision). "fp8", "int8", "nf4": those of
        the repeated blocks are quantised one at a time while they are read (library.memory.quantise); with "fp8",
        weights stored in fp8 are kept. Raises UserError if weights are missing or have another shape.
        """
        if dtype is None and self.file.is_float8:
            dtype = torch.bfloat16
        module = self.blank()
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        tensors, wrong = self._read(module, shapes, dtype, device, storage)
        self.file.release()  # the module alone holds its weights: they go when it goes
        if wrong:
            raise UserError(
                f"{self.file.path}: {len(wrong)} weights of the {self.what} are missing or have another shape "
                f"({first_names(wrong)}); the file is incomplete or of another architecture"
            )
        module.load_state_dict(tensors, strict=False, assign=True)  # not strict: one parameter may have two names
        assert not any(parameter.is_meta for parameter in module.parameters()), f"a rule of the {self.what} is missing"
        if self.finish is not None:
            self.finish(module)
        if storage == "half" and dtype == torch.float32:
            cast_when_used(module)
        if storage not in ("plain", "half"):
            free_memory()  # of the weights before quantisation
        return module.to(device).eval().requires_grad_(False)  # `to` moves the buffers that no file holds

    def empty(self, dtype: torch.dtype | None = None, storage: Storage = "plain") -> nn.Module:
        """The module that `load` returns, but with weights on the meta device. Reads the header only."""
        if dtype is None and self.file.is_float8:
            dtype = torch.bfloat16
        module = self.blank()
        castable = castable_weights(module) if storage == "half" and dtype == torch.float32 else set()
        in_file = {own: self.prefix + rule.published for rule in self.rules(module) for own in rule.ours}

        def blank(name: str, like: Tensor) -> Tensor:
            own = None if name in castable else dtype
            if own is None and in_file.get(name) in self.file.shapes:
                own = kept_dtype(self.file.dtype(in_file[name]))
            return torch.empty_like(like, dtype=own if like.is_floating_point() else None, device="meta")

        tensors = {name: blank(name, tensor) for name, tensor in module.state_dict().items()}
        module.load_state_dict(tensors, strict=False, assign=True)
        if self.finish is not None:
            self.finish(module)
        if storage == "half":
            if dtype == torch.float32:
                cast_when_used(module)
        elif storage != "plain":
            quantise(module, storage)
        return module.eval().requires_grad_(False)

    def _read(
        self, module: nn.Module, shapes: Shapes, dtype: torch.dtype | None, device: torch.device | str, storage: Storage
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The module's tensors by name, and the names that are missing. Puts quantised Linears into the module."""
        file = self.file
        rules: Sequence[Rule] = self.rules(module)
        tensors: dict[str, Tensor] = {}
        as_is: set[str] = set()  # our names of weights that are read in the file's dtype
        keep: Callable[[str, Tensor], dict[str, Tensor]] = lambda own, tensor: {own: tensor}
        if storage == "half":
            as_is = castable_weights(module) if dtype == torch.float32 else set()
        elif storage != "plain":
            quantiser = Quantiser(module, storage, dtype)
            tensors, rules = quantiser.take_stored(file, rules, shapes, self.prefix, device)
            as_is, keep = quantiser.weights, quantiser.keep
        kept = {self.prefix + rule.published for rule in rules if as_is.issuperset(rule.ours)}
        moved = {self.prefix + rule.published for rule in rules if rule.op.moves}

        def get(name: str) -> Tensor:
            stored = file.dtype(name)
            stays = name in kept and stored == kept_dtype(stored)
            wanted = None if stays else dtype or kept_dtype(stored)
            return (file.copy if name in moved else file.tensor)(name, wanted, device)

        others, wrong = read(get, file.shapes, rules, shapes, self.prefix, keep)
        return tensors | others, wrong

    def fingerprint(self) -> str:
        """Hash of settings and of names, shapes and bytes of this part's weights: equal only if all of them are."""
        return weights_fingerprint(self.file, self.prefix, self.settings)


def kept_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype of loaded weights if none is asked for: that of the file, but float32 for float64."""
    return torch.float32 if stored == torch.float64 else stored


@dataclass(frozen=True)
class _Maker:
    """How an empty module and its names in files are made. Equal makers give equal results."""

    key: tuple[Any, ...]
    build: Callable[[], nn.Module] = field(compare=False)
    rules: Callable[[nn.Module], tuple[Rule, ...]] = field(compare=False)


def _key(function: Callable[..., Any]) -> Any:
    if not isinstance(function, functools.partial):
        return function
    return function.func, json.dumps([function.args, function.keywords], sort_keys=True, default=str)


@functools.lru_cache(maxsize=64)
def _expected(maker: _Maker) -> dict[str, tuple[tuple[int, ...], ...]]:
    module = build_empty(maker.build)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return {rule.published: file_shapes(rule, shapes) for rule in maker.rules(module)}


def build_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """The module from `build`, with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return build()


# ---- where things are -----------------------------------------------------------------------------------------------


def locate(name: str, option: str, patterns: Sequence[str]) -> Path:
    """The local file or folder for a path or hub id. A hub id is only tried if no such path exists.

    patterns: files that are needed of a hub repository. Raises UserError if there is nothing of that name.
    """
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, it leaves an unknown "~user" as it is
    if path.exists():
        return path
    if HUB_ID.fullmatch(name) and path.suffix not in WEIGHT_SUFFIXES:
        return download(name, option, patterns)
    raise UserError(f"{option}: {name} does not exist{_similar(path)}")


def _similar(path: Path) -> str:
    """A hint at a file with a similar name in the same folder."""
    if not path.parent.is_dir():
        return f" (nor does the folder {path.parent})"
    hint = nearest(path.name, (p.name for p in path.parent.iterdir()))
    return f". Did you mean {path.parent / hint}?" if hint else ""


def download(repository: str, option: str, patterns: Sequence[str]) -> Path:
    """Folder with the needed files of a hub repository, from the local hub cache or else over the network.

    patterns: names of .safetensors files. If a repository has none of them, its variants in half precision or its .bin
    files are used.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    pickles = [pattern.replace(".safetensors", ".bin") for pattern in patterns]
    full = [*SKIPPED_FILES, "*.fp16.*", "*.bf16[.-]*"]
    attempts = ((patterns, full), (patterns, SKIPPED_FILES), (pickles, SKIPPED_FILES))
    try:
        for allowed, ignored in attempts:
            folder = Path(snapshot_download(repository, allow_patterns=list(allowed), ignore_patterns=list(ignored)))
            if any(path.suffix in WEIGHT_SUFFIXES for path in folder.rglob("*")):
                return folder
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise UserError(
            f"{option}: {repository} does not exist here, is not in the hub's cache, and the hub cannot be reached; "
            "give the path of a file or folder"
        ) from None
    except Exception as error:  # of the hub, the network or the disk: the classes differ from version to version
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option}: the hub does not give {repository}: {problem}") from None
    raise UserError(f"{option}: {repository} on the hub has no weights of a diffusers model")


def part_file(folder: Path) -> WeightFile:
    """The weights in a diffusers or transformers folder: safetensors before pickles, one file before several."""
    for ending in (".safetensors", ".bin"):
        for base in BASE_NAMES:
            for variant in VARIANTS:
                for name in (
                    f"{base}{variant}{ending}",
                    f"{base}{ending}.index{variant}.json",
                    f"{base}{variant}{ending}.index.json",
                ):
                    if (folder / name).is_file():
                        return open_weights(folder / name)
                for part in folder.glob(f"{base}{variant}-00001-of-*{ending}"):  # the index is missing
                    return open_weights(part)
    raise UserError(f"{folder} has no weights: {BASE_NAMES[0]}.safetensors or {BASE_NAMES[1]}.safetensors is missing")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is missing or holds something else."""
    try:
        content = parse_json(path.read_bytes(), finite=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def shipped_config(name: str) -> dict[str, Any]:
    """The configuration in configs/models/<name>.json, for what a single file of weights does not tell."""
    return read_json(CONFIG_FOLDER / f"{name}.json")


def own_names(module: nn.Module) -> tuple[Rule, ...]:
    """The rules for a file with our own names."""
    return tuple(Rule(name, (name,)) for name in module.state_dict())
