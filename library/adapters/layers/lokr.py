# SPDX-License-Identifier: Apache-2.0
"""LoKr (LyCORIS, arXiv:2309.14859): ΔW = w1 ⊗ w2, the Kronecker product of a small matrix and a larger one.

A layer of out x in is split as out = out1 · out2 and in = in1 · in2; w1 is (out1, in1), w2 (out2, in2, kh, kw). Each is
a matrix of its own, or two low-rank factors; a 3x3 kernel's w2 may be in Tucker form (t2). Names, shapes and the choice
of the form are those of LyCORIS. The product is never formed in training: (w1 ⊗ w2) x is w2 applied to in1 groups of
the input, mixed by w1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.kind import AdapterKind
from library.adapters.layers.factor import FactorLayer, FactorOptions, FactorSettings, factor_values
from library.adapters.layers.norm import NormLayer
from library.adapters.layers.ranked import axis_in
from library.adapters.layers.weight import applied
from library.adapters.options import DropoutOptions, PatternOptions
from library.adapters.target_spec import TargetSpec
from library.options import option, positive


@dataclass(frozen=True)
class LokrOptions:
    """The form of LoKr layers."""

    factor: int = option(
        -1, help="Size of the smaller part of a layer's width; -1: near its square root.",
        check=lambda value: None if value == -1 else positive(value) and "must be -1 or at least 1",
    )  # fmt: skip
    decompose_both: bool = option(False, help="Low-rank factors for the small matrix too.")
    full_matrix: bool = option(False, help="No low-rank factors at all; the rank has no effect then.")
    unbalanced_factorization: bool = option(False, help="The larger part of the output's width goes to w1.")

    @property
    def form(self) -> list[str]:
        """The options given."""
        return [name for name, value in vars(self).items() if value not in (False, -1)]

    def problems(self) -> Iterator[str]:
        if self.full_matrix and self.decompose_both:
            yield "decompose_both has no effect with full_matrix"


@dataclass(frozen=True)
class LokrSettings(FactorSettings):
    """The form of a new LoKr layer."""

    factor: int = -1  # size of the smaller part of out and in; -1: as near to the square root as it divides
    decompose_both: bool = False
    full_matrix: bool = False
    unbalanced: bool = False  # the larger part of `out` goes to w1


@dataclass(frozen=True)
class LokrForm:
    """Sizes of w1 and w2, and which of them are low-rank factors."""

    small: tuple[int, int]  # (out1, in1)
    large: tuple[int, int]  # (out2, in2)
    small_factored: bool
    large_factored: bool

    @classmethod
    def chosen(cls, out: int, inputs: int, rank: int, settings: LokrSettings) -> LokrForm:
        """The form of a new layer: low-rank factors only where they are smaller than the matrix."""
        out1, out2 = parts_of(out, settings.factor)
        in1, in2 = parts_of(inputs, settings.factor)
        if settings.unbalanced:
            out1, out2 = out2, out1
        free = not settings.full_matrix
        small = free and settings.decompose_both and rank < max(out1, in1) / 2
        return cls((out1, in1), (out2, in2), small, free and rank < max(out2, in2) / 2)

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], columns: int) -> LokrForm:
        """The form that a file's tensors have. columns: kh * kw of the layer."""
        tucker = "lokr_t2" in tensors
        small = tensors.get("lokr_w1")
        if small is None:
            out1, in1 = len(tensors["lokr_w1_a"]), tensors["lokr_w1_b"].shape[1]
        else:
            out1, in1 = small.shape[:2]
        large = tensors.get("lokr_w2")
        if large is None:
            a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
            out2, in2 = (a.shape[1], b.shape[1]) if tucker else (a.shape[0], b.shape[1] // columns)
        else:
            out2, in2 = large.shape[:2]
        return cls((out1, in1), (out2, in2), small is None, large is None)


def parts_of(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two parts, the smaller one first.

    A factor that divides it is one part. Otherwise the smaller part is the largest divisor that exceeds neither the
    factor (-1: no limit) nor the square root of `size`.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    part = next(p for p in range(limit, 0, -1) if size % p == 0)
    return part, size // part


class LoKrLayer(FactorLayer):
    """One Kronecker product for all rows of a target, computed once and split among its modules."""

    saved: ClassVar[tuple[str, ...]] = (
        "alpha", "dora_scale", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )  # fmt: skip
    first: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a")

    def __init__(
        self,
        target: TargetSpec,
        *,
        rank: int,
        alpha: float,
        settings: LokrSettings | None = None,
        form: LokrForm | None = None,
    ):
        settings = settings or LokrSettings()
        super().__init__(target, rank=rank, alpha=alpha, settings=settings)
        self.form = form = form or LokrForm.chosen(target.width, self.inputs, rank, settings)
        self.tucker = self.tucker and form.large_factored
        (out1, in1), (out2, in2) = form.small, form.large
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": form.small}
        if form.small_factored:
            shapes = {"lokr_w1_a": (out1, rank), "lokr_w1_b": (rank, in1)}
        if not form.large_factored:
            shapes |= {"lokr_w2": (*form.large, *self.kernel)}
        elif self.tucker:
            shapes |= {"lokr_w2_a": (rank, out2), "lokr_w2_b": (rank, in2), "lokr_t2": (rank, rank, *self.kernel)}
        else:
            shapes |= {"lokr_w2_a": (out2, rank), "lokr_w2_b": (rank, in2 * math.prod(self.kernel))}
        # as LyCORIS draws them: the last factor of w2 is 0, unless a learned number that is 0 stands before all
        zero = None if settings.scalar else "lokr_w2_b" if form.large_factored else "lokr_w2"
        self.parts = nn.ParameterDict({name: _drawn(shape, zero=name == zero) for name, shape in shapes.items()})
        if not (form.small_factored or form.large_factored):  # readers know no rank then, so the scale is 1
            self.load_alpha({})

    @classmethod
    def claims(cls, names: set[str]) -> bool:
        return all(w in names or {f"{w}_a", f"{w}_b"} <= names for w in ("lokr_w1", "lokr_w2"))

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: LokrSettings) -> AdapterLayer:
        """A layer of the form and rank that a file's tensors have."""
        settings = replace(settings, tucker="lokr_t2" in tensors, dora=axis_in(tensors), rs_lora=False)
        inner = tensors.get("lokr_w1_b", tensors.get("lokr_w2_b"))
        rank = 1 if inner is None else len(inner)
        form = LokrForm.of_file(tensors, math.prod(target.modules[0].shape[2:]))
        return cls(target, rank=rank, alpha=rank, settings=settings, form=form)

    # ---- the change ------------------------------------------------------------------------------------------------

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """ΔW x: the whole product once for all modules, then the rows of this one."""
        whole = self.shared.value(self, lambda: self._product(x))
        if len(self.target.modules) > 1:
            rows = self.target.own_rows(index)
            whole = whole[:, rows] if self.is_conv else whole[..., rows]
        return self.drop_rows(self.factored(whole), index)

    def _product(self, x: Tensor) -> Tensor:
        """(w1 ⊗ w2) x: w2 on each of in1 groups of the input, then w1 across the groups."""
        small, large = (matrix.to(x.dtype) for matrix in self._matrices())
        module = self.target.modules[0].module
        if not isinstance(module, nn.Conv2d):
            groups = applied(large, x.unflatten(-1, (self.form.small[1], -1)), module)  # ... in1 out2
            return torch.einsum("...io,pi->...po", groups, small.to(groups.dtype)).flatten(-2)
        groups = applied(large, x.unflatten(1, (self.form.small[1], -1)).flatten(0, 1), module)
        groups = groups.unflatten(0, (len(x), -1))  # B in1 out2 h w
        return torch.einsum("biohw,pi->bpohw", groups, small.to(groups.dtype)).flatten(1, 2)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """w1 (out1, in1) and w2 (out2, in2, kh, kw)."""
        own = self.parts
        small = own["lokr_w1_a"] @ own["lokr_w1_b"] if self.form.small_factored else own["lokr_w1"]
        if not self.form.large_factored:
            return small, own["lokr_w2"]
        a, b = own["lokr_w2_a"], own["lokr_w2_b"]
        if self.tucker:
            return small, torch.einsum("rshw,ro,si->oihw", own["lokr_t2"], a, b)
        return small, (a @ b).reshape(*self.form.large, *self.kernel)

    def delta_weight(self, index: int = 0) -> Tensor:
        small, large = (matrix.float() for matrix in self._matrices())
        whole = torch.kron(small.reshape(*small.shape, *[1] * len(self.kernel)), large.contiguous())
        return self.factored(whole[self.target.own_rows(index)])

    @torch.no_grad()
    def whole_norm(self) -> Tensor:
        """The product of the norms of both matrices."""
        small, large = self._matrices()
        return small.float().norm() * large.float().norm()

    # ---- files -----------------------------------------------------------------------------------------------------

    def factors(self) -> dict[str, nn.Parameter]:
        return dict(self.parts.items())

    def form_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        made = tuple(a * b for a, b in zip(self.form.small, self.form.large))
        if made != (self.target.width, self.inputs):
            return f"is a product of {made[0]} x {made[1]}, the layer has {self.target.width} x {self.inputs}"
        own = {name for name in self.saved if name.startswith("lokr_")} & set(tensors)
        if own != set(self.parts):
            names = ", ".join(sorted(own)) or "no lokr tensors"
            return f"has {names}, this network {', '.join(sorted(self.parts))} (its form depends on rank and factor)"
        return super().form_problem(tensors)

    def load_alpha(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_alpha(tensors if self.form.small_factored or self.form.large_factored else {})


def _drawn(shape: tuple[int, ...], *, zero: bool) -> nn.Parameter:
    """Zeros, or uniform (Kaiming with a = sqrt(5))."""
    if zero:
        return nn.Parameter(torch.zeros(shape))
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


def lokr_settings(options: Mapping[str, Any], neuron_dropout: float | None) -> LokrSettings:
    form: LokrOptions = options["form"]
    return LokrSettings(
        **factor_values(options, "networks.lokr", neuron_dropout),
        factor=form.factor,
        decompose_both=form.decompose_both,
        full_matrix=form.full_matrix,
        unbalanced=form.unbalanced_factorization,
    )


LOKR = AdapterKind(
    options={"layer": FactorOptions, "form": LokrOptions, "dropout": DropoutOptions, "patterns": PatternOptions},
    readers=(LoKrLayer, NormLayer),
    settings=lokr_settings,
    make=lambda target, rank, alpha, settings: LoKrLayer(target, rank=rank, alpha=alpha, settings=settings),
    forms=lambda options: [*options["layer"].form, *options["form"].form],
)
