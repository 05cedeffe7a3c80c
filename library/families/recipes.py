# SPDX-License-Identifier: Apache-2.0
"""What a sheet says to the makers: from which recipe those of configs/memory are made, what the GPU benchmark runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Edits = Mapping[str, str | None]  # key -> its value as TOML writes it; None: the key is left out

IN_BACKWARD: Edits = {"fused_backward_pass": "true", "full_bf16": "true", "train_batch_size": "1"}
ADAFACTOR: Edits = {
    "optimizer_type": '"Adafactor"',
    "optimizer_args": '["relative_step=False", "scale_parameter=False", "warmup_init=False"]',
    "max_grad_norm": "0.0",
}
NO_ENCODER: Edits = {
    "train_text_encoder": None, "learning_rate_te": None, "cache_text_encoder_outputs": "true",
    "cache_text_encoder_outputs_to_disk": "true",
}  # fmt: skip


@dataclass(frozen=True)
class MemoryRecipe:
    """What is trained, and the recipe of configs/ that tools/make_memory_recipes.py starts from."""

    base: str  # "flux_lora": configs/flux_lora.toml
    model: str  # of benchmarks.cpu.audit.MODELS
    title: str
    edits: Edits = field(default_factory=dict)
    ways: tuple[Edits, ...] = ({},)  # the first with which a card has enough memory is taken
    command: Mapping[str, str] = field(default_factory=dict)  # replacements in the command of the recipe's header

    @property
    def full(self) -> bool:
        return self.base.endswith("_full")


@dataclass(frozen=True)
class BenchmarkJob:
    """One model, one method, one size. TF: 10^12 operations of matrix products, by PyTorch's FlopCounterMode."""

    architecture: str  # of benchmarks.gpu.models
    method: str  # of library.cli
    size: int  # pixels of a side
    batch: int
    forward_tf: float  # of a forward pass
    step_tf: float  # of a step without recomputation: what the utilisation counts
    block_gb: float  # of the blocks' weights in bf16
    hoists: bool = False  # whether modulations can be computed once per step
    goal: str = ""

    @property
    def full(self) -> bool:
        return self.method == "finetune"
