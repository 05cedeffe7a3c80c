# SPDX-License-Identifier: Apache-2.0
"""Frozen Linear weights in 8 or 4 bits: W = stored * scale, dequantised at each use and not kept.

fp8: e4m3 floats (https://arxiv.org/abs/2209.05433), int8: integers, both with one scale per output channel, the row's
largest magnitude / 448 or / 127. nf4: the 16 values of NF4 (https://arxiv.org/abs/2305.14314), one scale per 64
weights, by bitsandbytes. Activations are not quantised; autograd keeps the quantised weight, not a dequantised copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError

QuantKind = Literal["fp8", "int8", "nf4"]
Storage = Literal["plain", "half", "fp8", "int8", "nf4"]  # half: see precision.py

ROW_KINDS: dict[str, tuple[torch.dtype, float]] = {  # dtype, and the stored magnitude of the largest weight in a row
    "fp8": (torch.float8_e4m3fn, 448.0),
    "int8": (torch.int8, 127.0),
}
NF4_BLOCK = 64  # weights that share a scale
NF4_VALUES = 16
IN_A_BLOCK = re.compile(r"\.\d+\.")  # a name inside an nn.ModuleList: "transformer_blocks.3.attn.to_q"
EMBEDDER = re.compile(r"embed|guidance")  # in a name: all blocks depend on its output, and it is small
AT_A_TIME = 1 << 24  # weights that are in float32 at a time while a matrix is quantised


class QuantisedWeight(NamedTuple):
    """A quantised matrix (out, in)."""

    data: Tensor  # fp8 or int8: (out, in); nf4: uint8, two weights in each, flat
    scale: Tensor  # float32; fp8 and int8: (out,); nf4: one per 64 weights, flat
    code: Tensor | None = None  # nf4: the 16 values, float32


def quantised_names(module: nn.Module) -> list[str]:
    """Names of the Linears to quantise: those of the repeated blocks.

    First and last layers need more precision and are left out. So are the layers of an embedder with repeated layers
    (Chroma's `distilled_guidance_layer`) and Linears whose `forward` is replaced (`never_in_float16`).
    """
    plain = {name: child for name, child in module.named_modules() if type(child) is nn.Linear}
    inside = [name for name in plain if IN_A_BLOCK.search(name) and not EMBEDDER.search(name)]
    return [name for name in inside if "forward" not in vars(plain[name])]


def stored_bytes(linear: nn.Linear, kind: QuantKind) -> int:
    """Bytes of a Linear's quantised weight with its scales, without the bias."""
    rows, columns = linear.out_features, linear.in_features
    if kind in ROW_KINDS:
        return rows * columns + 4 * rows
    return -(-rows * columns // 2) + 4 * -(-rows * columns // NF4_BLOCK) + 4 * NF4_VALUES


def check_available(kind: QuantKind) -> None:
    """Raises UserError when a package that this kind needs is not installed."""
    if kind == "nf4":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError("--base_quant nf4 needs bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes.functional


# ---- quantising and dequantising ------------------------------------------------------------------------------------


@torch.no_grad()
def quantised(weight: Tensor, kind: QuantKind) -> QuantisedWeight:
    """Quantise a matrix (out, in) on its device, in float32 arithmetic, some rows at a time."""
    if kind == "nf4":
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            weight = weight.to(torch.bfloat16 if weight.dtype.itemsize == 1 else torch.float32)
        settings = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "compress_statistics": False}
        packed, state = _bitsandbytes().quantize_4bit(weight.contiguous(), **settings)
        return QuantisedWeight(packed.flatten(), state.absmax, state.code.float())
    dtype, largest = ROW_KINDS[kind]
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    count = max(1, AT_A_TIME // max(1, weight.shape[1]))
    for rows, stored, own in zip(weight.split(count), result.split(count), scale.split(count)):
        part = rows.to(torch.float32, copy=True)
        # a row of zeros needs a scale above 0: 0 / 0 is nan
        own.copy_(part.abs().amax(1) / largest).clamp_(min=torch.finfo(torch.float32).tiny)
        part /= own[:, None]
        stored.copy_(part if dtype.is_floating_point else part.round_())
    return QuantisedWeight(result, scale)


def dequantised(stored: QuantisedWeight, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in): stored * scale in float32, rounded once to `dtype`."""
    data, scale, code = stored
    if code is None:
        return data.to(dtype).mul_(scale[:, None])  # the 8-bit values are exact in every dtype
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=scale, shape=torch.Size(shape), code=code, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
    )
    return functional.dequantize_4bit(data.view(-1, 1), state)


# ---- the layer ------------------------------------------------------------------------------------------------------


def _scales_outputs(stored: QuantisedWeight, dtype: torch.dtype) -> bool:
    """Whether row scales are applied to the outputs instead of the weights, which is cheaper and exact.

    Not in float16: unscaled outputs are larger by 1 / scale and may exceed 65504.
    """
    return stored.code is None and dtype != torch.float16


def _times(x: Tensor, kept: QuantisedWeight, shape: tuple[int, int], *, transposed: bool) -> Tensor:
    """x W^T, or x W when `transposed` is False. The scale is left out when it is applied to the outputs."""
    matrix = kept.data.to(x.dtype) if _scales_outputs(kept, x.dtype) else dequantised(kept, shape, x.dtype)
    return F.linear(x, matrix) if transposed else x @ matrix


class _Product(torch.autograd.Function):
    """y = x W^T + b with W dequantised in each pass. W and b get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *stored: Tensor | None) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape = shape
        kept = QuantisedWeight(*cast(Any, stored))
        y = _times(x, kept, shape, transposed=True)
        if _scales_outputs(kept, x.dtype):
            y.mul_(kept.scale)  # float32 factors, rounded once
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        kept, (gradient,) = QuantisedWeight(*ctx.saved_tensors), gradients
        if _scales_outputs(kept, gradient.dtype):
            gradient = (gradient * kept.scale).to(gradient.dtype)
        return _times(gradient, kept, ctx.shape, transposed=False), None, None, None, None, None


# These two are opaque to the compiler. It would keep the dequantised weight for the backward pass, because it considers
# everything that both passes multiply with too expensive to recompute.


@torch.library.custom_op("trainyard::quantised_product", mutates_args=())
def _opaque_product(
    x: Tensor, data: Tensor, scale: Tensor, code: Tensor | None, rows: int, columns: int, transposed: bool
) -> Tensor:
    return _times(x, QuantisedWeight(data, scale, code), (rows, columns), transposed=transposed)


@_opaque_product.register_fake
def _(x: Tensor, data: Any, scale: Any, code: Any, rows: int, columns: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows if transposed else columns)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    _, data, scale, code, ctx.rows, ctx.columns, ctx.transposed = inputs
    ctx.save_for_backward(data, scale, code)


def _product_backward(ctx: Any, gradient: Tensor) -> Any:
    inner = _opaque_product(gradient, *ctx.saved_tensors, ctx.rows, ctx.columns, not ctx.transposed)
    return inner, None, None, None, None, None, None


_opaque_product.register_autograd(_product_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("trainyard::dequantised", mutates_args=())
def _opaque_dequantised(
    data: Tensor, scale: Tensor, code: Tensor | None, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return dequantised(QuantisedWeight(data, scale, code), (rows, columns), dtype)


@_opaque_dequantised.register_fake
def _(data: Tensor, scale: Any, code: Any, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(rows, columns, dtype=dtype)


class QuantLinear(nn.Linear):
    """A frozen Linear with a quantised weight in the parameters `stored`, `scale` and, for nf4, `code`.

    `weight` is dequantised when it is read: a new tensor each time, so writing to it has no effect on the layer.
    """

    stored: Tensor
    scale: Tensor
    code: Tensor | None

    def __init__(self, like: nn.Linear, kind: QuantKind, stored: QuantisedWeight, dtype: torch.dtype) -> None:
        """like: sizes and bias. dtype: of `weight`; the layer computes in the dtype of its input."""
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a weight
        self.in_features, self.out_features = like.in_features, like.out_features
        self.kind, self.dtype = kind, dtype
        self.bias = like.bias
        for name, tensor in (("stored", stored.data), ("scale", stored.scale), ("code", stored.code)):
            # parameters, because only those are split between processes (library.memory.sharding)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.train(like.training)

    @classmethod
    def empty(cls, like: nn.Linear, kind: QuantKind, dtype: torch.dtype) -> QuantLinear:
        """A layer whose stored tensors are on the meta device."""
        rows, columns = like.out_features, like.in_features
        if kind in ROW_KINDS:
            sizes, smaller = ((rows, columns), (rows,)), ROW_KINDS[kind][0]
            return cls(like, kind, QuantisedWeight(*_meta(*sizes, dtypes=(smaller, torch.float32))), dtype)
        packed, blocks = -(-rows * columns // 2), -(-rows * columns // NF4_BLOCK)
        dtypes = (torch.uint8, torch.float32, torch.float32)
        return cls(like, kind, QuantisedWeight(*_meta((packed,), (blocks,), (NF4_VALUES,), dtypes=dtypes)), dtype)

    @property
    def tensors(self) -> QuantisedWeight:
        return QuantisedWeight(self.stored, self.scale, self.code)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight (out, in) in `dtype`, a new tensor."""
        with torch.no_grad():
            if torch.compiler.is_compiling():
                return _opaque_dequantised(*self.tensors, *self.shape, self.dtype)
            return dequantised(self.tensors, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self._product(x)
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        kept = self.tensors
        if not torch.compiler.is_compiling():
            return cast(Tensor, _Product.apply(x, bias, self.shape, *kept))
        y = _opaque_product(x, *kept, *self.shape, True)
        if _scales_outputs(kept, x.dtype):
            y = y * kept.scale
        return (y if bias is None else y + bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """`to(dtype)` and the like change `dtype`, but not the stored weight."""
        kept = {id(tensor) for tensor in self.tensors}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in kept or moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.stored.device)).dtype
        super()._apply(move, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


def _meta(*sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    return [torch.empty(size, dtype=dtype, device="meta") for size, dtype in zip(sizes, dtypes, strict=True)]


# ---- whole models ---------------------------------------------------------------------------------------------------


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], QuantLinear]) -> dict[str, QuantLinear]:
    """Replace every Linear of `quantised_names` by what `make` returns, one after the other. Returns them by name."""
    made = {}
    for name in quantised_names(module):
        parent, _, child = name.rpartition(".")
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        made[name] = make(linear)
        setattr(module.get_submodule(parent), child, made[name])
    return made


def quantise(module: nn.Module, kind: QuantKind) -> int:
    """Quantise a loaded model in place, Linear by Linear. Returns the number of quantised Linears.

    Call it before adapters are attached: they refer to the Linears that are replaced. Also works on the meta device.
    """
    check_available(kind)

    def make(linear: nn.Linear) -> QuantLinear:
        dtype = linear.weight.dtype
        if linear.weight.is_meta:
            return QuantLinear.empty(linear, kind, dtype)
        return QuantLinear(linear, kind, quantised(linear.weight, kind), dtype)

    return len(replace_linears(module, make))
