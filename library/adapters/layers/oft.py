# SPDX-License-Identifier: Apache-2.0
"""OFT (arXiv:2306.07280): rotates the outputs of a layer in blocks, instead of adding to them.

With a free matrix A per block: Q = A - Aᵀ, R = (I + Q)(I - Q)⁻¹ (Cayley), W' = Rᵀ W; the bias stays. COFT's constraint:
‖Q‖ over all blocks is at most alpha times the rows of the layer. At multiplier m the rotation is I + m (R - I).
Since W' x = Rᵀ (W x), the output itself is rotated and no weight is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer, add_scaled
from library.adapters.kind import AdapterKind, default_sizes
from library.adapters.layers.weight import WeightLayer, applied
from library.adapters.options import NoDropoutOptions, PatternOptions, warn_dropout
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import DENOISER_PREFIX
from library.errors import UserError
from library.log import get_logger
from library.options import option

PREFIX = "oft_unet"  # of layers in files
ALPHA = 1e-3  # when none is given
TINY = 1e-8  # keeps the ratio of norms defined at the start, where Q is 0; part of the formula that readers have


@dataclass(frozen=True)
class OftOptions:
    """Which layers OFT rotates."""

    enable_all_linear: bool = option(False, help="All Linear layers of the blocks, not only those of attention.")


@dataclass(frozen=True)
class OftSettings:
    """How an OFT layer is built and saved. numbered: FLUX files number the blocks, a fused layer has several sets."""

    numbered: bool = False
    module_dropout: float = 0.0


class OFTLayer(WeightLayer):
    """`count` rotations for the rows of each module; every module of a target has rotations of its own."""

    saved: ClassVar[tuple[str, ...]] = ("oft_blocks", *(f"oft_blocks.{i}" for i in range(4)), "alpha")

    def __init__(self, target: TargetSpec, *, count: int, alpha: float, settings: OftSettings | None = None):
        """Raises UserError when the rows cannot be divided into `count` blocks."""
        settings = settings or OftSettings()
        super().__init__(target, module_dropout=settings.module_dropout)
        widths = [module.width for module in target.modules]
        if any(width % count for width in widths):
            rows = " + ".join(map(str, widths))
            raise UserError(f"--network_dim {count}: {target.name} has {rows} rows, which make no {count} equal blocks")
        self.rank, self.numbered = count, settings.numbered
        self.alpha = torch.tensor(float(alpha), device="cpu").item()  # as a file rounds it
        self.oft_blocks = nn.ParameterList(torch.zeros(count, w // count, w // count) for w in widths)

    @classmethod
    def claims(cls, names: set[str]) -> bool:
        return bool(names & {"oft_blocks", "oft_blocks.0"})

    @classmethod
    def from_tensors(cls, target: TargetSpec, tensors: Mapping[str, Tensor], settings: OftSettings) -> AdapterLayer:
        """A layer with the file's blocks and constraint."""
        first = tensors["oft_blocks.0" if "oft_blocks.0" in tensors else "oft_blocks"]
        settings = OftSettings("oft_blocks.0" in tensors, settings.module_dropout)
        return cls(target, count=len(first), alpha=float(tensors.get("alpha", torch.zeros(()))), settings=settings)

    # ---- the rotation ----------------------------------------------------------------------------------------------

    def turn(self, index: int) -> Tensor:
        """R - I of module `index`: (blocks, size, size), float32."""
        with torch.autocast(self.oft_blocks[index].device.type, enabled=False):
            free = self.oft_blocks[index].float()
            skew = free - free.transpose(1, 2)
            norm = torch.linalg.vector_norm(skew)
            limit = self.alpha * self.target.modules[index].width
            skew = skew * ((norm.clamp(max=limit) + TINY) / (norm + TINY))
            unit = torch.eye(skew.shape[-1], device=skew.device)
            # (I - Q)⁻¹ (I + Q) - I = 2 (I - Q)⁻¹ Q: small differences keep their digits
            # I - Q is never singular; `solve` would read back from the device whether it is
            return torch.linalg.solve_ex(unit - skew, 2 * skew).result

    def _turned(self, plain: Tensor, index: int, axis: int) -> Tensor:
        """(Rᵀ - I) applied to the rows of a target, which lie along `axis` of `plain`."""
        turn = self.turn(index).to(plain.dtype)
        blocks = plain.movedim(axis, -1).unflatten(-1, turn.shape[:2])
        return torch.einsum("...kn,knm->...km", blocks, turn).flatten(-2).movedim(-1, axis)

    # ---- what AdapterLayer asks for --------------------------------------------------------------------------------

    @property
    def reads_weights(self) -> bool:
        return True  # the bias, which is not turned

    def change(self, x: Tensor, y: Tensor, index: int) -> Tensor:
        """The output with everything but its bias rotated."""
        turned = self._turned(self.without_bias(y, index), index, 1 if self.is_conv else -1)
        delta = self.gate(turned).to(y.dtype)
        return add_scaled(y, self.place(delta, index), self.multiplier)

    def delta(self, x: Tensor, index: int = 0) -> Tensor:
        """The change, computed from the input."""
        return applied(self.delta_weight(index).to(x.dtype), x, self.target.modules[index].module)

    def delta_weight(self, index: int = 0) -> Tensor:
        return self._turned(self.base_weight(index).float(), index, 0)

    # ---- files -----------------------------------------------------------------------------------------------------

    def named_tensors(self) -> dict[str, nn.Parameter]:
        if not self.numbered:
            return {"oft_blocks": self.oft_blocks[0]}
        return {f"oft_blocks.{i}": blocks for i, blocks in enumerate(self.oft_blocks)}

    def tensors(self) -> dict[str, Tensor]:
        alpha = {"alpha": torch.tensor(self.alpha)}
        return alpha | super().tensors() if self.numbered else super().tensors() | alpha

    def problem(self, tensors: Mapping[str, Tensor]) -> str | None:
        name, found = next(iter(self.named_tensors())), tensors.get("oft_blocks", tensors.get("oft_blocks.0"))
        if found is None:
            return "is no OFT (it has no oft_blocks)"
        if found.dim() == 3 and len(found) != self.rank:
            advice = "set --network_dim, or use --dim_from_weights"
            return f"has {len(found)} blocks, this network has {self.rank} ({advice})"
        if name not in tensors:
            return f"has no {name} (one of networks.oft and networks.oft_flux wrote it, this is the other)"
        return super().problem(tensors)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        if "alpha" in tensors:
            self.alpha = float(tensors["alpha"])


