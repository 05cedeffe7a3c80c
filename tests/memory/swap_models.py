# SPDX-License-Identifier: Apache-2.0
"""Tiny denoisers of real classes with their blocks and a loss, for the tests of block swap and hoisting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Sample:
    """A denoiser, its blocks in the order of execution, and what a training loss of it is for a seed."""

    denoiser: nn.Module
    blocks: list[nn.Module]
    loss: Callable[[int], Tensor]


def flux() -> Sample:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def loss(seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        random = lambda *size: torch.randn(*size, generator=draw)
        pred = denoiser(
            random(2, 12, 8), random(2, 5, 24), random(2, 16), torch.tensor([0.3, 0.8]), torch.zeros(12, 3),
            torch.zeros(5, 3), torch.ones(2), return_dict=False,
        )[0]  # fmt: skip
        return (pred.float() - random(*pred.shape)).square().mean()

    blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
    return Sample(denoiser.requires_grad_(False), blocks, loss)


def sd3() -> Sample:
    """The first two blocks as in SD3.5 medium (dual attention), the last without text of its own."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    denoiser = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm",
    )  # fmt: skip

    def loss(seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        random = lambda *size: torch.randn(*size, generator=draw)
        pred = denoiser(
            random(2, 4, 8, 8), random(2, 5, 24), random(2, 16), torch.tensor([300.0, 800.0]), return_dict=False
        )[0]
        return (pred.float() - random(*pred.shape)).square().mean()

    return Sample(denoiser.requires_grad_(False), [*denoiser.transformer_blocks], loss)


def unet() -> Sample:
    """An SDXL-shaped U-Net; its blocks are residual blocks, transformer blocks, down- and upsamplers."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip

    def loss(seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        random = lambda *size: torch.randn(*size, generator=draw)
        more = {"text_embeds": random(2, 16), "time_ids": torch.ones(2, 6)}
        x = random(2, 4, 8, 8)
        pred = denoiser(x, torch.tensor([10, 500]), random(2, 7, 16), added_cond_kwargs=more).sample
        return (pred.float() - random(*pred.shape)).square().mean()

    kinds = ("ResnetBlock2D", "BasicTransformerBlock", "Downsample2D", "Upsample2D")
    seen: list[nn.Module] = []
    chosen = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    handles = [m.register_forward_pre_hook(lambda module, _: seen.append(module)) for m in chosen]
    with torch.no_grad():
        loss(0)
    for handle in handles:
        handle.remove()
    return Sample(denoiser.requires_grad_(False), seen, loss)


def stack(count: int = 6, width: int = 8) -> Sample:
    """Equal small blocks with a buffer each: for counting."""
    torch.manual_seed(0)
    blocks = [Residual(width * (1 + i % 2), width) for i in range(count)]
    denoiser = nn.Sequential(*blocks)

    def loss(seed: int) -> Tensor:
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
        return denoiser(x).square().mean()

    return Sample(denoiser.requires_grad_(False), blocks, loss)


class Residual(nn.Module):
    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)
        self.register_buffer("shift", torch.randn(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x + self.shift)))


MODELS: dict[str, Callable[[], Sample]] = {"flux": flux, "sd3": sd3, "unet": unet}


def recompute(block: nn.Module) -> None:
    """Recompute this block's activations in the backward pass."""
    forward = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)  # type: ignore[method-assign]
