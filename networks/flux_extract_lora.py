# SPDX-License-Identifier: Apache-2.0
r"""Make a LoRA of what a FLUX.1 or Chroma model has learned: its difference to the original, at a given rank.

    python networks/flux_extract_lora.py --model_org flux1-dev.safetensors --model_tuned tuned.safetensors \
        --dim 32 --save_to lora.safetensors --save_precision bf16 --device cuda
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import PairOptions
from library.cli import run_tool
from library.options import between, option
from networks.extract_lora_from_models import ExtractionOptions, run_extraction


@dataclass(frozen=True)
class ExtractFluxModelsOptions(PairOptions):
    """The two models, and the rank."""

    clamp_quantile: float = option(
        0.99, help="The largest numbers are limited to this quantile; 1 keeps them.", check=between(0, 1)
    )
    mem_eff_safe_open: bool = option(
        False, help="Use less memory to read.", answer="files are always read tensor by tensor"
    )


@dataclass(frozen=True)
class FluxExtractOptions(ExtractionOptions):
    """All options of this script."""

    extract: ExtractFluxModelsOptions = field(default_factory=ExtractFluxModelsOptions)


def act(options: FluxExtractOptions) -> None:
    run_extraction(options, clamp_quantile=options.extract.clamp_quantile, architectures=("flux",))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(FluxExtractOptions, act, argv, "flux_extract_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
