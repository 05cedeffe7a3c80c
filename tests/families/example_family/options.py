# SPDX-License-Identifier: Apache-2.0
"""Options of the example. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.families.options import ModelOptions
from library.objectives.flow_options import SampledFlowOptions
from library.options import option, refused


@dataclass(frozen=True)
class ExampleOptions(ModelOptions):
    """The example."""

    clip_l: str | None = option(None, help="CLIP-L: file or folder. Without it, that of the model.", path=True)
    no_half_vae: bool = option(False, help="Run the VAE in float32 also under mixed precision.")
    weighted_captions: bool = option(False, help="Not for this model.", check=refused("it cannot weight words"))


@dataclass(frozen=True)
class ExampleFlowOptions(SampledFlowOptions):
    """How the example is trained: which noise levels are drawn, what the loss compares, how it is weighted."""
