# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights for the tests of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DATA = Path(__file__).parent.parent / "data_files" / "adapters"


def read_json(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def tiny_unet(seed: int = 0, **changes: Any) -> nn.Module:
    """A Stable Diffusion U-Net of 8 and 16 channels, frozen, in eval mode."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    config = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16,
        "attention_head_dim": 4, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**(config | changes)).requires_grad_(False).eval()


def tiny_clip(seed: int = 0) -> nn.Module:
    """A CLIP text encoder of width 16 with two layers, frozen, in eval mode."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        bos_token_id=48, eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    return CLIPTextModel(config).requires_grad_(False).eval()


def unet_inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text states for `tiny_unet`."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    return latents, torch.tensor([10, 500][:batch]), torch.randn(batch, 7, 16, generator=generator)


def run_unet(unet: nn.Module) -> Tensor:
    return unet(*unet_inputs()).sample


def randomize(network: nn.Module, seed: int = 3, size: float = 0.4) -> None:
    """Move every parameter by a random value (single numbers by 0.7), so that nothing is at its start value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(size * noise if parameter.dim() else 0.7)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
