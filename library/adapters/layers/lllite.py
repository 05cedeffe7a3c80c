# SPDX-License-Identifier: Apache-2.0
"""ControlNet-LLLite: small networks that change a layer's input, by what they see in a control image.

Each q, k, v of self-attention and each q of cross-attention gets a small network that looks at a control image c and
changes the layer's INPUT x (tokens, B n width), so that the layer computes W (x + multiplier * change):

    e = conditioning1(c)                                            B n cond_emb_dim: convolutions, ReLU between them
    change = up(dropout(relu(mid([e, relu(down(x))]))))             down, mid, up: Linear; up starts at zero

The convolutions have no overlap and bring the control image from full size to one vector per token: their strides
multiply to the pixels per token (8 at the latent's size, 16 and 32 further down). Only the way down and the middle of
the U-Net are controlled. Keys are `lllite_unet_<published path, _ for .>.<part>.<index>.{weight,bias}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer, add_scaled
from library.adapters.formats.adapter_files import by_module
from library.adapters.kind import AdapterKind
from library.adapters.layer_network import LayerNetwork
from library.adapters.target_spec import TargetSpec
from library.errors import UserError
from library.options import at_least, between, option

PREFIX = "lllite_unet"  # of layers in files
DEFAULT_DIM = 64
DEFAULT_COND_EMB_DIM = 32
NO_MERGE = "ControlNet-LLLite cannot be merged into a model: what it changes depends on the control image"


@dataclass(frozen=True)
class LLLiteNetworkOptions:
    """--network_args of ControlNet-LLLite."""

    cond_emb_dim: int | None = option(None, help="Numbers per token that the control image becomes.", check=at_least(2))
    dropout: float | None = option(
        None, help="Another name of --network_dropout: drop elements before the up matrix.", check=between(0, 0.999)
    )


@dataclass(frozen=True)
class LLLiteSettings:
    """How a layer is built. cond_emb_dim: numbers per token that the control image becomes."""

    cond_emb_dim: int = DEFAULT_COND_EMB_DIM
    dropout: float = 0.0


# ---- one layer ----------------------------------------------------------------------------------------------------


def conv_strides(stride: int) -> list[int]:
    """Kernel sizes and strides of conditioning1: fours, and a two at the end where needed."""
    found = [4]
    while (rest := stride // math.prod(found)) > 1:
        found.append(min(4, rest))
    return found


class LLLiteLayer(AdapterLayer):
    """The control of one Linear layer. Without a control image it changes nothing."""

    marks: ClassVar[set[str]] = {"conditioning1.0.weight", "down.0.weight", "mid.0.weight", "up.0.weight"}
    saved: ClassVar[tuple[str, ...]] = tuple(
        f"{part}.{tensor}"
        for part in ("conditioning1.0", "conditioning1.2", "conditioning1.4", "down.0", "mid.0", "up.0")
        for tensor in ("weight", "bias")
    )

    def __init__(self, target: TargetSpec, *, rank: int, settings: LLLiteSettings):
        super().__init__(target)
        self.settings, cond_emb_dim = settings, settings.cond_emb_dim
        module = target.modules[0].module
        assert isinstance(module, nn.Linear)
        width = module.in_features
        strides = conv_strides(target.stride)
        channels = [3, *[cond_emb_dim // 2] * (len(strides) - 1), cond_emb_dim]
        convolutions = [nn.Conv2d(a, b, s, s) for a, b, s in zip(channels, channels[1:], strides)]
        parts: list[nn.Module] = [convolutions[0]]
        for convolution in convolutions[1:]:
            parts += [nn.ReLU(), convolution]
        self.conditioning1 = nn.Sequential(*parts)
        self.down = nn.Sequential(nn.Linear(width, rank), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(cond_emb_dim + rank, rank), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(rank, width))
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)
        self.control: Tensor | None = None  # B 3 H W in [-1, 1]

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: LLLiteSettings) -> AdapterLayer:
        """A layer of the sizes that a file's tensors have."""
        rank = tensors["down.0.weight"].shape[0]
        cond_emb_dim = tensors["mid.0.weight"].shape[1] - rank
        if cond_emb_dim < 2:
            raise UserError(f"{target.name}: mid.0.weight and down.0.weight do not belong together")
        return cls(target, rank=rank, settings=replace(settings, cond_emb_dim=cond_emb_dim))

    def named_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    # ---- at work

    def attach(self) -> None:
        """Hook into the layer, whose input is then changed as long as there is a control image."""
        if not self._handles:
            self._handles = [self.target.modules[0].module.register_forward_pre_hook(self._change_input)]

    def _change_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.enabled or self.control is None:
            return None
        x = args[0]
        return add_scaled(x, self.delta(x).to(x.dtype), self.multiplier), *args[1:]

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """The change of the input x (B n width), before the multiplier, computed in the dtype of x or of autocast."""
        assert self.control is not None
        inner = F.relu(_linear(self.down[0], x))
        seen = self.embedded(self.control.to(x.dtype))
        seen = seen.repeat(len(x) // len(seen), 1, 1)  # previews: the prompt and its negative see one control image
        inner = F.relu(_linear(self.mid[0], torch.cat([seen.to(inner.dtype), inner], dim=-1)))
        if self.settings.dropout:
            inner = F.dropout(inner, self.settings.dropout, self.training)
        return _linear(self.up[0], inner)

    def embedded(self, control: Tensor) -> Tensor:
        """Embed control images B 3 H W as B n cond_emb_dim, with sides padded to multiples of the stride."""
        height, width = (-side % self.target.stride for side in control.shape[-2:])
        if height or width:
            control = F.pad(control, (0, width, 0, height), mode="replicate")
        for part in self.conditioning1:
            if isinstance(part, nn.Conv2d):
                weight, bias = part.weight.to(control.dtype), _bias(part).to(control.dtype)
                control = F.conv2d(control, weight, bias, stride=part.stride)
            else:
                control = part(control)
        return rearrange(control, "b c h w -> b (h w) c")

    def merged_weight(self, index: int = 0) -> Tensor:
        raise UserError(NO_MERGE)


def _bias(part: nn.Linear | nn.Conv2d) -> Tensor:
    assert part.bias is not None
    return part.bias


def _linear(part: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(part, nn.Linear)
    return F.linear(x, part.weight.to(x.dtype), _bias(part).to(x.dtype))


def sizes_of(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(cond_emb_dim, network_dim) of a file's tensors; None for other kinds of adapters."""
    for own in by_module(tensors).values():
        if not LLLiteLayer.claims(set(own)):
            return None
        rank = own["down.0.weight"].shape[0]
        return own["mid.0.weight"].shape[1] - rank, rank
    return None


# ---- the network --------------------------------------------------------------------------------------------------


class LLLiteNetwork(LayerNetwork):
    """All controlled layers; each sees the same control images."""

    def set_condition(self, control: Tensor | None) -> None:
        for layer in self.named_layers().values():
            assert isinstance(layer, LLLiteLayer)
            layer.control = control

    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        raise UserError(NO_MERGE)


def lllite_settings(options: Mapping[str, Any], neuron_dropout: float | None) -> LLLiteSettings:
    """The options of a layer. Raises UserError when --network_dropout is given twice with two values."""
    own: LLLiteNetworkOptions = options["lllite"]
    if neuron_dropout is not None and own.dropout is not None and neuron_dropout != own.dropout:
        raise UserError(f"--network_args: dropout={own.dropout} is --network_dropout, which is {neuron_dropout}")
    return LLLiteSettings(own.cond_emb_dim or DEFAULT_COND_EMB_DIM, neuron_dropout or own.dropout or 0.0)


LLLITE = AdapterKind(
    options={"lllite": LLLiteNetworkOptions},
    readers=(LLLiteLayer,),
    settings=lllite_settings,
    make=lambda target, rank, alpha, settings: LLLiteLayer(target, rank=rank, settings=settings),
    sizes=lambda dim, alpha: (DEFAULT_DIM if dim is None else dim, 1.0),  # there is no alpha
    prefix=PREFIX,
    decided_by_file=("cond_emb_dim",),
    in_file="comes from {file}; leave it out",
    reads_every_kind=False,
    network=LLLiteNetwork,
)
