# SPDX-License-Identifier: Apache-2.0
"""Frozen Linear weights in 8 or 4 bits: W = stored * scale, made large again at each use and never kept so.

fp8: e4m3 floats (https://arxiv.org/abs/2209.05433), int8: integers, both with one scale per output channel, the row's
largest magnitude / 448 or / 127. nf4: the 16 values of NF4 (https://arxiv.org/abs/2305.14314), one scale per 64
weights, by bitsandbytes. Activations stay as they are; autograd keeps what is stored, not a large copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError

Kind = Literal["fp8", "int8", "nf4"]
Storage = Literal["plain", "half", "fp8", "int8", "nf4"]  # half: see library.memory.precision

ROW_KINDS: dict[str, tuple[torch.dtype, float]] = {  # dtype, and the magnitude that the largest weight of a row gets
    "fp8": (torch.float8_e4m3fn, 448.0),
    "int8": (torch.int8, 127.0),
}
NF4_BLOCK = 64  # weights that share a scale
NF4_VALUES = 16
IN_A_BLOCK = re.compile(r"\.\d+\.")  # a name inside an nn.ModuleList: "transformer_blocks.3.attn.to_q"
EMBEDDER = re.compile(r"embed|guidance")  # in a name: all that a block does hangs on its numbers, and it is small
AT_A_TIME = 1 << 24  # weights that are in float32 while they are quantised


class Stored(NamedTuple):
    """A quantised matrix (out, in)."""

    data: Tensor  # fp8 or int8: (out, in); nf4: uint8, two weights in each, flat
    scale: Tensor  # float32; fp8 and int8: (out,); nf4: one per 64 weights, flat
    code: Tensor | None = None  # nf4: the 16 values, float32


def quantised_names(module: nn.Module) -> list[str]:
    """The Linears that are quantised: those of the repeated blocks. First and last layers, which need more, stay.

    So do those of an embedder that has repeated layers of its own (Chroma's `distilled_guidance_layer`), and a Linear
    that computes in a way of its own (`never_in_float16`).
    """
    plain = {name: child for name, child in module.named_modules() if type(child) is nn.Linear}
    inside = [name for name in plain if IN_A_BLOCK.search(name) and not EMBEDDER.search(name)]
    return [name for name in inside if "forward" not in vars(plain[name])]


def stored_bytes(linear: nn.Linear, kind: Kind) -> int:
    """Bytes of a Linear's weight, with its scales, when it is quantised. Its bias is not counted."""
    rows, columns = linear.out_features, linear.in_features
    if kind in ROW_KINDS:
        return rows * columns + 4 * rows
    return -(-rows * columns // 2) + 4 * -(-rows * columns // NF4_BLOCK) + 4 * NF4_VALUES


def check_available(kind: Kind) -> None:
    """Raises UserError when what a kind needs is not installed."""
    if kind == "nf4":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError("--base_quant nf4 needs bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes.functional


# ---- to fewer bits and back -----------------------------------------------------------------------------------------


@torch.no_grad()
def quantised(weight: Tensor, kind: Kind) -> Stored:
    """A matrix (out, in) in fewer bits, on its device. The arithmetic is float32, some rows at a time."""
    if kind == "nf4":
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            weight = weight.to(torch.bfloat16 if weight.dtype.itemsize == 1 else torch.float32)
        settings = {"blocksize": NF4_BLOCK, "quant_type": "nf4", "compress_statistics": False}
        packed, state = _bitsandbytes().quantize_4bit(weight.contiguous(), **settings)
        return Stored(packed.flatten(), state.absmax, state.code.float())
    dtype, largest = ROW_KINDS[kind]
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    count = max(1, AT_A_TIME // max(1, weight.shape[1]))
    for rows, stored, own in zip(weight.split(count), result.split(count), scale.split(count)):
        part = rows.to(torch.float32, copy=True)
        # a row of zeros has a scale, too: 0 / 0 is none
        own.copy_(part.abs().amax(1) / largest).clamp_(min=torch.finfo(torch.float32).tiny)
        part /= own[:, None]
        stored.copy_(part if dtype.is_floating_point else part.round_())
    return Stored(result, scale)


def dequantised(stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (out, in): stored * scale in float32, rounded to `dtype` once."""
    data, scale, code = stored
    if code is None:
        return data.to(dtype).mul_(scale[:, None])  # 8 bits are exact in every dtype
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=scale, shape=torch.Size(shape), code=code, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
    )
    return functional.dequantize_4bit(data.view(-1, 1), state)


# ---- the layer ------------------------------------------------------------------------------------------------------


def _scales_outputs(stored: Stored, dtype: torch.dtype) -> bool:
    """Whether a scale per row is applied to outputs instead of weights: cheaper, and exact.

    Not in float16: before it, outputs are larger than they are meant to be by 1 / scale, and 65504 is soon reached.
    """
    return stored.code is None and dtype != torch.float16


def _times(x: Tensor, kept: Stored, shape: tuple[int, int], *, transposed: bool) -> Tensor:
    """x W^T, or x W where it is not transposed; before the scale where outputs are scaled."""
    matrix = kept.data.to(x.dtype) if _scales_outputs(kept, x.dtype) else dequantised(kept, shape, x.dtype)
    return F.linear(x, matrix) if transposed else x @ matrix


class _Product(torch.autograd.Function):
    """y = x W^T + b with W made at each use, in the backward pass again. W and b get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *stored: Tensor | None) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape = shape
        kept = Stored(*cast(Any, stored))
        y = _times(x, kept, shape, transposed=True)
        if _scales_outputs(kept, x.dtype):
            y.mul_(kept.scale)  # float32 factors, rounded once
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        kept, (gradient,) = Stored(*ctx.saved_tensors), gradients
        if _scales_outputs(kept, gradient.dtype):
            gradient = (gradient * kept.scale).to(gradient.dtype)
        return _times(gradient, kept, ctx.shape, transposed=False), None, None, None, None, None


# Compiled, these two are opaque. Of an expression, the compiler keeps the large weight for the backward pass: it takes
# whatever both passes multiply with for too dear to be made again.


@torch.library.custom_op("trainyard::quantised_product", mutates_args=())
def _opaque_product(
    x: Tensor, data: Tensor, scale: Tensor, code: Tensor | None, rows: int, columns: int, transposed: bool
) -> Tensor:
    return _times(x, Stored(data, scale, code), (rows, columns), transposed=transposed)


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
    return dequantised(Stored(data, scale, code), (rows, columns), dtype)


@_opaque_dequantised.register_fake
def _(data: Tensor, scale: Any, code: Any, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return data.new_empty(rows, columns, dtype=dtype)


class QuantLinear(nn.Linear):
    """A frozen Linear whose weight is stored in fewer bits, in buffers: `stored`, `scale`, and for nf4 `code`.

    `weight` is made large when it is read: a new tensor each time, so that writing to it changes nothing here.
    """

    stored: Tensor
    scale: Tensor
    code: Tensor | None

    def __init__(self, like: nn.Linear, kind: Kind, stored: Stored, dtype: torch.dtype) -> None:
        """like: sizes and bias. dtype: of `weight`; the layer computes in the dtype of its input."""
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features = like.in_features, like.out_features
        self.kind, self.dtype = kind, dtype
        self.bias = like.bias
        self.register_buffer("stored", stored.data)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("code", stored.code)
        self.train(like.training)

    @classmethod
    def empty(cls, like: nn.Linear, kind: Kind, dtype: torch.dtype) -> QuantLinear:
        """One whose stored tensors are on the meta device."""
        rows, columns = like.out_features, like.in_features
        if kind in ROW_KINDS:
            sizes, smaller = ((rows, columns), (rows,)), ROW_KINDS[kind][0]
            return cls(like, kind, Stored(*_meta(*sizes, dtypes=(smaller, torch.float32))), dtype)
        packed, blocks = -(-rows * columns // 2), -(-rows * columns // NF4_BLOCK)
        dtypes = (torch.uint8, torch.float32, torch.float32)
        return cls(like, kind, Stored(*_meta((packed,), (blocks,), (NF4_VALUES,), dtypes=dtypes)), dtype)

    @property
    def tensors(self) -> Stored:
        return Stored(self.stored, self.scale, self.code)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight (out, in) in `dtype`: a tensor of its own."""
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
        """`to(dtype)` and the like change `dtype`, never how the weight is stored."""
        kept = {id(buffer) for buffer in self.buffers(recurse=False)}

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
    """Put what `make` gives in the place of every Linear of `quantised_names`, one after the other. By name."""
    made = {}
    for name in quantised_names(module):
        parent, _, child = name.rpartition(".")
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        made[name] = make(linear)
        setattr(module.get_submodule(parent), child, made[name])
    return made


def quantise(module: nn.Module, kind: Kind) -> int:
    """Quantise a model that is loaded already, in place, Linear by Linear. Returns how many there are.

    Before adapters are put on it: they hold the Linears that are replaced. Works on the meta device, too.
    """
    check_available(kind)

    def make(linear: nn.Linear) -> QuantLinear:
        dtype = linear.weight.dtype
        if linear.weight.is_meta:
            return QuantLinear.empty(linear, kind, dtype)
        return QuantLinear(linear, kind, quantised(linear.weight, kind), dtype)

    return len(replace_linears(module, make))
