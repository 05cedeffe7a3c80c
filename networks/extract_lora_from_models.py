# SPDX-License-Identifier: Apache-2.0
r"""Make a LoRA of what a model has learned: the difference of a tuned checkpoint to the original, at a given rank.

    python networks/extract_lora_from_models.py --model_org base.safetensors --model_tuned tuned.safetensors \
        --dim 32 --save_to lora.safetensors --save_precision fp16

The architecture (SD 1.x, 2.x, XL, SD3, FLUX.1, FLUX.2, Chroma, Lumina) is found from the files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a script, from any folder

from library.adapters.surgery.tool_options import PRECISIONS, DeviceOptions, PairOptions, SaveOptions, target_problems
from library.cli import run_tool
from library.options import at_least, between, option


@dataclass(frozen=True)
class ExtractModelsOptions(PairOptions):
    """The two models, and the rank."""

    conv_dim: int | None = option(
        None, help="Rank of 3x3 convolutions, which get a LoRA only with it (SD 1/2 and SDXL).", check=at_least(1)
    )
    clamp_quantile: float = option(
        0.99, help="The largest numbers are limited to this quantile; 1 keeps them.", check=between(0, 1)
    )
    min_diff: float = option(
        0.01, help="A text encoder whose weights nowhere differ by more gets no LoRA.", check=at_least(0)
    )
    load_precision: str | None = option(
        None, help="Precision that both models are rounded to first.", choices=[*PRECISIONS]
    )
    v2: bool = option(False, help="Both models are Stable Diffusion 2.x; checked.")
    sdxl: bool = option(False, help="Both models are SDXL; checked.")
    v_parameterization: bool | None = option(
        None, help="Whether the metadata say v-prediction; not given: for Stable Diffusion 2.x."
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.v2 and self.sdxl:
            yield "--v2 and --sdxl exclude each other"


@dataclass(frozen=True)
class ExtractionOptions:
    """All options of a script that extracts a LoRA."""

    extract: PairOptions = field(default_factory=PairOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def problems(self) -> Iterator[str]:
        """Options that are missing or would destroy a file."""
        yield from target_problems("--save_to", self.save.save_to, [self.extract.model_org, self.extract.model_tuned])


@dataclass(frozen=True)
class ExtractLoraOptions(ExtractionOptions):
    """All options of this script."""

    extract: ExtractModelsOptions = field(default_factory=ExtractModelsOptions)


def run_extraction(options: ExtractionOptions, **more: Any) -> None:
    """Extract a LoRA, as all extraction scripts do with their options. more: further fields of `Extraction`."""
    from library.adapters.surgery.extract import Extraction, extract
    from library.families.adapters import known_architectures

    extract(Extraction(options.extract, options.save, options.device.device, **more), known_architectures())


def act(options: ExtractLoraOptions) -> None:
    asked = options.extract
    run_extraction(
        options,
        conv_dim=asked.conv_dim,
        clamp_quantile=asked.clamp_quantile,
        min_diff=asked.min_diff,
        load_precision=asked.load_precision,
        v_prediction=asked.v_parameterization is not False,
        architectures=("sd2",) if asked.v2 else ("sdxl",) if asked.sdxl else None,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(ExtractLoraOptions, act, argv, "extract_lora_from_models.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
