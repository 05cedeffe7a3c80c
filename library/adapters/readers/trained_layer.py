# SPDX-License-Identifier: Apache-2.0
"""Layers of a live network as functions from a probe to the change of the output.

The layer and its plain module are copied to main memory in float64; no random numbers are drawn, nothing is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.readers.probe import Probe, host, on_host, probe_of


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """A layer of a live network. Rows are in the published order."""

    name: str
    probe: Probe | None  # None: a module of a form that no reader changes
    shape: tuple[int, ...]  # of the whole weight
    change: Callable[[Probe], Tensor]
    weight: Callable[[], Tensor]
    cheap: bool  # whether `change` needs no matrix as large as the weight


def trained_layer(layer: AdapterLayer) -> TrainedLayer:
    """The function of one of our own layers."""
    target = layer.target
    shape = (target.width, *target.modules[0].shape[1:])
    return TrainedLayer(
        target.name, probe_of(target.modules[0].module), shape, lambda probe: _own_change(layer, probe),
        lambda: host(target.weight), not layer.reads_weights,
    )  # fmt: skip


def _own_change(layer: AdapterLayer, probe: Probe) -> Tensor:
    reads = layer.reads_weights
    dtype = torch.float32 if reads else torch.float64  # ratios of norms are made in float32
    modules = {module.module: None for module in layer.target.modules}
    memo: dict[int, object] = {
        id(m): on_host(m, m.weight if reads else None, m.bias if reads else None, dtype)  # type: ignore[arg-type]
        for m in modules
    }
    memo[id(layer._handles)] = []
    twin, x = _twin(layer, memo, dtype), probe.x.to(dtype)
    assert isinstance(twin, AdapterLayer)
    twin.set_multiplier(1.0)
    found = []
    for index, module in enumerate(twin.target.modules):
        plain = module.module(x) if reads else probe.nothing(module.full_width)
        change = probe.pick(twin.change(x, plain, index) - plain)
        found.append(change if module.rows is None else change[module.rows])
    return torch.cat(found).double()


def foreign_layer(
    name: str, layer: nn.Module, module: nn.Module, forward: Callable[..., Tensor],
    weight: Callable[[], Tensor], bias: Tensor | None,
) -> TrainedLayer:  # fmt: skip
    """The function of a third-party layer, which is called in place of `module` with this weight and bias.

    forward: that of the module, as the layer holds it. Its class may compute differently from a plain copy.
    """

    def change(probe: Probe, dtype: torch.dtype = torch.float64) -> Tensor:
        plain = on_host(module, weight(), bias, dtype)
        twin = _twin(layer, {id(module): plain, id(forward): plain.forward}, dtype)
        if isinstance(twin.__dict__.get("multiplier"), (int, float)):
            twin.__dict__["multiplier"] = 1.0
        x = probe.x.to(dtype)
        try:
            return probe.pick(twin(x) - plain(x)).double()
        except RuntimeError:  # rotations of LyCORIS are made in float32
            if dtype == torch.float32:
                raise
            return change(probe, torch.float32)

    return TrainedLayer(name, probe_of(module), tuple(weight().shape), change, lambda: host(weight()), cheap=False)


def _twin(layer: nn.Module, memo: dict[int, object], dtype: torch.dtype) -> nn.Module:
    """A copy of the layer in main memory, in evaluation mode."""
    for parameter in layer.parameters():
        memo[id(parameter)] = nn.Parameter(host(parameter, dtype), requires_grad=False)
    for buffer in layer.buffers():
        memo[id(buffer)] = host(buffer, dtype) if buffer.is_floating_point() else buffer.detach().cpu()
    return copy.deepcopy(layer, memo).eval()
