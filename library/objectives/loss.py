# SPDX-License-Identifier: Apache-2.0
"""Difference between prediction and target: element-wise losses, Huber thresholds, masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from library.objectives.options import LossOptions

DARK = 8  # of 255: masks without a brighter pixel count as black, such as files that hold 0 and 1


def _pseudo_huber(pred: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """sqrt((p - t)^2 + c^2) - c (Charbonnier et al. 1997)."""
    return torch.sqrt((pred - target) ** 2 + c**2) - c


# name -> (prediction, target, threshold) -> loss of each element; the thresholds broadcast over each sample
MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2": lambda p, t, c: (p - t) ** 2,
    "l1": lambda p, t, c: (p - t).abs(),
    "huber": lambda p, t, c: 2 * c * _pseudo_huber(p, t, c),  # -> l2 for small differences
    "smooth_l1": lambda p, t, c: 2 * _pseudo_huber(p, t, c),  # -> 2 * l1 for large differences
}


def scheduled_threshold(options: LossOptions, time: Tensor) -> Tensor:
    """Threshold c of the constant and exponential schedules; `time` runs from 0 (clean) to 1 (noise), any shape.

    exponential: c = huber_c^time * scale (Khrapov et al. 2024, scheduled pseudo-Huber loss).
    """
    if options.huber_schedule == "constant":
        return torch.full_like(time, options.huber_c * options.huber_scale)
    return options.huber_c**time * options.huber_scale


def huber_thresholds(options: LossOptions, alphas_cumprod: Tensor) -> Tensor:
    """Threshold c of each DDPM timestep, (T,) float32 (Khrapov et al. 2024).

    snr: c = (1 - huber_c) / (1 + sigma)^2 + huber_c, with sigma^2 = 1/SNR; the others: `scheduled_threshold`.
    """
    if options.huber_schedule != "snr":
        count = len(alphas_cumprod)
        return scheduled_threshold(options, torch.arange(count) / count)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    return (1 - options.huber_c) / (1 + sigmas) ** 2 + options.huber_c


def in_latents(masks: Tensor, latents: Tensor) -> Tensor:
    """Masks (B 1 H W) averaged over the area of each pixel of latents (B C h w): B 1 h w, in the latents' dtype."""
    return F.interpolate(masks.to(latents.dtype), size=latents.shape[-2:], mode="area")


def apply_mask(loss: Tensor, masks: Tensor) -> Tensor:
    """Multiply an element-wise loss (B C h w) by masks (B 1 H W in [0, 1])."""
    return loss * in_latents(masks, loss)


def per_sample(loss: Tensor, masks: Tensor | None) -> Tensor:
    """Mean over C h w of the masked element-wise loss, (B,). Masked pixels count as 0 in the mean."""
    if masks is not None:
        loss = apply_mask(loss, masks)
    return loss.flatten(1).mean(dim=1)
