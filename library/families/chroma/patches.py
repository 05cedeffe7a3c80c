# SPDX-License-Identifier: Apache-2.0
"""What diffusers' transformer does differently from the model that Chroma was trained as, put right.

Hooks only: names, weights and, in float32 and without padding, results are those of diffusers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from library.device import on_device
from library.families.flux.patches import keep_time_exact


def mask_keys_only(denoiser: nn.Module) -> None:
    """Chroma's blocks mask padding as query and as key. Nobody reads its query, and the empty row may become NaN."""

    def keys_only(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")  # B 1 S S: True where neither query nor key is padding
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
    """Install all hooks that Chroma needs."""
    keep_time_exact(denoiser)
    embed_guidance_on_device(denoiser)
    mask_keys_only(denoiser)
