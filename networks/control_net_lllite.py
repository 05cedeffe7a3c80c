# SPDX-License-Identifier: Apache-2.0
"""--network_module networks.control_net_lllite: ControlNet-LLLite for U-Nets (Stable Diffusion 1.x, 2.x and XL).

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer, add_scaled
from library.adapters.adapter_network import AdapterNetwork
from library.adapters.build import network_from_weights, weights_of
from library.adapters.formats.conversion import by_module
from library.adapters.layer_network import LayerNetwork, RateRules
from library.adapters.options import read_network_args
from library.adapters.target_spec import TargetModule, TargetSpec
from library.adapters.targets import TextEncoders
from library.errors import UserError
from library.families.sd.names import unet_module_names
from library.options import at_least, between, option

CONDITIONED = True  # the network looks at control images, and changes the denoiser only

PREFIX = "lllite_unet"
LATENT_FACTOR = 8  # pixels per latent pixel along one side
CONTROLLED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")  # in this order within each transformer block
DEFAULT_DIM = 64
DEFAULT_COND_EMB_DIM = 32
NO_MERGE = "ControlNet-LLLite cannot be merged into a model: what it changes depends on the control image"


@dataclass(frozen=True)
class LLLiteOptions:
    """--network_args of ControlNet-LLLite."""

    cond_emb_dim: int = option(
        DEFAULT_COND_EMB_DIM, help="Numbers per token that the control image becomes.", check=at_least(2)
    )
    dropout: float | None = option(
        None, help="Another name of --network_dropout: drop elements before the up matrix.", check=between(0, 0.999)
    )


@dataclass(frozen=True)
class LLLiteSettings:
    """How one layer is built. stride: pixels per token along one side."""

    stride: int
    dropout: float = 0.0


# ---- which layers ---------------------------------------------------------------------------------------------------


def lllite_targets(unet: nn.Module) -> dict[str, tuple[TargetSpec, int]]:
    """Published name -> (target, stride) of every layer that is controlled, in the order of the blocks."""
    found: dict[str, tuple[TargetSpec, int]] = {}
    modules = dict(unet.named_modules())
    for published, ours, stride in _attention_blocks(unet):
        for path in _controlled_paths(modules[ours]):
            name = f"{PREFIX}_{published}.{path}".replace(".", "_")
            target = TargetModule(f"{ours}.{path}", modules[f"{ours}.{path}"])
            found[name] = (TargetSpec(name, (target,), "denoiser"), stride)
    return found


def _attention_blocks(unet: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(published name, our name, stride) of the attention blocks on the way down and in the middle."""
    stride = LATENT_FACTOR
    for name in unet_module_names(unet):
        if name.published.startswith("input_blocks.") and name.published.endswith(".op"):
            stride *= 2
        elif ".attentions." in name.ours[0] and name.published.startswith(("input_blocks.", "middle_block.")):
            yield name.published, name.ours[0], stride


def _controlled_paths(block: nn.Module) -> Iterator[str]:
    transformer_blocks = block.get_submodule("transformer_blocks")
    for index, _ in transformer_blocks.named_children():
        yield from (f"transformer_blocks.{index}.{path}" for path in CONTROLLED)


