# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv:2106.09685): ΔW = up · down, for Linear and convolutions, also in Tucker form and with DoRA.

A 3x3 convolution keeps its kernel in `lora_down` (rank, in, 3, 3), or with use_tucker in `lora_mid` (rank, rank, 3, 3)
between two 1x1 matrices. rs_lora (arXiv:2312.03732) scales by alpha / sqrt(rank); since readers divide by the rank, the
file holds alpha * sqrt(rank).

GGPO (LoRA-GGPO, arXiv:2502.14538v1): in training the weight W' = W + ΔW is moved by Gaussian noise, so that training
finds flat minima. Row i has the standard deviation (sigma ‖W'_i‖ + beta ‖∇W'_i‖²) / sqrt(rows), from the last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.kind import AdapterKind
from library.adapters.layers.low_rank import LowRank
from library.adapters.layers.norm import NormLayer
from library.adapters.layers.ranked import RankedLayer, RankedOptions, RankedSettings, axis_in, ranked_values
from library.adapters.layers.weight import applied
from library.adapters.options import BlockOptions, DropoutOptions, LoraPlusOptions, PatternOptions
from library.adapters.target_spec import TargetSpec
from library.errors import UserError
from library.optim.working_copy import FindCopy
from library.options import at_least, option


@dataclass(frozen=True)
class LoraLayerOptions(RankedOptions):
    """How a LoRA layer is built."""

    use_tucker: bool = option(False, help="3x3 convolutions as 1x1, 3x3 in the small space, 1x1 (Tucker form).")
    use_scalar: bool = option(False, help="A learned factor that starts at 0, instead of an up matrix of zeros.")
    ggpo_sigma: float | None = option(
        None, help="GGPO: in training, noise in proportion to the norms of the weight's rows, e.g. 0.03.",
        check=at_least(0),
    )  # fmt: skip
    ggpo_beta: float | None = option(
        None, help="GGPO: noise in proportion to the squared norms of the gradient's rows, e.g. 0.01.",
        check=at_least(0),
    )  # fmt: skip

    @property
    def noise(self) -> tuple[float, float] | None:
        """(sigma, beta) of GGPO, or None without."""
        found = (self.ggpo_sigma or 0.0, self.ggpo_beta or 0.0)
        return found if any(found) else None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.noise and (self.use_tucker or self.use_scalar):
            yield "ggpo_sigma and ggpo_beta do not go with use_tucker or use_scalar"


@dataclass(frozen=True)
class FusedLayerOptions(LoraLayerOptions):
    """How a LoRA layer is built where published layers are several modules."""

    wd_on_output: bool = option(
        True, help="DoRA over output rows, the only kind that is possible here.",
        check=lambda value: None if value else "must be true: fused layers have no columns of their own",
    )  # fmt: skip


@dataclass(frozen=True)
class LoraSettings(RankedSettings):
    """How a LoRA layer is built and what it drops in training."""

    neuron_dropout: float = 0.0
    noise: tuple[float, float] | None = None  # (sigma, beta) of GGPO


