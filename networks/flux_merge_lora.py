# SPDX-License-Identifier: Apache-2.0
r"""Merge LoRAs and other adapters into FLUX.1 or Chroma and their text encoders, or several LoRAs into one.

    python networks/flux_merge_lora.py --flux_model flux1-dev.safetensors --models a.safetensors --ratios 0.8 \
        --save_to merged.safetensors --save_precision bf16
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.adapters.surgery.tool_options import ModelsOptions, SaveOptions  # noqa: E402
from library.cli import run_tool  # noqa: E402
from library.options import option  # noqa: E402
from networks.merge_lora import Parts, merge_problems, run_merge  # noqa: E402

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
class FluxMergeOptions:
    """All options of this script."""

    models: ModelsOptions = field(default_factory=ModelsOptions)
    merge: MergeFluxModelOptions = field(default_factory=MergeFluxModelOptions)
    save: SaveOptions = field(default_factory=SaveOptions)

    @property
    def parts(self) -> Parts:
        """The denoiser and the text encoders."""
        asked = self.merge
        return {
            "flux_model": (asked.flux_model, self.save.save_to),
            "clip_l": (asked.clip_l, asked.clip_l_save_to),
            "t5xxl": (asked.t5xxl, asked.t5xxl_save_to),
        }

    def problems(self) -> Iterator[str]:
        """Options that are missing, make no sense or would destroy a file."""
        return merge_problems(self)


def act(options: FluxMergeOptions) -> None:
    run_merge(options, architectures=("flux",))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(FluxMergeOptions, act, argv, "flux_merge_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
