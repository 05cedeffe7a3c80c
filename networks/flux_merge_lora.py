# SPDX-License-Identifier: Apache-2.0
r"""Merge LoRAs and other adapters into FLUX.1 or Chroma and their text encoders, or several LoRAs into one.

    python networks/flux_merge_lora.py --flux_model flux1-dev.safetensors --models a.safetensors --ratios 0.8 \
        --save_to merged.safetensors --save_precision bf16
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
from networks.merge_lora import run_merge

STREAMED = "files are read and written tensor by tensor, which needs the memory of one tensor"


@dataclass(frozen=True)
class MergeFluxModelOptions:
    """The model to merge into, and how several LoRAs become one."""

    flux_model: str | None = option(
        None,
        help="FLUX.1 or Chroma (one file, published names) to merge into; without one the LoRAs become one LoRA.",
        path=True,
    )
    clip_l: str | None = option(None, help="CLIP-L to merge into.", path=True)
    clip_l_save_to: str | None = option(None, help="File to write for --clip_l.", path=True)
    t5xxl: str | None = option(None, help="T5-XXL to merge into.", path=True)
    t5xxl_save_to: str | None = option(None, help="File to write for --t5xxl.", path=True)
    concat: bool = option(False, help="Put the ranks of the LoRAs beside each other: their exact sum, of a higher rank")
    shuffle: bool = option(False, help="With --concat: shuffle the ranks.")
    diffusers: bool = option(
        False, help="The LoRAs are in the format of diffusers.", answer="the format is found from the files"
    )
    mem_eff_load_save: bool = option(False, help="Use less memory.", answer=STREAMED)
    loading_device: str = option("cpu", help="Device that loads.", answer=STREAMED)
    working_device: str = option("cpu", help="Device that merges.", answer=STREAMED)


@dataclass(frozen=True)
class FluxMergeOptions(MergeOptions):
    """All options of this script."""

    models: ModelsOptions = field(default_factory=ModelsOptions)
    merge: MergeFluxModelOptions = field(default_factory=MergeFluxModelOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    denoiser = "flux_model"
    architectures = ("flux",)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(FluxMergeOptions, run_merge, argv, "flux_merge_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
