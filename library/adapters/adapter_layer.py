# SPDX-License-Identifier: Apache-2.0
"""One adapter: a layer on a target, which is a published name for some modules.

    target = TargetSpec("lora_unet_mid_block_attentions_0_proj_in", (TargetModule(path, module),), "denoiser", 12)
    layer = LoRALayer(target, rank=4, alpha=1.0)  # an AdapterLayer; adds `delta(x)` to the module's output

A published layer may be several modules of ours that share an input (fused q, k, v) or some output rows of one module.
The layer works through forward hooks, so it composes with checkpointing, autocast, compile and weight swapping.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from library.adapters.shared_call import SharedCall
from library.adapters.target_spec import TargetSpec
from library.errors import UserError
from library.optim.working_copy import FindCopy


class AdapterLayer(nn.Module, ABC):
    """Base class of adapters. A subclass has the parameters, their change (`delta`) and their names in files."""

    saved: ClassVar[tuple[str, ...]]  # suffixes of its keys in a file; not every one is always there
    marks: ClassVar[set[str]]  # suffixes by which `claims` knows it
    plus: ClassVar[tuple[str, ...]] = ()  # parameters that LoRA+ trains faster (arXiv:2402.12354)
    sparse: ClassVar[bool] = False  # some parameters have no gradient in some steps, and must not change in those

    def __init__(self, target: TargetSpec, *, module_dropout: float = 0.0):
        super().__init__()
        self.target = target
        self.module_dropout = module_dropout
        self.scale = 1.0  # factor of `delta` besides the multiplier; alpha / rank for LoRA
        self.multiplier = 1.0
        self.enabled = True
        self.shared = SharedCall(len(target.modules))
        self._handles: list[RemovableHandle] = []

    @classmethod
    def claims(cls, names: set[str]) -> bool:
        """Whether a module with these tensors in a file has an adapter of this kind."""
        return cls.marks <= names

    # ---- implemented by subclasses ---------------------------------------------------------------------------------

    @property
    def reads_weights(self) -> bool:
        """Whether a forward pass reads the module's own weight, not only its input and output."""
        return True

    @property
    def reads_between_steps(self) -> bool:
        """Whether `step_taken` reads it."""
        return False

    @abstractmethod
    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """The change of the output of module `index` for input `x`, before `scale` and multiplier."""

    @abstractmethod
    def merged_weight(self, index: int = 0) -> Tensor:
        """The float32 weight of module `index` with this adapter in it."""

    def merged_bias(self, index: int = 0) -> Tensor | None:
        """The float32 bias with this adapter in it; None when the bias does not change."""
        return None

    @abstractmethod
    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Saved suffix -> the parameter that is saved and loaded under it."""

    def tensors(self) -> dict[str, Tensor]:
        """Saved suffix -> value, as a file holds them."""
        return {name: parameter.detach() for name, parameter in self.named_tensors().items()}

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why `tensors` (suffix -> value, of a file) do not fit this layer, or None."""
        own = {name: value.shape for name, value in self.tensors().items() if name != "alpha"}
        for name in own:
            if name not in tensors:
                return f"has no {name}"
        for name, value in tensors.items():
            if name not in own and name not in self.saved:
                return f"has an unknown tensor {name}"
            if name in own and value.shape != own[name]:
                return f"{name} has the shape {tuple(value.shape)}, here it is {tuple(own[name])}"
        return None

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of a file, which `problem` has found to fit."""
        with torch.no_grad():
            for name, parameter in self.named_tensors().items():
                parameter.copy_(tensors[name])

    def limit_norm(self, max_norm: float) -> tuple[Tensor, Tensor] | None:
        """Scale the change down to a norm of `max_norm`. Returns (norm afterwards, whether it was scaled).

        None for an adapter without a norm.
        """
        return None

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier

    def step_taken(self) -> None:
        """Called after each optimizer step, before the gradients are cleared."""

    def use_copies(self, find: FindCopy) -> None:
        """Compute training passes with the parameters' working copies, where this kind of adapter can."""

    # ---- forward and merging ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hook into the target's modules, whose outputs then have the adapter's change in them. Idempotent."""
        if not self._handles:
            modules = enumerate(self.target.modules)
            self._handles = [m.module.register_forward_hook(self._hook(index)) for index, m in modules]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add_change(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.enabled:
                return None
            self.shared.enter(args[0], index)
            try:
                changed = self.change(args[0], output, index)
            except BaseException:  # recomputation stops in the middle of a layer, as soon as it has what it needs
                self.shared.forget()
                raise
            self.shared.leave()
            return changed

        return add_change

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """The output `y` of module `index` for input `x` with the adapter's change, in the dtype of `y`."""
        delta = self.gate(self.delta(x, index)).to(y.dtype)
        return add_scaled(y, self.place(delta, index), self.scale * self.multiplier)

    def gate(self, delta: Tensor) -> Tensor:
        """Module dropout: in training, zero with probability `module_dropout`, for all modules of the target together.

        A factor instead of a branch: no synchronisation, and every parameter gets a gradient on every rank.
        """
        if not (self.training and self.module_dropout):
            return delta
        return delta * self.shared.value("kept", lambda: torch.rand((), device=delta.device) >= self.module_dropout)

    def place(self, delta: Tensor, index: int) -> Tensor:
        """`delta` padded to the width of the module's output, with zeros in rows that are not the target's."""
        module = self.target.modules[index]
        if module.rows is None:
            return delta
        around = (module.rows.start, module.full_width - module.rows.stop)
        return F.pad(delta, (0, 0, 0, 0, *around) if isinstance(module.module, nn.Conv2d) else around)

    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Write the merged values (float32 arithmetic, rounded to `dtype`) into the modules, which keep their dtype.

        Computed on the device of each module's weight, which the adapter is moved to.
        Raises UserError for quantised modules, which cannot hold the values.
        """
        with torch.no_grad():
            for index, target in enumerate(self.target.modules):
                weight, bias = target.module.weight, target.module.bias
                if not isinstance(weight, nn.Parameter):
                    raise UserError(
                        f"{self.target.name}: nothing can be merged into quantised weights; merge into the model "
                        "before it is quantised (without --fp8_base, --fp8_base_unet, --base_quant)"
                    )
                self.to(weight.device)
                weight.copy_(self.merged_weight(index).to(dtype or weight.dtype))
                merged_bias = self.merged_bias(index)
                if merged_bias is not None and isinstance(bias, Tensor):
                    bias.copy_(merged_bias.to(dtype or bias.dtype))


def add_scaled(y: Tensor, change: Tensor, factor: float) -> Tensor:
    """y + factor * change. Inductor (torch 2.13) loses `alpha` where it makes one call of this sum and a product."""
    if torch.compiler.is_compiling():
        return y + change * factor
    return torch.add(y, change, alpha=factor)
