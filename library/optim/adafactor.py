# SPDX-License-Identifier: Apache-2.0
"""transformers' Adafactor without a wait for the device at each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rate_on_device(optimizer: Any) -> None:
    """Compute the rate of a weight (Shazeer & Stern 2018, algorithm 4) where the weight is; the results are the same.

    With scale_parameter the rate grows with the weight: max(eps, RMS(weight)), of which transformers reads the larger
    one on the host. What is left is weight_decay together with scale_parameter, which reads the rate itself.
    """
    step_size = optimizer._get_lr

    def rate(group: Mapping[str, Any], state: Mapping[str, Any]) -> float | Tensor:
        step = step_size({**group, "scale_parameter": False}, state)
        if not group["scale_parameter"]:
            return step
        smallest, size = group["eps"][1], state["RMS"]
        return torch.where(size > smallest, size * step, torch.full_like(size, smallest * step))

    optimizer._get_lr = rate
