# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x and 2.x for the contract tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from library.types import Batch
from tests.families.base import Case
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import Adapters, with_lora


def make(folder: Path, **variants: Any) -> dict[str, Any]:
    """The options that name a tiny model; `variants` as `make_tiny_sd` has them."""
    return {"pretrained_model_name_or_path": make_tiny_sd(folder, **variants)}


def loss(options: dict[str, Any], batch: Batch, adapters: Adapters, generator: torch.Generator) -> Tensor:
    """diffusers and transformers as their users call them. Draws: timesteps, then noise."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = options["pretrained_model_name_or_path"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    ids = tokenizer(batch.captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    inner = "" if "text_model" in dict(encoder.named_children()) else "text_model."
    weights = with_lora(encoder, adapters, lambda path: f"lora_te_{inner}{path}".replace(".", "_"))
    states = functional_call(encoder, weights, (ids,)).last_hidden_state
    with torch.no_grad():
        posterior = vae.encode(batch.pixels).latent_dist
    shape = posterior.mean.shape[1:]
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in batch.latent_seeds]
    latents = (posterior.mean + posterior.std * torch.stack(draws)) * vae.config.scaling_factor

    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, t)
    weights = with_lora(unet, adapters, lambda path: f"lora_unet_{path}".replace(".", "_"))
    if batch.reference_pixels:  # InstructPix2Pix
        with torch.no_grad():
            noisy = torch.cat([noisy, vae.encode(batch.reference_pixels[0]).latent_dist.mode()], 1)
        weights["conv_in.weight"] = wider(weights["conv_in.weight"]) + adapters["lora_unet_conv_in.diff"]
    pred = functional_call(unet, weights, (noisy, t, states)).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    return F.mse_loss(pred, scheduler.get_velocity(latents, noise, t) if is_v else noise)


def wider(weight: Tensor) -> Tensor:
    """A convolution's weight with eight input channels, the new ones zero."""
    return F.pad(weight, (0, 0, 0, 0, 0, 8 - weight.shape[1]))


CONV = {"network_args": ["conv_dim=16", "conv_alpha=16"]}
CASES: dict[str, Case] = {
    "sd1": Case("sd", make, loss, overfit=CONV),
    "sd2 v": Case(
        "sd",
        lambda folder: make(folder, version=2, v_prediction=True),
        loss,
        {"v2": True, "v_parameterization": True},
        overfit=CONV,
    ),
}
