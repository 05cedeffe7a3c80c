# SPDX-License-Identifier: Apache-2.0
"""What a run does to save memory: given by the options, or chosen by the planner. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.memory.options import MemoryOptions

STORAGES = ("plain", "fp8", "int8", "nf4")  # how frozen matrices are kept; plain: in the dtype of the computation


@dataclass(frozen=True)
class MemoryChoice:
    """Everything that decides how much a step takes, besides model, method and batch."""

    storage: str = "plain"  # of the frozen denoiser, one of STORAGES
    encoder_storage: str = "plain"  # of frozen text encoders
    activation_budget: float = 1.0  # share of the activations that is kept for the backward pass
    offload: bool = False  # what recomputation starts from waits in main memory
    blocks_to_swap: int = 0  # as --blocks_to_swap counts them
    hoist: bool = False  # modulation weights wait in main memory
    compiled: bool = False

    @classmethod
    def of(cls, options: MemoryOptions) -> MemoryChoice:
        """What is given; "auto" counts as if it were not."""
        budget = 0.0 if options.gradient_checkpointing else options.activation_budget
        return cls(
            storage=options.denoiser_storage,
            encoder_storage=options.encoder_storage,
            activation_budget=budget if isinstance(budget, (int, float)) else 1.0,
            offload=options.cpu_offload_checkpointing,
            blocks_to_swap=options.blocks_to_swap if isinstance(options.blocks_to_swap, int) else 0,
            hoist=options.hoist_modulation,
            compiled=options.compiles,
        )

    def flags(self) -> Iterator[str]:
        """The options that ask for this choice."""
        if self.storage == "fp8":
            yield "--fp8_base" if self.encoder_storage == "fp8" else "--fp8_base_unet"
        elif self.storage != "plain":
            yield f"--base_quant {self.storage}"
        if self.activation_budget == 0:
            yield "--gradient_checkpointing"
        elif self.activation_budget < 1:
            yield f"--activation_budget {self.activation_budget:g}"
        if self.offload:
            yield "--cpu_offload_checkpointing"
        if self.blocks_to_swap:
            yield f"--blocks_to_swap {self.blocks_to_swap}"
        if self.hoist:
            yield "--hoist_modulation"
        if self.compiled:
            yield "--compile"
