# SPDX-License-Identifier: Apache-2.0
"""Option groups and checks of paths that the LoRA tools share. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.adapters.formats.peft_folder import PEFT_FILES
from library.options import at_least, option
from library.text_files import parse_json

PRECISIONS = {
    "float": "float32",
    "float32": "float32",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5xxl", "gemma2": "gemma2_2b"}  # option -> comfy's name
WRITTEN = (".safetensors", ".ckpt", ".pt", ".pth")
BLOCK_COUNTS = (12, 17, 20, 26)  # of --lbws: SDXL, SD 1/2, SDXL with every block, SD 1/2 with every block

# ---- groups of options --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaveOptions:
    """The file to write."""

    save_to: str | None = option(
        None, help="File to write (.safetensors; .ckpt, .pt and .pth without metadata).", path=True
    )
    save_precision: str | None = option(None, help="Precision of the weights in the new file.", choices=[*PRECISIONS])
    no_metadata: bool = option(False, help="Leave out modelspec.*; what readers of a LoRA need is written anyway.")


@dataclass(frozen=True)
class DeviceOptions:
    """The device that computes."""

    device: str | None = option(None, help="Device that computes, such as cuda. Not given: the CPU.")


@dataclass(frozen=True)
class PairOptions:
    """The two models, and the rank."""

    model_org: str | None = option(None, help="The original checkpoint (one file, published names).", path=True)
    model_tuned: str | None = option(None, help="The tuned checkpoint.", path=True)
    dim: int = option(4, help="Rank of the LoRA.", check=at_least(1))

    def problems(self) -> Iterator[str]:
        yield from needed(self, "model_org", "model_tuned")
        yield from missing_files("--model_org", [self.model_org])
        yield from missing_files("--model_tuned", [self.model_tuned])


@dataclass(frozen=True)
class ModelsOptions:
    """The adapters to merge."""

    models: tuple[str, ...] = option((), help="Adapter files to merge, or folders of PEFT.", path=True)
    ratios: tuple[float, ...] = option((), help="How strongly each of --models is merged, one number for each.")
    lbws: tuple[str, ...] = option(
        (),
        help="For each of --models a list such as [1,0,0.5,...]: a ratio for the text encoder and for each U-Net block "
        f"that has a LoRA ({', '.join(map(str, BLOCK_COUNTS))} numbers; SD 1/2 and SDXL).",
    )
    precision: str | None = option(
        None, help="Precision of the arithmetic.", choices=[*PRECISIONS], answer="it is always float32"
    )

    def problems(self) -> Iterator[str]:
        if not self.models:
            yield "--models is needed: the adapter files to merge"
        yield from (f"--ratios: must be finite numbers, got {r}" for r in self.ratios if not math.isfinite(r))
        if len(self.ratios) != len(self.models):
            yield f"--ratios: {len(self.ratios)} numbers for {len(self.models)} --models; give one for each"
        yield from missing_adapters("--models", self.models)
        if self.lbws and len(self.lbws) != len(self.models):
            yield f"--lbws: {len(self.lbws)} lists for {len(self.models)} --models; give one for each"
        yield from (line for text in self.lbws for line in block_list_problems(text))

    def block_ratios(self) -> list[list[float]]:
        """--lbws, read; checked by `problems`."""
        return [parse_json(text) for text in self.lbws]


class MergeOptions:
    """The options of a merge script, which are a dataclass with these groups and others."""

    models: ModelsOptions
    merge: Any  # the model, and how several LoRAs become one: `concat` and `shuffle`
    save: SaveOptions
    denoiser = "sd_model"  # name of its option
    architectures: tuple[str, ...] | None = None  # names of those that the script is for; None: all

    @property
    def parts(self) -> dict[str, tuple[str | None, str | None]]:
        """The denoiser, then the text encoders: option -> the file that is read, the file that is written."""
        given = {name: value for group in vars(self).values() for name, value in vars(group).items()}
        encoders = {name: (given[name], given[f"{name}_save_to"]) for name in ENCODERS if name in given}
        return {self.denoiser: (given[self.denoiser], self.save.save_to), **encoders}

    def problems(self) -> Iterator[str]:
        """Options that are missing, make no sense or would destroy a file."""
        parts, concat, shuffle = self.parts, self.merge.concat, self.merge.shuffle
        sources = [*self.models.models, *(read for read, _ in parts.values())]
        into_model = any(read for read, _ in parts.values())
        for name, (read, write) in parts.items():
            is_denoiser = name == self.denoiser
            yield from missing_files(f"--{name}", [read])
            target = "--save_to" if is_denoiser else f"--{name}_save_to"
            if read or (is_denoiser and (write or not into_model)):
                yield from target_problems(target, write, sources)
            if write and not read and (not is_denoiser or into_model):
                yield f"{target} is given without --{name}"
        written = [Path(write).resolve() for _, write in parts.values() if write]
        if len(set(written)) < len(written):
            yield "two files to write have the same name"
        if into_model and (concat or shuffle):
            yield f"--{'concat' if concat else 'shuffle'} is for several LoRAs into one; leave out --{self.denoiser}"
        elif shuffle and not concat:
            yield "--shuffle needs --concat: summed matrices would no longer fit each other"


def block_list_problems(text: str) -> Iterator[str]:
    """Problems of one list of --lbws."""
    try:
        numbers = parse_json(text)
    except ValueError:
        numbers = None
    if not isinstance(numbers, list) or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        yield f"--lbws {text}: a list of numbers in brackets is needed, such as [1,0,0.5]"
    elif len(numbers) not in BLOCK_COUNTS:
        yield f"--lbws: {len(numbers)} numbers; {', '.join(map(str, BLOCK_COUNTS))} are possible"


# ---- paths --------------------------------------------------------------------------------------------------------


def missing_files(name: str, paths: Sequence[str | None]) -> Iterator[str]:
    """A line for each path that is not a file."""
    for path in paths:
        if path and Path(path).is_dir():
            yield f"{name} {path} is a folder; give a file"
        elif path and not Path(path).is_file():
            yield f"{name} {path} does not exist"


def missing_adapters(name: str, paths: Sequence[str | None]) -> Iterator[str]:
    """A line for each path that is neither an adapter file nor a folder of PEFT."""
    for path in paths:
        if path and any((Path(path) / name).is_file() for name in PEFT_FILES):
            continue
        yield from missing_files(name, [path])


def target_problems(name: str, path: str | None, sources: Sequence[str | None]) -> Iterator[str]:
    """Problems of a file to write: not given, another suffix, a folder, or one that is read."""
    if not path:
        yield f"{name} is needed: the file to write"
        return
    target = Path(path)
    if target.suffix not in WRITTEN:
        yield f"{name} {path}: the file must end with {', '.join(WRITTEN)}"
    elif target.is_dir():
        yield f"{name} {path} is a folder; give a file"
    for source in sources:
        if source and target.resolve() in (Path(source).resolve(), *(Path(source).resolve() / n for n in PEFT_FILES)):
            yield f"{name} {path} is an input of this very run: give another file"


def needed(options: Any, *names: str) -> Iterator[str]:
    """A line for each option that is not given."""
    return (f"--{name} is needed" for name in names if getattr(options, name) is None)
