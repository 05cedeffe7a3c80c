# SPDX-License-Identifier: Apache-2.0
"""How a run saves memory: given by the options or chosen by the planner. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.memory.options import MemoryOptions

STORAGES = ("plain", "fp8", "int8", "nf4")  # formats of frozen matrices; plain: the dtype of the computation


@dataclass(frozen=True)
class MemoryChoice:
    """Everything that determines the memory of a step, apart from model, method and batch."""

    storage: str = "plain"  # format of the frozen denoiser, one of STORAGES
    encoder_storage: str = "plain"  # format of frozen text encoders
    activation_budget: float = 1.0  # share of the activations that is kept for the backward pass, 0 to 1
    offload: bool = False  # inputs of recomputed blocks are kept in main memory
    blocks_to_swap: int = 0  # as --blocks_to_swap counts them
    hoist: bool = False  # modulation weights are kept in main memory
    compiled: bool = False

    @classmethod
    def of(cls, options: MemoryOptions) -> MemoryChoice:
        """The choice that the options give; "auto" counts as not given."""
        budget = 0.0 if options.gradient_checkpointing else options.activation_budget
        return cls(
            storage=options.base_quant or ("fp8" if options.fp8_base or options.fp8_base_unet else "plain"),
            encoder_storage="fp8" if options.fp8_base else "plain",
            activation_budget=budget if isinstance(budget, (int, float)) else 1.0,
            offload=options.cpu_offload_checkpointing,
            blocks_to_swap=options.blocks_to_swap if isinstance(options.blocks_to_swap, int) else 0,
            hoist=options.hoist_modulation,
            compiled=options.compiles,
        )

    def flags(self) -> Iterator[str]:
        """The command-line options for this choice."""
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