class LoRALayer(RankedLayer):
    """ΔW = scalar · up · (mid ·) down, times alpha / rank. The modules of a target share down and split up's rows."""

    marks: ClassVar[set[str]] = {"lora_down.weight", "lora_up.weight"}
    saved: ClassVar[tuple[str, ...]] = ("alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale")
    plus: ClassVar[tuple[str, ...]] = ("lora_up",)
    first: ClassVar[tuple[str, ...]] = ("lora_up.weight",)
    length_is_rank: ClassVar[str | None] = "lora_down.weight"

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: LoraSettings | None = None):
        settings = settings or LoraSettings()
        super().__init__(target, rank=rank, alpha=alpha, settings=settings)
        self.settings = settings
        _, inputs, *sizes = target.modules[0].shape
        kernel = torch.Size(sizes)  # kernel: (kh, kw) of a convolution, () of Linear
        point = torch.Size([1] * len(kernel))
        tucker = settings.tucker and kernel != point
        self.lora_down = nn.Parameter(_uniform(rank, inputs, *(point if tucker else kernel)))
        self.lora_mid = nn.Parameter(_uniform(rank, rank, *kernel)) if tucker else None
        up = _uniform if settings.scalar else torch.zeros
        self.lora_up = nn.Parameter(up(target.width, rank, *point))
        self.scalar = nn.Parameter(torch.zeros(())) if settings.scalar else None
        self._pair: LowRank | None = None  # the matrices' working copies
        self.noise: Tensor | None  # standard deviation per row; none before the first step
        self.register_buffer("noise", None if settings.noise is None else torch.zeros(target.width))

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: LoraSettings) -> AdapterLayer:
        """A layer of the form and rank that a file's tensors have, with their values."""
        rank = tensors["lora_down.weight"].shape[0] // (len(target.modules) if target.split else 1)
        settings = replace(settings, tucker="lora_mid.weight" in tensors, dora=axis_in(tensors), rs_lora=False)
        return lora_layer(target, rank=rank, alpha=rank, settings=settings)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def use_copies(self, find: FindCopy) -> None:
        down, up = find(self.lora_down), find(self.lora_up)
        self._pair = LowRank(down, up) if down is not None and up is not None and self._is_plain() else None

    def _is_plain(self) -> bool:
        """Whether the change of the output is scale · up(down(x)) and nothing else, over all of the modules' rows."""
        kept = self.settings
        dropout = kept.neuron_dropout or kept.rank_dropout or kept.module_dropout
        special = self.is_conv or self.dora or self.scalar is not None or self.noise is not None or dropout
        return not special and all(module.rows is None for module in self.target.modules)

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        if not torch.compiler.is_compiling() and self._pair is not None and self._pair.takes(y):
            return self._changed_with_copies(self._pair, x, y, index)
        changed = super().change(x, y, index)
        if self.noise is None or not self.training:
            return changed
        return changed + self.place(self._perturbation(x, index).to(y.dtype), index)

    def _changed_with_copies(self, pair: LowRank, x: Tensor, y: Tensor, index: int) -> Tensor:
        """`change` with the working copies; the modules of the target share one product, as in a fused layer."""
        scale, modules = self.scale * self.multiplier, self.target.modules
        if len(modules) == 1:
            return pair.added(x, y, scale)
        widths = [module.width for module in modules]
        return y + self.shared.value("product", lambda: pair.product(x, scale).split(widths, -1))[index]

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """up(dropout(down(x))): computed in x's dtype, or in autocast's."""
        return self.shared.value(self, lambda: self._deltas(x))[index]

    def _deltas(self, x: Tensor) -> tuple[Tensor, ...]:
        """The change of each module's output, in one product with the up matrix, as in a fused layer."""
        inner = self._inner(x)
        up = self._up().to(inner.dtype)
        whole = F.conv2d(inner, up) if self.is_conv else F.linear(inner, up)
        if len(self.target.modules) == 1:
            return (whole,)
        return whole.split([module.width for module in self.target.modules], 1 if self.is_conv else -1)

    def _inner(self, x: Tensor) -> Tensor:
        """dropout(down(x)), with one draw for all modules of the target, as in a fused layer."""
        module = self.target.modules[0].module
        down = self.lora_down.to(x.dtype)
        if self.lora_mid is None:
            inner = applied(down, x, module)
        else:
            inner = applied(self.lora_mid.to(x.dtype), F.conv2d(x, down), module)
        return self._drop(inner) if self.training else inner

    def _up(self) -> Tensor:
        """The up matrix, with the learned factor in it."""
        return self.lora_up if self.scalar is None else self.lora_up * self.scalar

    def _drop(self, inner: Tensor) -> Tensor:
        """Dropout of elements, then of ranks (the same for all positions of a sample). `inner`: B ... r, or B r h w."""
        if self.settings.neuron_dropout:
            inner = F.dropout(inner, self.settings.neuron_dropout)
        rate = self.settings.rank_dropout
        if rate:
            between = [1] * (inner.dim() - 2)
            shape = (len(inner), self.rank, *between) if self.is_conv else (len(inner), *between, self.rank)
            kept = (torch.rand(shape, device=inner.device) >= rate) / (1 - rate)
            inner = inner * kept.to(inner.dtype)
        return inner

    # ---- GGPO ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _perturbation(self, x: Tensor, index: int) -> Tensor:
        """Random weights times x, without a gradient: autograd would keep the random matrix, which is as large as W."""
        assert self.noise is not None
        rows = self.noise[self.target.own_rows(index)].to(x.dtype)
        draw = torch.randn(self.target.modules[index].shape, dtype=x.dtype, device=x.device)
        draw *= rows.reshape(-1, *[1] * (draw.dim() - 1))
        return applied(draw, x, self.target.modules[index].module)

    @property
    def reads_between_steps(self) -> bool:
        return self.noise is not None

    @torch.no_grad()
    def step_taken(self) -> None:
        """The next step's noise, from the weights as they are now and from this step's gradients.

        ∇W' is approximated by s (∇B A + B ∇A), whose row norms need no matrix as large as W.
        """
        if self.noise is None or self.settings.noise is None:
            return
        sigma, beta = self.settings.noise
        down, up = self.lora_down.float().flatten(1), self.lora_up.float().flatten(1)
        down_gradient, up_gradient = _gradient(self.lora_down), _gradient(self.lora_up)
        square = (up_gradient @ (down @ down.T) * up_gradient).sum(1)
        square += 2 * (up_gradient @ (down @ down_gradient.T) * up).sum(1)
        square += (up @ (down_gradient @ down_gradient.T) * up).sum(1)
        norms = torch.cat([self.weight_norms(index) for index in range(len(self.target.modules))])
        self.noise.copy_((sigma * norms + beta * self.scale**2 * square) / math.sqrt(len(norms)))

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _factors(self, index: int) -> tuple[Tensor, Tensor]:
        """ΔW of module `index` as up (out, r) times down (r, in * kh * kw), float32."""
        down = self.lora_down.float()
        if self.lora_mid is not None:
            down = torch.einsum("rshw,si->rihw", self.lora_mid.float(), down.flatten(1))
        return self._up()[self.target.own_rows(index)].float().flatten(1), down.flatten(1)

    def delta_weight(self, index: int = 0) -> Tensor:
        up, down = self._factors(index)
        return (up @ down).reshape(self.target.modules[index].shape)

    def weight_norms(self, index: int) -> Tensor:
        """‖W + s·B·A‖ per row without forming the sum: ‖w‖² + 2s (W Aᵀ)·b + s² b (A Aᵀ) bᵀ."""
        if self.dora == "input":
            return super().weight_norms(index)
        weight = self.base_weight(index).flatten(1)
        up, down = self._factors(index)
        up = up * self.scale
        cross = (F.linear(weight, down.to(weight.dtype)).float() * up).sum(1)
        square = ((up @ (down @ down.T)) * up).sum(1)
        return (self._norms(weight).square() + 2 * cross + square).clamp_min(0).sqrt()

    @torch.no_grad()
    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Both matrices times sqrt(max / norm) where norm = ‖scale · up · down‖ (Frobenius) is above max."""
        factors = [self._factors(index) for index in range(len(self.target.modules))]
        up, down = torch.cat([f[0] for f in factors]), factors[0][1]
        # ‖B A‖² = Σ (BᵀB) ∘ (AAᵀ): two small matrices instead of one as large as the weight
        norm = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt() * self.scale
        return self.shrink((self.lora_up, self.lora_down), norm, max_norm, count=2)

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        optional = {"lora_mid.weight": self.lora_mid, "dora_scale": self.dora_scale}
        found = {name: parameter for name, parameter in optional.items() if parameter is not None}
        return {"lora_down.weight": self.lora_down, "lora_up.weight": self.lora_up, **found}

    def form_problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        tucker = "lora_mid.weight" in tensors and self.lora_mid is None
        text = "is in Tucker form (lora_mid), this network is not (--network_args use_tucker=True)"
        return super().form_problem(tensors) or (text if tucker else None)


class SplitLoRALayer(AdapterLayer):
    """A LoRA for each Linear of a target, saved as one: downs stacked, ups on the diagonal of one matrix.

    The rank in the file is n times as large, and so is alpha: alpha / rank stays as trained (decision 0006).
    """

    saved: ClassVar[tuple[str, ...]] = LoRALayer.saved
    plus: ClassVar[tuple[str, ...]] = LoRALayer.plus

    def __init__(self, target: TargetSpec, *, rank: int, alpha: float, settings: LoraSettings | None = None):
        super().__init__(target)
        singles = [replace(target, modules=(module,), split=False) for module in target.modules]
        self.parts = nn.ModuleList(LoRALayer(single, rank=rank, alpha=alpha, settings=settings) for single in singles)
        self.rank = rank * len(self.parts)
        for part in self._all():
            part.shared = self.shared  # module dropout drops all of them or none

    def _part(self, index: int) -> LoRALayer:
        part = self.parts[index]
        assert isinstance(part, LoRALayer)
        return part

    def _all(self) -> list[LoRALayer]:
        return [self._part(index) for index in range(len(self.parts))]

    @property
    def reads_weights(self) -> bool:
        return any(part.reads_weights for part in self._all())

    @property
    def reads_between_steps(self) -> bool:
        return any(part.reads_between_steps for part in self._all())

    def set_multiplier(self, multiplier: float) -> None:
        super().set_multiplier(multiplier)
        for part in self._all():
            part.set_multiplier(multiplier)

    def step_taken(self) -> None:
        for part in self._all():
            part.step_taken()

    def use_copies(self, find: FindCopy) -> None:
        for part in self._all():
            part.use_copies(find)

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        return self._part(index).delta(x)

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        return self._part(index).change(x, y, 0)

    def merged_weight(self, index: int = 0) -> Tensor:
        return self._part(index).merged_weight()

    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Limit each part. Returns the largest norm."""
        limited = [part.limit_norm(max_norm) for part in self._all()]
        return torch.stack([norm for norm, _ in limited]).max(), torch.stack([scaled for _, scaled in limited]).any()

    def named_tensors(self) -> dict[str, nn.Parameter]:
        return {f"{i}.{name}": p for i, part in enumerate(self._all()) for name, p in part.named_tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        parts = [part.tensors() for part in self._all()]
        fused = {
            "alpha": torch.stack([part["alpha"] for part in parts]).sum(),
            "lora_down.weight": torch.cat([part["lora_down.weight"] for part in parts]),
            "lora_up.weight": torch.block_diag(*[part["lora_up.weight"] for part in parts]),
        }
        if "dora_scale" in parts[0]:
            fused["dora_scale"] = torch.cat([part["dora_scale"] for part in parts])
        return fused

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        if len(tensors.get("lora_down.weight", ())) % len(self.parts):
            return "was not trained with split_qkv"
        expected = {name: value.shape for name, value in self.tensors().items() if name != "alpha"}
        for name, shape in expected.items():
            if name not in tensors:
                return f"has no {name}"
            if tensors[name].shape != shape:
                return f"{name} has the shape {tuple(tensors[name].shape)}, here it is {tuple(shape)}"
        up = tensors["lora_up.weight"]
        diagonal = torch.block_diag(*[up[rows, ranks] for rows, ranks in self._blocks()])
        return None if torch.equal(diagonal, up) else "was not trained with split_qkv"

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Rows and ranks of each part in the fused up matrix."""
        rank = self.rank // len(self.parts)
        return [(self.target.own_rows(i), slice(i * rank, (i + 1) * rank)) for i in range(len(self.parts))]

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for part, (rows, ranks) in zip(self._all(), self._blocks(), strict=True):
            down, up = tensors["lora_down.weight"][ranks], tensors["lora_up.weight"][rows, ranks]
            own = {"lora_down.weight": down, "lora_up.weight": up}
            if "dora_scale" in tensors:
                own["dora_scale"] = tensors["dora_scale"][rows]
            if "alpha" in tensors:
                own["alpha"] = tensors["alpha"] / len(self.parts)
            part.load_tensors(own)


def lora_layer(target: TargetSpec, *, rank: int, alpha: float, settings: LoraSettings) -> AdapterLayer:
    """The LoRA for a target: one for all of its modules, or one for each."""
    kind = SplitLoRALayer if target.split else LoRALayer
    return kind(target, rank=rank, alpha=alpha, settings=settings)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient as a float32 matrix; zero when it has none."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.float().flatten(1)


def _uniform(*shape: int) -> Tensor:
    """The usual initial values of a down matrix: uniform, Kaiming with a = sqrt(5)."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))


# ---- the kind -----------------------------------------------------------------------------------------------------


def lora_settings(options: Mapping[str, Any], neuron_dropout: float | None) -> LoraSettings:
    """The options of a LoRA layer. Raises UserError when --network_dropout is given twice with two values."""
    dropout = options["dropout"]
    if neuron_dropout is not None and dropout.dropout is not None and neuron_dropout != dropout.dropout:
        raise UserError(f"--network_args: dropout={dropout.dropout} is --network_dropout, which is {neuron_dropout}")
    return LoraSettings(
        **ranked_values(options),
        neuron_dropout=neuron_dropout or dropout.dropout or 0.0,
        noise=options["layer"].noise,
    )


def lora_forms(options: Mapping[str, Any]) -> list[str]:
    """The options given that decide which tensors a file has."""
    blocks = options["blocks"]
    return [*options["layer"].form, *(["train_norm"] if isinstance(blocks, BlockOptions) and blocks.train_norm else [])]


LORA = AdapterKind(
    options={
        "layer": LoraLayerOptions, "dropout": DropoutOptions, "plus": LoraPlusOptions, "patterns": PatternOptions,
    },
    readers=(LoRALayer, NormLayer),
    settings=lora_settings,
    make=lambda target, rank, alpha, settings: lora_layer(target, rank=rank, alpha=alpha, settings=settings),
    fused_options={"layer": FusedLayerOptions},
    forms=lora_forms,
)  # fmt: skip
