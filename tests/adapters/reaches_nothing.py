# SPDX-License-Identifier: Apache-2.0
"""Third-party network modules that fail: one finds no layer, others raise what --network_args `raises` names, where."""

from __future__ import annotations

import builtins
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """It has a weight, but puts it on nothing but what `on` names."""

    def __init__(self, text_encoder: Any, unet: nn.Module, on: str, error: BaseException | None, where: str):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.on, self.error, self.where = on, error, where

    def fail(self, where: str) -> None:
        if self.error is not None and where == self.where:
            raise self.error

    def apply_to(self, text_encoder: Any, unet: nn.Module, train_text_encoder: bool, train_unet: bool) -> None:
        self.fail("apply_to")
        for name, module in unet.named_modules():
            if self.on and name.startswith(self.on) and isinstance(module, nn.Linear):
                module.forward = self.around(module.forward)  # type: ignore[method-assign]

    def around(self, forward: Any) -> Any:
        def changed(x: Tensor) -> Tensor:
            self.fail("forward")
            return forward(x) + self.weight

        return changed

    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, learning_rate: Any) -> list[dict[str, Any]]:
        self.fail("prepare_optimizer_params")
        return [{"params": [self.weight], "lr": learning_rate}]

    def load_weights(self, file: str) -> None:
        self.fail("load_weights")

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        self.fail("save_weights")
        save_file({"lora_unet_x.lora_down.weight": self.weight.detach()}, file)


def create_network(
    multiplier: float, network_dim: Any, network_alpha: Any, vae: Any, text_encoder: Any, unet: nn.Module,
    neuron_dropout: Any = None, on: str = "", raises: str = "", where: str = "create_network",
) -> Network:  # fmt: skip
    error = getattr(builtins, raises)("two\nlines") if raises else None
    network = Network(text_encoder, unet, on, error, where)
    network.fail("create_network")
    return network
