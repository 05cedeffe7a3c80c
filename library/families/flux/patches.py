# SPDX-License-Identifier: Apache-2.0
"""What diffusers' transformers do differently from the models that FLUX.1 and Chroma were trained as, put right.

Hooks only: names, weights and, in float32, results are those of diffusers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

TIMESTEPS = 1000  # the model embeds noise levels of 0..1 as 0..1000


def keep_time_exact(denoiser: nn.Module, name: str = "time_text_embed") -> None:
    """Let the submodule `name` embed the time in float32. diffusers rounds it to the dtype of the tokens first.

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

    embedder = denoiser.get_submodule(name)
    denoiser.register_forward_pre_hook(remember, with_kwargs=True)
    embedder.register_forward_pre_hook(restore)
    embedder.register_forward_hook(as_before)
