# SPDX-License-Identifier: Apache-2.0
"""Whole models of Stable Diffusion 1.x, 2.x and XL as files: one checkpoint in published names, or a diffusers folder.

Layout of the folder: https://huggingface.co/docs/diffusers/using-diffusers/other-formats. Every file of weights is
written tensor by tensor; the folder is there as a whole, or as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.io.atomic import atomic_folder
from library.io.checkpoint import MODEL_INDEX, CheckpointForm, save_tensors
from library.key_tables import LazyTensors
from library.weights.clip_names import clip_level
from library.weights.loading import Part
from library.weights.text import TOKENIZER_FILES, ClipTokenizer
from library.weights.weight_files import COUNTS, WeightFile

NOTHING = (None, None)  # in model_index.json: a component that the pipeline does without
# What programs sample with where the source, a single file, does not say it
SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model", "pickle": "pytorch_model"}


# ---- one file -------------------------------------------------------------------------------------------------------


class Unread(LazyTensors):
    """The tensors of a source file that none of our modules holds, each read when it is asked for."""

    def __init__(self, file: WeightFile, known: Collection[str]) -> None:
        self.file, self.names = file, [name for name in file.shapes if name not in known]

    def __getitem__(self, name: str) -> Tensor:
        return self.file.tensor(name)


def names_read(part: Part, module: nn.Module) -> set[str]:
    """The names under which the weights of `module` lie in the file of `part`."""
    return {part.prefix + rule.published for rule in part.rules(module)}


def save_single(
    path: Path, tensors: Mapping[str, Tensor], form: CheckpointForm, *, source: WeightFile | None = None,
    known: Collection[str] = (),
) -> None:  # fmt: skip
    """One checkpoint. What `source` has besides the names `known` survives, and a .ckpt counts on from its own.

    Raises SaveError and StopTraining, as save_tensors does.
    """
    others = Unread(source, known) if source is not None else None
    before = source.counts if source is not None else {}
    trained = dict(zip(COUNTS, (form.epochs, form.steps)))
    counts = {name: before.get(name, 0) + count for name, count in trained.items()} if form.kind == "ckpt" else None
    save_tensors(path, tensors, form.metadata, dtype=form.dtype, hashes=False, others=others, beside=counts)
    if source is not None:
        source.release()


# ---- diffusers folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """What a diffusers folder holds. modules, tokenizers: by the names of their folders."""

    name: str  # of diffusers' class: "StableDiffusionPipeline"
    modules: Mapping[str, nn.Module]
    tokenizers: Mapping[str, ClipTokenizer]
    scheduler: Mapping[str, Any]
    extras: Mapping[str, Any]  # further entries of model_index.json


def scheduler_config(source: Mapping[str, Any], *, v_prediction: bool) -> dict[str, Any]:
    """The noise schedule as diffusers reads it: the source's own, or the usual one, with what the model predicts."""
    own = dict(source) if "_class_name" in source else {**SCHEDULER, **source}
    return {**own, "prediction_type": "v_prediction" if v_prediction else "epsilon"}


def save_pipeline(folder: Path, pipeline: Pipeline, form: CheckpointForm) -> None:
    """Write the folder; an older one of that name is replaced as a whole. Raises SaveError and StopTraining."""
    import diffusers

    size = sum(p.numel() * (form.dtype or p.dtype).itemsize for m in pipeline.modules.values() for p in m.parameters())
    index: dict[str, Any] = {
        "_class_name": pipeline.name,
        "_diffusers_version": diffusers.__version__,
        **pipeline.extras,
        "scheduler": ("diffusers", pipeline.scheduler["_class_name"]),
        **{place: (_library(module), type(module).__name__) for place, module in pipeline.modules.items()},
        **dict.fromkeys(pipeline.tokenizers, ("transformers", "CLIPTokenizer")),
    }
    with atomic_folder(folder, size=size) as temp:
        for place, module in pipeline.modules.items():
            _save_module(temp / place, module, form)
        for place, tokenizer in pipeline.tokenizers.items():
            save_tokenizer(temp / place, tokenizer)
        (temp / "scheduler").mkdir()
        _write_json(temp / "scheduler" / "scheduler_config.json", pipeline.scheduler)
        _write_json(temp / MODEL_INDEX, index)


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _save_module(folder: Path, module: Any, form: CheckpointForm) -> None:
    """config.json and weights, as `save_pretrained` of diffusers or transformers lays them out."""
    folder.mkdir()
    tensors = module.state_dict()
    if _library(module) == "diffusers":
        module.save_config(folder)
        base = WEIGHTS["diffusers"]
    else:
        config = type(module.config).from_dict(module.config.to_dict())
        config.architectures = [type(module).__name__]
        config.save_pretrained(folder)
        base = WEIGHTS["transformers" if form.weights_ending == ".safetensors" else "pickle"]
        level = "" if clip_level(module) else "text_model."  # every version of transformers reads the names with it
        tensors = {level + name: tensor for name, tensor in tensors.items()}
    # transformers refuses files that do not say which framework wrote them
    save_tensors(folder / f"{base}{form.weights_ending}", tensors, {"format": "pt"}, dtype=form.dtype, hashes=False)


def save_tokenizer(folder: Path, tokenizer: ClipTokenizer) -> None:
    """The files of the tokenizer where it came from; they name the padding that was trained with."""
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    if tokenizer.padding == tokenizer.tokenizer.pad_token_id:
        return
    padding = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.padding)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write_json(path, {**content, "pad_token": padding})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
