# SPDX-License-Identifier: Apache-2.0
"""The noise that is added to latents: plain, offset, multi-resolution, and input perturbation.

Every function takes its generator. All draws are float32 on the generator's device, and the host never waits for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from library.objectives.options import DDPMOptions, NoisingOptions
from library.rng import python_rng


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float32, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def draw_strength(strength: float, random: bool, generator: torch.Generator) -> float | Tensor:
    """`strength` itself or, with `random`, a (1,) tensor that is uniform in [0, strength)."""
    if not random:
        return strength
    return strength * torch.rand(1, generator=generator, device=generator.device)


def offset_strength(strength: float | Tensor, latents: Tensor, adaptive_scale: float | None) -> float | Tensor:
    """Strength of the offset: with an adaptive scale it grows with each channel's |mean|, and it is at least 0."""
    if not adaptive_scale:
        return strength
    channel_mean = latents.mean(dim=tuple(range(2, latents.dim())), keepdim=True).abs()  # B C 1 1
    return (strength + adaptive_scale * channel_mean).clamp(min=0)


def multires_levels(size: tuple[int, int], iterations: int, seed: int) -> list[tuple[int, int]]:
    """Sizes (h, w) of the coarser levels: level i is smaller by r**i, with r drawn uniformly in [2, 4) for each level.

    The factors come from a Python generator: if shapes depended on a device tensor, the host would wait.
    """
    rng = python_rng(seed, "multires noise")
    levels = []
    for i in range(iterations):
        r = 2 + 2 * rng.random()
        levels.append((max(1, int(size[0] / r**i)), max(1, int(size[1] / r**i))))
        if 1 in levels[-1]:  # a side of one pixel: coarser levels would add nothing
            break
    return levels


def add_levels(noise: Tensor, levels: list[Tensor], discount: float) -> Tensor:
    """Multi-resolution noise (Whitaker 2023): noise + discount**i * upsampled level i, scaled to unit deviation."""
    for i, level in enumerate(levels):
        noise = noise + discount**i * F.interpolate(level, size=noise.shape[-2:], mode="bilinear")
    return noise / noise.std()


def make_noise(latents: Tensor, options: DDPMOptions, generator: torch.Generator) -> Tensor:
    """The noise that the model has to predict, B C h w float32.

    Order of the draws: noise, [offset strength], [offset], [levels].
    """
    noise = draw(tuple(latents.shape), generator)
    if options.noise_offset:  # one shift per channel (Guttenberg 2023, "Diffusion with Offset Noise")
        strength = draw_strength(options.noise_offset, options.noise_offset_random_strength, generator)
        offset = draw((*latents.shape[:2], *(1,) * (latents.dim() - 2)), generator)
        noise = noise + offset_strength(strength, latents, options.adaptive_noise_scale) * offset
    if options.multires_noise_iterations:
        height, width = latents.shape[-2:]
        sizes = multires_levels((height, width), options.multires_noise_iterations, generator.initial_seed())
        levels = [draw((*latents.shape[:2], *size), generator) for size in sizes]
        noise = add_levels(noise, levels, options.multires_noise_discount)
    return noise


def perturb(noise: Tensor, options: NoisingOptions, generator: torch.Generator) -> Tensor:
    """Input perturbation (Ning et al. 2023): the noise in the model's input. The target remains `noise`.

    Order of the draws: [strength], perturbation.
    """
    if not options.ip_noise_gamma:
        return noise
    strength = draw_strength(options.ip_noise_gamma, options.ip_noise_gamma_random_strength, generator)
    return noise + strength * draw(tuple(noise.shape), generator)
