# SPDX-License-Identifier: Apache-2.0
"""What the transformers of diffusers do differently from the models that FLUX.1 and Chroma were trained as, put right.

Hooks only: names, weights and, in float32 and without padding, results are those of diffusers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from library.device import on_device

TIMESTEPS = 1000  # the model embeds noise levels of 0..1 as 0..1000


def keep_time_exact(denoiser: nn.Module) -> None:
    """Embed the time in float32. diffusers rounds it to the dtype of the tokens first.

    Of 900, 901 ... 910, bfloat16 leaves 4 different times, and the noise that is in the latents is another than the
    model is told.
    """
    seen: dict[str, Any] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["time"] = kwargs["timestep"]

    def restore(module: nn.Module, args: Any) -> Any:
        seen["dtype"] = args[0].dtype
        return (seen["time"].float() * TIMESTEPS, *args[1:])

    def as_before(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        return result.to(seen["dtype"])

    embedder = denoiser.get_submodule("time_text_embed")
    denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    embedder.register_forward_pre_hook(restore)
    embedder.register_forward_hook(as_before)


def mask_keys_only(denoiser: nn.Module) -> None:
    """Chroma's blocks mask padding as query and as key. Nobody reads its query, and the empty row may become NaN."""

    def keys_only(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")  # B 1 S S: query and key are no padding
        return args, kwargs if mask is None else {**kwargs, "attention_mask": mask.any(-2, keepdim=True)}

    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        for block in denoiser.get_submodule(blocks).children():
            block.get_submodule("attn").register_forward_pre_hook(keys_only, with_kwargs=True)


def embed_guidance_on_device(denoiser: nn.Module) -> None:
    """Embed Chroma's guidance where the model is. diffusers does so on the host, which then waits for the copy."""
    seen: dict[str, Any] = {}

    def remember(module: nn.Module, args: Any) -> None:
        seen["device"] = args[0].device

    def move(module: nn.Module, args: Any) -> Any:
        return (on_device(args[0], seen["device"]), *args[1:])

    embedder = denoiser.get_submodule("time_text_embed")
    embedder.register_forward_pre_hook(remember)
    embedder.get_submodule("guidance_proj").register_forward_pre_hook(move)


def patch_chroma(denoiser: nn.Module) -> None:
    """All of it that Chroma needs."""
    keep_time_exact(denoiser)
    embed_guidance_on_device(denoiser)
    mask_keys_only(denoiser)
