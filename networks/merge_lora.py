# SPDX-License-Identifier: Apache-2.0
r"""Merge LoRAs and other adapters into a model, or several LoRAs into one.

    python networks/merge_lora.py --sd_model model.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 \
        --save_to merged.safetensors --save_precision fp16
    python networks/merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --concat --save_to c.safetensors

The architecture (SD 1.x, 2.x, XL, SD3, FLUX.1, FLUX.2, Chroma, Lumina) is found from the files. docs/lora_tools.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import MergeOptions, ModelsOptions, SaveOptions
from library.cli import run_tool
from library.options import option


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
class MergeLoraOptions(MergeOptions):
    """All options of this script."""

    models: ModelsOptions = field(default_factory=ModelsOptions)
    merge: MergeModelOptions = field(default_factory=MergeModelOptions)
    encoders: EncoderOptions = field(default_factory=EncoderOptions)
    save: SaveOptions = field(default_factory=SaveOptions)


def run_merge(options: MergeOptions) -> None:
    """Merge, as all merge scripts do with their options."""
    from library.adapters.surgery.merge import merge
    from library.families.adapters import known_architectures

    merge(options, known_architectures())


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(MergeLoraOptions, run_merge, argv, "merge_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
