# SPDX-License-Identifier: Apache-2.0
r"""Merge LoRAs and other adapters into an SDXL model, or several SDXL LoRAs into one.

    python networks/sdxl_merge_lora.py --sd_model sdxl.safetensors --models a.safetensors --ratios 0.8 \
        --save_to merged.safetensors --save_precision fp16
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


@dataclass(frozen=True)
class MergeSdxlModelOptions:
    """The model to merge into, and how several LoRAs become one."""

    sd_model: str | None = option(
        None, help="SDXL checkpoint (one file) to merge into; without one the LoRAs become one LoRA.", path=True
    )
    concat: bool = option(False, help="Put the ranks of the LoRAs beside each other: their exact sum, of a higher rank")
    shuffle: bool = option(False, help="With --concat: shuffle the ranks.")


@dataclass(frozen=True)
class SdxlMergeOptions(MergeOptions):
    """All options of this script."""

    models: ModelsOptions = field(default_factory=ModelsOptions)
    merge: MergeSdxlModelOptions = field(default_factory=MergeSdxlModelOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    architectures = ("sdxl",)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(SdxlMergeOptions, run_merge, argv, "sdxl_merge_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
