# SPDX-License-Identifier: Apache-2.0
"""LoHa (FedPara, arXiv:2108.06098): ΔW = (w1_a · w1_b) ∘ (w2_a · w2_b), elementwise, so of rank up to rank².

A 3x3 convolution keeps its kernel in the columns of w1_b and w2_b, or with use_tucker in t1 and t2 (rank, rank, kh,
kw); then w1_a is (rank, out) and w1_b (rank, in). Names and shapes are those of LyCORIS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.kind import AdapterKind
from library.adapters.layers.factor import FactorLayer, FactorOptions, FactorSettings, factor_values
from library.adapters.layers.norm import NormLayer
from library.adapters.layers.ranked import axis_in
from library.adapters.layers.weight import applied
from library.adapters.options import DropoutOptions, PatternOptions
from library.adapters.target_spec import TargetSpec

PAIRS = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


class LoHaLayer(FactorLayer):
    """The modules of a target share the columns' factors and split the rows of w1_a and w2_a."""

    marks: ClassVar[set[str]] = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    saved: ClassVar[tuple[str, ...]] = ("alpha", "dora_scale", *(name for pair in PAIRS for name in pair))
    first: ClassVar[tuple[str, ...]] = ("hada_w1_a",)
    length_is_rank: ClassVar[str | None] = "hada_w1_b"

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: FactorSettings | None = None):
        settings = settings or FactorSettings()
        super().__init__(target, rank=rank, alpha=alpha, settings=settings)
        columns = self.inputs if self.tucker else self.inputs * math.prod(self.kernel)
        rows = (rank, target.width) if self.tucker else (target.width, rank)
        # as LyCORIS draws them: one factor is 0, unless a learned number that is 0 stands before all
        self.hada_w1_a = nn.Parameter(torch.randn(rows) * 0.1)
        self.hada_w1_b = nn.Parameter(torch.randn(rank, columns))
        self.hada_w2_a = nn.Parameter(torch.randn(rows) * 0.1 if settings.scalar else torch.zeros(rows))
        self.hada_w2_b = nn.Parameter(torch.randn(rank, columns))
        core = (rank, rank, *self.kernel)
        self.hada_t1 = nn.Parameter(torch.randn(core) * 0.1) if self.tucker else None
        self.hada_t2 = nn.Parameter(torch.randn(core) * 0.1) if self.tucker else None

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: FactorSettings) -> AdapterLayer:
        """A layer of the form and rank that a file's tensors have."""
        settings = replace(settings, tucker="hada_t1" in tensors, dora=axis_in(tensors), rs_lora=False)
        rank = len(tensors["hada_w1_b"])
        return cls(target, rank=rank, alpha=rank, settings=settings)

    # ---- the change ------------------------------------------------------------------------------------------------

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """ΔW x. ΔW is as large as the weight, so the backward pass recomputes it."""

        def product() -> Tensor:
            weight = self._change(index, self.hada_w1_a.dtype).to(x.dtype)
            return applied(weight, x, self.target.modules[index].module)

        if torch.is_grad_enabled():
            delta = checkpoint(product, use_reentrant=False, preserve_rng_state=False)
        else:
            delta = product()
        return self.drop_rows(self.factored(delta), index)

    def delta_weight(self, index: int = 0) -> Tensor:
        return self.factored(self._change(index, torch.float32))

    def _change(self, index: int, dtype: torch.dtype) -> Tensor:
        """ΔW of module `index` without the learned scalar, computed in `dtype`."""
        rows = self.target.own_rows(index)
        first, second = (self._half(a.to(dtype), b.to(dtype), core, rows) for a, b, core in self._pairs())
        return (first * second).reshape(self.target.modules[index].shape)

    def _pairs(self) -> tuple[tuple[Tensor, Tensor, Tensor | None], ...]:
        return (self.hada_w1_a, self.hada_w1_b, self.hada_t1), (self.hada_w2_a, self.hada_w2_b, self.hada_t2)

    def _half(self, a: Tensor, b: Tensor, core: Tensor | None, rows: slice) -> Tensor:
        """One of the two factors of the elementwise product, for these rows: (rows, in, kh, kw) or (rows, columns)."""
        if core is None:
            return a[rows] @ b
        return torch.einsum("rshw,ro,si->oihw", core.to(a.dtype), a[:, rows], b)

    @torch.no_grad()
    def whole_norm(self) -> Tensor:
        squares = [self._change(i, torch.float32).square().sum() for i in range(len(self.target.modules))]
        return torch.stack(squares).sum().sqrt()

    # ---- files -----------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, nn.Parameter]:
        own = {
            "hada_w1_a": self.hada_w1_a, "hada_w1_b": self.hada_w1_b,
            "hada_w2_a": self.hada_w2_a, "hada_w2_b": self.hada_w2_b,
        }  # fmt: skip
        if self.hada_t1 is not None and self.hada_t2 is not None:
            own |= {"hada_t1": self.hada_t1, "hada_t2": self.hada_t2}
        return own

    def form_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        if ("hada_t1" in tensors) != self.tucker:
            form, own = ("is", "is not") if "hada_t1" in tensors else ("is not", "is")
            return f"{form} in Tucker form (hada_t1), this network {own} (--network_args use_tucker)"
        return super().form_problem(tensors)


LOHA = AdapterKind(
    options={"layer": FactorOptions, "dropout": DropoutOptions, "patterns": PatternOptions},
    readers=(LoHaLayer, NormLayer),
    settings=lambda options, dropout: FactorSettings(**factor_values(options, "networks.loha", dropout)),
    make=lambda target, rank, alpha, settings: LoHaLayer(target, rank=rank, alpha=alpha, settings=settings),
    forms=lambda options: options["layer"].form,
)
