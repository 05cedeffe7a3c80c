# SPDX-License-Identifier: Apache-2.0
"""Recognise a file of weights by its tensor names and shapes alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from library.families.registry import FAMILIES, command
from library.key_tables import Shapes

NO_ANSWERS: Mapping[str, str] = {}
# prefixes that programs put before a denoiser's names
PREFIXES = ("model.diffusion_model.", "net.", "diffusion_model.", "transformer.", "unet.")


@dataclass(frozen=True)
class FileKind:
    """One kind of file. `answer` completes the line "<file> is ..."."""

    name: str
    answer: str
    marks: tuple[str, ...]  # tensor names without prefix, or beginnings of names that end with a dot; one is enough
    pipelines: tuple[str, ...] = ()  # beginnings of the class names of its pipelines

    def has(self, names: Collection[str]) -> bool:
        """Whether a file with these names is of this kind. A mark that several tensors share outlives a lost tensor."""
        starts = tuple(mark for mark in self.marks if mark.endswith("."))
        return any(mark in names for mark in self.marks) or any(name.startswith(starts) for name in names)


def architectures() -> Iterator[FileKind]:
    """The kinds of checkpoints. A kind that also has the marks of another one comes before it."""
    for name, sheet in reversed(FAMILIES.items()):
        answer = f"{sheet.files.called} checkpoint: use {command(sheet)}"
        yield FileKind(name, answer, sheet.files.tensors, sheet.files.pipelines)


ADAPTER_ENDINGS = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora.down.weight",
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_blocks",
)
ADAPTER_ANSWER = "a LoRA or other adapter, not a checkpoint: it belongs to --network_weights or --base_weights"
CONTROL_ENDINGS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight", ".conditioning1.0.weight")
CONTROL_ANSWER = "a ControlNet, not a checkpoint: give the base model that it was made for"

# parts of a model, tried only if no architecture is recognised
PARTS = (
    FileKind(
        "unet",
        "a U-Net in diffusers names without the rest: give the folder that holds unet, vae and text_encoder",
        ("down_blocks.",),
    ),
    FileKind(
        "vae",
        "a VAE, not a checkpoint: it belongs to --vae",
        ("encoder.conv_in.", "first_stage_model.encoder.conv_in.", "encoder.downsamples.", "encoder.project_in."),
    ),
    FileKind("embedding", "a textual inversion embedding, not a checkpoint", ("emb_params", "clip_l", "clip_g")),
    FileKind(
        "text encoder",
        "a text encoder, not a checkpoint",
        (
            "text_model.",
            "embeddings.",
            "token_embedding.",
            "shared.",
            "encoder.embed_tokens.",
            "encoder.block.",
            "model.embed_tokens.",
            "embed_tokens.",
        ),
    ),
)


def architecture(shapes: Shapes) -> FileKind | None:
    """The architecture of a checkpoint, or None."""
    names = _without_prefixes(shapes)
    return next((kind for kind in architectures() if kind.has(names)), None)


def _without_prefixes(shapes: Shapes) -> set[str]:
    return {name[len(next((p for p in PREFIXES if name.startswith(p)), "")) :] for name in shapes}


def foreign_file(shapes: Shapes, wanted: str = "sd", answers: Mapping[str, str] = NO_ANSWERS) -> str | None:
    """Say what a file is if it is not a checkpoint of the family `wanted`; None if it is one.

    For example "an SDXL checkpoint: use sdxl_train_network.py". answers: name of a kind -> the family's own answer.
    """
    if any(name.endswith(ADAPTER_ENDINGS) for name in shapes):
        return ADAPTER_ANSWER
    if any(name.endswith(CONTROL_ENDINGS) for name in shapes):
        return CONTROL_ANSWER
    kind = architecture(shapes)
    if kind is not None:
        return None if kind.name == wanted else answers.get(kind.name, kind.answer)
    part = next((part for part in PARTS if part.has(_without_prefixes(shapes))), None)
    return answers.get(part.name, part.answer) if part else FAMILIES[wanted].files.unknown


def foreign_pipeline(class_name: str, wanted: str = "sd", answers: Mapping[str, str] = NO_ANSWERS) -> str | None:
    """`foreign_file` for a folder, by `_class_name` in its model_index.json. None for unknown classes."""
    kind = next((kind for kind in architectures() if kind.pipelines and class_name.startswith(kind.pipelines)), None)
    return None if kind is None or kind.name == wanted else answers.get(kind.name, kind.answer)


def context_dim(shapes: Shapes) -> int | None:
    """Width of the text states that a U-Net attends to, in either naming; None without cross attention."""
    return next((shape[-1] for name, shape in shapes.items() if shape and name.endswith("attn2.to_k.weight")), None)
