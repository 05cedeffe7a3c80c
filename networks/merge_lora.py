# SPDX-License-Identifier: Apache-2.0
r"""Merge LoRAs and other adapters into a model, or several LoRAs into one.

    python networks/merge_lora.py --sd_model model.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 \
        --save_to merged.safetensors --save_precision fp16
    python networks/merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --concat --save_to c.safetensors

The architecture (SD 1.x, 2.x, XL, SD3, FLUX.1, Chroma, Lumina) is found from the files. docs/lora_tools.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.adapters.surgery.tool_options import (  # noqa: E402
    ModelsOptions,
    SaveOptions,
    missing_files,
    target_problems,
)
from library.cli import run_tool  # noqa: E402
from library.options import option  # noqa: E402

Parts = dict[str, tuple[str | None, str | None]]  # option of a model -> the file that is read, the file that is written
TABLE_NAMES = {"gemma2": "gemma2_2b"}  # where the table of layers has another name


@dataclass(frozen=True)
class MergeModelOptions:
    """The model to merge into, and how several LoRAs become one."""

    sd_model: str | None = option(
        None,
        help="Checkpoint (one file, published names) to merge into; without one the LoRAs become one LoRA.",
        path=True,
    )
    v2: bool = option(False, help="The model is Stable Diffusion 2.x.", answer="the version is found from the files")
    concat: bool = option(False, help="Put the ranks of the LoRAs beside each other: their exact sum, of a higher rank")
    shuffle: bool = option(False, help="With --concat: shuffle the ranks.")


@dataclass(frozen=True)
class EncoderOptions:
    """Text encoders in files of their own (SD3, FLUX.1, Lumina)."""

    clip_l: str | None = option(None, help="CLIP-L to merge into.", path=True)
    clip_l_save_to: str | None = option(None, help="File to write for --clip_l.", path=True)
    clip_g: str | None = option(None, help="CLIP-G to merge into.", path=True)
    clip_g_save_to: str | None = option(None, help="File to write for --clip_g.", path=True)
    t5xxl: str | None = option(None, help="T5-XXL to merge into.", path=True)
    t5xxl_save_to: str | None = option(None, help="File to write for --t5xxl.", path=True)
    gemma2: str | None = option(None, help="Gemma 2 to merge into.", path=True)
    gemma2_save_to: str | None = option(None, help="File to write for --gemma2.", path=True)


@dataclass(frozen=True)
class MergeLoraOptions:
    """All options of this script."""

    models: ModelsOptions = field(default_factory=ModelsOptions)
    merge: MergeModelOptions = field(default_factory=MergeModelOptions)
    encoders: EncoderOptions = field(default_factory=EncoderOptions)
    save: SaveOptions = field(default_factory=SaveOptions)

    @property
    def parts(self) -> Parts:
        """The denoiser and the text encoders."""
        encoders = self.encoders
        return {
            "sd_model": (self.merge.sd_model, self.save.save_to),
            "clip_l": (encoders.clip_l, encoders.clip_l_save_to),
            "clip_g": (encoders.clip_g, encoders.clip_g_save_to),
            "t5xxl": (encoders.t5xxl, encoders.t5xxl_save_to),
            "gemma2": (encoders.gemma2, encoders.gemma2_save_to),
        }

    def problems(self) -> Iterator[str]:
        """Options that are missing, make no sense or would destroy a file."""
        return merge_problems(self)


class JoinOptions(Protocol):
    """How several LoRAs become one."""

    @property
    def concat(self) -> bool: ...
    @property
    def shuffle(self) -> bool: ...


class MergeOptions(Protocol):
    """The options of a merge script. The first of `parts` is the denoiser."""

    @property
    def models(self) -> ModelsOptions: ...
    @property
    def merge(self) -> JoinOptions: ...
    @property
    def save(self) -> SaveOptions: ...
    @property
    def parts(self) -> Parts: ...


def merge_problems(options: MergeOptions) -> Iterator[str]:
    """Problems with the files of a merge."""
    parts, concat, shuffle = options.parts, options.merge.concat, options.merge.shuffle
    model = next(iter(parts))
    sources = [*options.models.models, *(read for read, _ in parts.values())]
    into_model = any(read for read, _ in parts.values())
    for name, (read, write) in parts.items():
        yield from missing_files(f"--{name}", [read])
        target = "--save_to" if name == model else f"--{name}_save_to"
        if read or (name == model and (write or not into_model)):
            yield from target_problems(target, write, sources)
        if write and not read and (name != model or into_model):
            yield f"{target} is given without --{name}"
    written = [Path(write).resolve() for _, write in parts.values() if write]
    if len(set(written)) < len(written):
        yield "two files to write have the same name"
    if into_model and (concat or shuffle):
        yield f"--{'concat' if concat else 'shuffle'} is for several LoRAs into one; leave out --{model}"
    elif shuffle and not concat:
        yield "--shuffle needs --concat: summed matrices would no longer fit each other"


def run_merge(options: MergeOptions, architectures: tuple[str, ...] | None = None) -> None:
    """Merge, as all merge scripts do with their options. architectures: that the script is for; None: all."""
    from library.adapters.surgery.merge import Merge, ModelPart, merge
    from library.families.adapters import known_architectures

    model = next(iter(options.parts))
    found = tuple(
        ModelPart(name, read, write, None if name == model else TABLE_NAMES.get(name, name))
        for name, (read, write) in options.parts.items()
        if read and write
    )
    join = options.merge
    merge(Merge(options.models, options.save, found, join.concat, join.shuffle, architectures), known_architectures())


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(MergeLoraOptions, run_merge, argv, "merge_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