def conv_strides(stride: int) -> list[int]:
    """The kernel sizes (and strides) of conditioning1: fours, and a two at the end where one is needed."""
    found = [4]
    while (rest := stride // math.prod(found)) > 1:
        found.append(min(4, rest))
    return found


# ---- one layer ------------------------------------------------------------------------------------------------------


class LLLiteLayer(AdapterLayer):
    """The control of one Linear layer. Without a control image it changes nothing."""

    saved: ClassVar[tuple[str, ...]] = tuple(
        f"{part}.{tensor}"
        for part in ("conditioning1.0", "conditioning1.2", "conditioning1.4", "down.0", "mid.0", "up.0")
        for tensor in ("weight", "bias")
    )

    def __init__(self, target: TargetSpec, *, rank: int, cond_emb_dim: int, settings: LLLiteSettings):
        super().__init__(target)
        self.settings = settings
        module = target.modules[0].module
        assert isinstance(module, nn.Linear)
        width = module.in_features
        strides = conv_strides(settings.stride)
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

    @staticmethod
    def claims(names: set[str]) -> bool:
        """Whether a module with these tensors in a file is a ControlNet-LLLite."""
        return {"conditioning1.0.weight", "down.0.weight", "mid.0.weight", "up.0.weight"} <= names

    @classmethod
    def from_tensors(
        cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Mapping[str, LLLiteSettings]
    ) -> AdapterLayer:
        """A layer as large as a file's tensors. settings: by published name."""
        rank = tensors["down.0.weight"].shape[0]
        cond_emb_dim = tensors["mid.0.weight"].shape[1] - rank
        if cond_emb_dim < 2:
            raise UserError(f"{target.name}: mid.0.weight and down.0.weight do not belong together")
        return cls(target, rank=rank, cond_emb_dim=cond_emb_dim, settings=settings[target.name])

    def named_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    # ---- at work

    def attach(self) -> None:
        """From now on the layer's input is changed, as long as there is a control image."""
        if not self._handles:
            self._handles = [self.target.modules[0].module.register_forward_pre_hook(self._change_input)]

    def _change_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.enabled or self.control is None:
            return None
        x = args[0]
        return add_scaled(x, self.delta(x).to(x.dtype), self.multiplier), *args[1:]

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """What is added to the input x (B n width), before the multiplier. Computed in x's dtype, or in autocast's."""
        assert self.control is not None
        inner = F.relu(_linear(self.down[0], x))
        seen = self.embedded(self.control.to(x.dtype))
        seen = seen.repeat(len(x) // len(seen), 1, 1)  # previews: the prompt and its negative see one control image
        inner = F.relu(_linear(self.mid[0], torch.cat([seen.to(inner.dtype), inner], dim=-1)))
        if self.settings.dropout:
            inner = F.dropout(inner, self.settings.dropout, self.training)
        return _linear(self.up[0], inner)

    def embedded(self, control: Tensor) -> Tensor:
        """B 3 H W as B n cond_emb_dim. Sides that are no multiple of the stride get as many tokens as the U-Net has."""
        height, width = (-side % self.settings.stride for side in control.shape[-2:])
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
    """(cond_emb_dim, network_dim) of a file's tensors; None when they are no ControlNet-LLLite."""
    for own in by_module(tensors).values():
        if not LLLiteLayer.claims(set(own)):
            return None
        rank = own["down.0.weight"].shape[0]
        return own["mid.0.weight"].shape[1] - rank, rank
    return None


# ---- the network ----------------------------------------------------------------------------------------------------


class LLLiteNetwork(LayerNetwork):
    """All controlled layers; each sees the same control images."""

    def set_condition(self, control: Tensor | None) -> None:
        for layer in self.named_layers().values():
            assert isinstance(layer, LLLiteLayer)
            layer.control = control

    def merge_into(self, *, dtype: torch.dtype | None = None) -> None:
        raise UserError(NO_MERGE)


def _settings(options: LLLiteOptions, neuron_dropout: float | None, stride: int) -> LLLiteSettings:
    if neuron_dropout is not None and options.dropout is not None and neuron_dropout != options.dropout:
        raise UserError(f"--network_args: dropout={options.dropout} is --network_dropout, which is {neuron_dropout}")
    return LLLiteSettings(stride, neuron_dropout or options.dropout or 0.0)


def _known_unet(unet: nn.Module | None) -> nn.Module:
    """The U-Net. Raises UserError for a model that is none."""
    if unet is None or "down_blocks" not in dict(unet.named_children()):
        raise UserError("--network_module networks.control_net_lllite: this model has no U-Net (SD 1.x, 2.x and XL do)")
    return unet


ARGUMENTS: dict[str, type] = {"lllite": LLLiteOptions}


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """A new ControlNet-LLLite, not yet attached. `kwargs` are --network_args. There is no alpha. Raises UserError."""
    options: LLLiteOptions = read_network_args(ARGUMENTS, kwargs)["lllite"]
    rank = DEFAULT_DIM if network_dim is None else network_dim
    layers = [
        LLLiteLayer(
            target,
            rank=rank,
            cond_emb_dim=options.cond_emb_dim,
            settings=_settings(options, neuron_dropout, stride),
        )
        for target, stride in lllite_targets(_known_unet(unet)).values()
    ]
    return LLLiteNetwork(layers, multiplier=multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: nn.Module | None,
    text_encoder: TextEncoders,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """A ControlNet-LLLite with the layers, sizes and values of a file (or of `weights_sd`), and its tensors."""
    options: LLLiteOptions = read_network_args(ARGUMENTS, kwargs)["lllite"]
    if "cond_emb_dim" in kwargs:
        raise UserError(f"--network_args: cond_emb_dim: comes from {file}; leave it out")
    known = lllite_targets(_known_unet(unet))
    made = network_from_weights(
        [target for target, _ in known.values()],
        (LLLiteLayer,),
        weights := weights_of(file, weights_sd),
        settings={name: _settings(options, neuron_dropout, stride) for name, (_, stride) in known.items()},
        rates=RateRules(),
        multiplier=multiplier,
        file=str(file or "adapter weights"),
    )
    network = LLLiteNetwork(made.named_layers().values(), multiplier=multiplier)
    if for_inference:
        network.requires_grad_(False).eval()
    return network, weights
