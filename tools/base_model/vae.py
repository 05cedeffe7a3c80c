# SPDX-License-Identifier: Apache-2.0
"""The autoencoder: 128-px pictures to 4 x 16 x 16 latents of unit variance at SD's scaling factor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from .training import Budget, RunningMean, Schedule, Stopwatch, WeightAverage, batches, progress_line

SCALING_FACTOR = 0.18215  # of Stable Diffusion 1.x; loaders that hard-code it must work


@dataclass(frozen=True)
class VaeOptions:
    learning_rate: float = 2e-3
    crops: int = 8  # per step, 64 px: cheap, and on even steps
    whole_pictures: int = 2  # per step, 128 px, on odd steps: the attention sees the real length
    crop_size: int = 64  # pixels
    kl_weight: float = 2e-4
    average_decay: float = 0.99
    polish_rate: float = 1e-3
    polish_batch: int = 2  # whole pictures
    polish_noise: float = 0.05  # of the unit-variance latents: the decoder must bear the denoiser's errors
    seed: int = 0


def build_vae() -> AutoencoderKL:
    """0.6 M parameters. Norms of 8 groups (2 channels each at the finest level) trained far worse than of 2."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=SCALING_FACTOR,
    )
    with torch.no_grad():  # start with a small posterior variance, else noise hides the pictures at first
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -5
    return vae


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Convert pictures, uint8 N h w 3, to float N 3 h w in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 + MSE/2 + L1 of the horizontal and vertical differences/2; the last keeps edges sharp."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_gradients(drawn), _gradients(wanted)))
    return F.l1_loss(drawn, wanted) + 0.5 * F.mse_loss(drawn, wanted) + 0.5 * edges


def vae_loss(
    vae: AutoencoderKL, pictures: Tensor, anchor_weight: float, kl_weight: float, generator: torch.Generator
) -> Tensor:
    """Reconstruction, KL, and the colour anchor: three latents start out as the colours of their 8x8 pixels.

    Without the anchor the encoder is slow to find colours at all: L1 .42 against .33 after 100 steps.
    """
    posterior = vae.encode(pictures).latent_dist
    mean, log_variance = posterior.mean, posterior.logvar
    noise = torch.randn(mean.shape, generator=generator)
    drawn = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    anchor = F.mse_loss(mean[:, :3], 2 * F.avg_pool2d(pictures, 8))
    return reconstruction_loss(drawn, pictures) + kl_weight * kl + anchor_weight * anchor


def _training_batch(pictures: np.ndarray, step: int, options: VaeOptions, rng: np.random.Generator) -> Tensor:
    if step % 2:
        return to_tensor(pictures[rng.integers(0, len(pictures), options.whole_pictures)])
    chosen = pictures[rng.integers(0, len(pictures), options.crops)]
    top, left = rng.integers(0, chosen.shape[1] - options.crop_size + 1, 2)
    return to_tensor(chosen[:, top : top + options.crop_size, left : left + options.crop_size])


def train_vae(pictures: np.ndarray, budget: Budget, options: VaeOptions = VaeOptions()) -> AutoencoderKL:
    """Train on uint8 N 128 128 3, whiten the latents, return the averaged weights."""
    torch.manual_seed(options.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    generator, rng = torch.Generator().manual_seed(options.seed), np.random.default_rng(options.seed)

    def step_loss(step: int, fraction: float) -> tuple[Tensor, int]:
        batch = _training_batch(pictures, step, options, rng).contiguous(memory_format=torch.channels_last)
        return vae_loss(vae, batch, max(0.02, 1 - 3 * fraction), options.kl_weight, generator), len(batch)

    schedule = Schedule(options.learning_rate, warmup_steps=50, decay_share=0.5)
    _optimize("vae", list(vae.parameters()), step_loss, budget, schedule, options.average_decay)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    whiten(vae, pictures[:1000])
    return vae


def polish_decoder(
    vae: AutoencoderKL, pictures: np.ndarray, budget: Budget, options: VaeOptions = VaeOptions()
) -> None:
    """Continue to train the decoder with a fixed encoder: cached latents and the denoiser stay valid."""
    generator, rng = torch.Generator().manual_seed(options.seed), np.random.default_rng(options.seed)
    noise_scale = options.polish_noise / vae.config.scaling_factor
    vae.decoder.to(memory_format=torch.channels_last)

    def step_loss(step: int, fraction: float) -> tuple[Tensor, int]:
        wanted = to_tensor(pictures[rng.integers(0, len(pictures), options.polish_batch)])
        with torch.no_grad():
            latents = vae.encode(wanted).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator)
        return reconstruction_loss(vae.decode(latents + noise_scale * noise).sample, wanted), len(wanted)

    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    schedule = Schedule(options.polish_rate, warmup_steps=50, decay_share=0.7)
    _optimize("polish", parameters, step_loss, budget, schedule, options.average_decay)
    vae.to(memory_format=torch.contiguous_format).eval()


def _optimize(
    stage: str,
    parameters: list[nn.Parameter],
    step_loss: Callable[[int, float], tuple[Tensor, int]],
    budget: Budget,
    schedule: Schedule,
    average_decay: float,
) -> None:
    """AdamW on step_loss(step, fraction), which returns a loss and a number of samples; averages at the end."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    average = WeightAverage(parameters, average_decay)
    watch, losses, step, samples = Stopwatch(), RunningMean(), 0, 0
    while (fraction := budget.fraction(samples, watch.minutes)) < 1:
        loss, count = step_loss(step, fraction)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, fraction)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        step, samples = step + 1, samples + count
        losses.add(loss.item())
        if step % 100 == 0:
            print(progress_line(stage, samples, watch.minutes, fraction, loss=losses.read()), flush=True)
    average.copy_to_parameters()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Latents of pictures: scaled posterior means, N 4 h/8 w/8."""
    parts = [vae.encode(to_tensor(pictures[part])).latent_dist.mean for part in batches(len(pictures), 50)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Fold each latent channel's mean and deviation into the two 1x1 convolutions around the latents.

    With mean m and deviation s, latents become (z - m) k, k = 1 / (0.18215 s): unit variance once scaled.
    """
    latents = encode(vae, pictures) / vae.config.scaling_factor
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    factor = 1 / (vae.config.scaling_factor * deviation)
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:4] *= factor[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) * factor
    before.bias[4:] += 2 * torch.log(factor)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= factor[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, dB."""
    ratios = []
    for part in batches(len(pictures), 50):
        wanted = to_tensor(pictures[part])
        drawn = vae.decode(vae.encode(wanted).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (drawn - wanted).square().mean((1, 2, 3))))
    return torch.cat(ratios).mean().item()
