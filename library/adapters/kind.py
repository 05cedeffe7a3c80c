# SPDX-License-Identifier: Apache-2.0
"""A kind of adapters (LoRA, LoHa, OFT ...): its layers and its --network_args, for whatever targets they are put on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.layer_network import LayerNetwork
from library.adapters.options import BlockOptions
from library.adapters.target_spec import TargetSpec
from library.adapters.targets import DENOISER_PREFIX
from library.errors import UserError


class LayerReader(Protocol):
    """Makes layers from the tensors of a file: a layer class, or an object that stands for one."""

    def claims(self, names: set[str], /) -> bool: ...

    def from_tensors(self, target: TargetSpec, tensors: Mapping[str, Tensor], settings: Any, /) -> AdapterLayer: ...


def default_sizes(dim: int | None, alpha: float | None) -> tuple[int, float]:
    """--network_dim (None is 4) and --network_alpha (None is 1). Raises UserError for a dim below 1."""
    if dim is not None and dim < 1:
        raise UserError(f"--network_dim must be at least 1, got {dim}")
    if alpha is not None and not math.isfinite(alpha):
        raise UserError(f"--network_alpha must be a finite number, got {alpha}")
    return 4 if dim is None else int(dim), 1.0 if alpha is None else float(alpha)


@dataclass(frozen=True)
class AdapterKind:
    """All that the builder needs to know of a kind of adapters.

    `settings` turns the options into what `make` and `readers` need. blocks: for a kind with options of its own in
    place of the group "blocks": (options, dim, alpha) -> that group.
    """

    options: Mapping[str, type]  # groups of --network_args, besides those of the targets
    readers: Sequence[LayerReader]  # of the layers that a file may have
    settings: Callable[[Mapping[str, Any], float | None], Any]  # (options, --network_dropout)
    make: Callable[[TargetSpec, int, float, Any], AdapterLayer]  # (target, rank, alpha, settings)
    prefix: str = DENOISER_PREFIX  # of the names of a denoiser's layers in files
    fused_options: Mapping[str, type] = field(default_factory=dict)  # in place of `options`, where layers are fused
    sizes: Callable[[int | None, float | None], tuple[int, float]] = default_sizes
    blocks: Callable[[Mapping[str, Any], int, float], BlockOptions] | None = None
    forms: Callable[[Mapping[str, Any]], list[str]] = lambda options: []  # given options about which a file decides
    decided_by_file: tuple[str, ...] = ()  # names of options that must not be given beside a file
    in_file: str = "ranks and alphas come from {file}; leave them out"  # why not
    reads_every_kind: bool = True  # for inference a file may be of any kind
    network: type[LayerNetwork] = LayerNetwork
