# SPDX-License-Identifier: Apache-2.0
r"""Make a LoRA of what a FLUX.1 or Chroma model has learned: its difference to the original, at a given rank.

    python networks/flux_extract_lora.py --model_org flux1-dev.safetensors --model_tuned tuned.safetensors \
        --dim 32 --save_to lora.safetensors --save_precision bf16 --device cuda
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

from library.adapters.surgery.tool_options import (  # noqa: E402
    DeviceOptions,
    SaveOptions,
    missing_files,
    needed,
    target_problems,
)
from library.cli import run_tool  # noqa: E402
from library.options import at_least, between, option  # noqa: E402


@dataclass(frozen=True)
class ExtractFluxModelsOptions:
    """The two models, and the rank."""

    model_org: str | None = option(None, help="The original checkpoint (one file, published names).", path=True)
    model_tuned: str | None = option(None, help="The tuned checkpoint.", path=True)
    dim: int = option(4, help="Rank of the LoRA.", check=at_least(1))
    clamp_quantile: float = option(
        0.99, help="The largest numbers are limited to this quantile; 1 keeps them.", check=between(0, 1)
    )
    mem_eff_safe_open: bool = option(
        False, help="Use less memory to read.", answer="files are always read tensor by tensor"
    )

    def problems(self) -> Iterator[str]:
        yield from needed(self, "model_org", "model_tuned")
        yield from missing_files("--model_org", [self.model_org])
        yield from missing_files("--model_tuned", [self.model_tuned])


@dataclass(frozen=True)
class FluxExtractOptions:
    """All options of this script."""

    extract: ExtractFluxModelsOptions = field(default_factory=ExtractFluxModelsOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def problems(self) -> Iterator[str]:
        """Options that are missing or would destroy a file."""
        yield from target_problems("--save_to", self.save.save_to, [self.extract.model_org, self.extract.model_tuned])


def act(options: FluxExtractOptions) -> None:
    from library.adapters.surgery.extract import Extraction, extract
    from library.families.adapters import known_architectures

    asked, save = options.extract, options.save
    assert asked.model_org and asked.model_tuned and save.save_to
    extract(
        Extraction(
            asked.model_org,
            asked.model_tuned,
            save.save_to,
            dim=asked.dim,
            clamp_quantile=asked.clamp_quantile,
            save_precision=save.save_precision,
            device=options.device.device,
            no_metadata=save.no_metadata,
            architectures=("flux",),
        ),
        known_architectures(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for bad input."""
    return run_tool(FluxExtractOptions, act, argv, "flux_extract_lora.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
