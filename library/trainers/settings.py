# SPDX-License-Identifier: Apache-2.0
"""Option values as the objects that libraries want."""

from __future__ import annotations

from typing import Any

import torch

from library.device import DTYPES, DistributedSettings
from library.trainers.options import DistributedOptions, PrecisionOptions


def compute_dtype(options: PrecisionOptions) -> torch.dtype:
    """Dtype of the frozen models and of the computation."""
    return DTYPES[options.mixed_precision]


def trained_dtype(options: PrecisionOptions) -> torch.dtype:
    """Dtype of the weights that learn: fp32 unless --full_bf16 / --full_fp16."""
    return DTYPES[options.mixed_precision] if options.full_bf16 or options.full_fp16 else torch.float32


def distributed_settings(options: DistributedOptions) -> DistributedSettings:
    """Options of several processes as `library.device` takes them."""
    return DistributedSettings(
        timeout_minutes=options.ddp_timeout,
        gradient_as_bucket_view=options.ddp_gradient_as_bucket_view,
        static_graph=options.ddp_static_graph,
        deepspeed=_deepspeed_arguments(options) if options.deepspeed else {},
    )


def _deepspeed_arguments(options: DistributedOptions) -> dict[str, Any]:
    return {
        "zero_stage": options.zero_stage,
        "offload_optimizer_device": options.offload_optimizer_device,
        "offload_optimizer_nvme_path": options.offload_optimizer_nvme_path,
        "offload_param_device": options.offload_param_device,
        "offload_param_nvme_path": options.offload_param_nvme_path,
        "zero3_init_flag": options.zero3_init_flag,
        "zero3_save_16bit_model": options.zero3_save_16bit_model,
        "fp16_master_weights_and_grads": options.fp16_master_weights_and_gradients,
    }