# ---- the kind -----------------------------------------------------------------------------------------------------


def renamed_for_oft(targets: Iterable[TargetSpec]) -> list[TargetSpec]:
    """The targets of a denoiser under the names that OFT files have."""
    return [replace(target, name=PREFIX + target.name.removeprefix(DENOISER_PREFIX)) for target in targets]


def oft_sizes(count: int | None, alpha: float | None) -> tuple[int, float]:
    """Blocks per layer, and alpha: how far a layer may rotate. Raises UserError unless alpha is positive."""
    count, alpha = default_sizes(count, ALPHA if alpha is None else alpha)
    if alpha <= 0:
        raise UserError("--network_alpha 0: nothing can rotate; for OFT alpha is how far a layer may rotate, e.g. 1e-3")
    if alpha >= 1:
        get_logger().warning(
            "--network_alpha %g: for OFT alpha is how far a layer may rotate, times its rows; this is no limit, "
            "1e-3 is usual", alpha,
        )  # fmt: skip
    return count, alpha


def oft_settings(options: Mapping[str, Any], neuron_dropout: float | None) -> OftSettings:
    dropout = options["dropout"]
    warn_dropout("OFT", neuron_dropout, dropout.dropout)
    return OftSettings(module_dropout=dropout.module_dropout or 0.0)


OFT = AdapterKind(
    options={"dropout": NoDropoutOptions, "patterns": PatternOptions},
    readers=(OFTLayer,),
    settings=oft_settings,
    make=lambda target, count, alpha, settings: OFTLayer(target, count=count, alpha=alpha, settings=settings),
    prefix=PREFIX,
    sizes=oft_sizes,
    in_file="the blocks come from {file}; leave it out",
    reads_every_kind=False,
)
NUMBERED_OFT = replace(OFT, settings=lambda *given: replace(oft_settings(*given), numbered=True))
