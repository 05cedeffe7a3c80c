# SPDX-License-Identifier: Apache-2.0
"""Conversion of options to objects of torch and accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch

from library.data.options import DataOptions
from library.device import DTYPES, DistributedSettings
from library.io.options import SaveOptions
from library.trainers.options import ONLY_DEEPSPEED, DistributedOptions, PrecisionOptions


def compute_dtype(options: PrecisionOptions) -> torch.dtype:
    """Dtype of the frozen models and of the computation."""
    return DTYPES[options.mixed_precision]


def trained_dtype(options: PrecisionOptions) -> torch.dtype:
    """Dtype of the weights that learn: fp32 unless --full_bf16 / --full_fp16."""
    return DTYPES[options.mixed_precision] if options.full_bf16 or options.full_fp16 else torch.float32


def saved_dtype(options: SaveOptions) -> torch.dtype | None:
    """--save_precision; None: weights keep their dtype."""
    return DTYPES[options.save_precision] if options.save_precision else None


def loading_processes(options: DataOptions) -> int:
    """Number of processes that load pictures: at most one per core."""
    return min(options.max_data_loader_n_workers, os.cpu_count() or 1)


def distributed_settings(options: DistributedOptions, *, max_grad_norm: float, batch_size: int) -> DistributedSettings:
    """Options for several processes in the form of `library.device`. DeepSpeed clips gradients itself."""
    return DistributedSettings(
        timeout_minutes=options.ddp_timeout,
        deepspeed=_deepspeed_arguments(options, max_grad_norm) if options.deepspeed else {},
        batch_size=batch_size,
    )


def _deepspeed_arguments(options: DistributedOptions, max_grad_norm: float) -> dict[str, Any]:
    return {
        "gradient_accumulation_steps": 1,  # the trainer divides the loss and says which micro-batch is the last
        "gradient_clipping": max_grad_norm,  # 0: not at all
        "zero_stage": options.zero_stage,
        **{name.replace("gradients", "grads"): vars(options)[name] for name in ONLY_DEEPSPEED},  # as accelerate has it
    }
