# SPDX-License-Identifier: Apache-2.0
"""Simulation of one training step on tensors without memory, before any weight is read.

Models are built from the headers of their files, the method builds what learns on them, and one batch of the largest
bucket goes forward and backward, all under torch's FakeTensorMode: only shapes, dtypes and lifetimes are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from library.learning import DENOISER, Models, StepModule, Trainables
from library.memory.estimate import StepFigures
from library.memory.host_image import tensors_of
from library.memory.meter import Meter, watched
from library.optim.in_backward import units
from library.optim.working_copy import Use, WorkingCopy
from library.planner.planned import Planned
from library.types import Batch, Tokens
from library.weights.text import CHUNK

ENDLESS = 1 << 30  # longer than any text


@dataclass(frozen=True)
class Simulation:
    """The memory of a simulated step, in bytes."""

    step: StepFigures
    encoder_blocks: int  # the first blocks of `step` are layers of text encoders that learn, the others the denoiser's
    encoders: int  # weights of the text encoders that learn
    vae: int  # weights of a VAE that encodes in each step
    batch: int
    learning: int  # weights of adapters; 0 where the models' own weights learn
    shapes: tuple[tuple[int, ...], ...]  # of what the optimizer steps
    dtype: torch.dtype  # of these weights between passes
    flat: bool  # gradients are always there
    samples: int
    hoists: bool  # whether modulation weights may be away in a pass
    swaps: bool  # whether blocks may be away between steps


class FakeMeter(Meter):
    """A meter of fake tensors.

    A number read from a fake tensor is larger than any length: texts are cut to the longest of a batch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else ENDLESS
        return super().__torch_dispatch__(func, types, args, kwargs)


def simulate(planned: Planned) -> Simulation:
    """One micro-batch of the largest bucket, forward and backward."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        models = _models(planned)
        trainables = moved(planned.build(models), planned.device, planned.pass_dtype)
        flat = trainables.flat and planned.optimizer.row.elementwise and not planned.deepspeed
        for parameter in trainables.parameters() if flat else ():
            parameter.grad = torch.zeros_like(parameter)
        copies = _use_copies(trainables, planned.dtype) if flat else []
        return _step(planned, models, trainables, _batch(planned), copies, flat=flat)


# ---- models ---------------------------------------------------------------------------------------------------------


def _models(planned: Planned) -> Models:
    """The denoiser, the text encoders that learn, and the VAE where latents are not cached."""
    family, device = planned.family, planned.device
    merged = replace(planned.learning, merges=False)  # nothing is merged here: models are as they will be afterwards
    empty = lambda name: family.part(name).empty(planned.load_dtype(name), merged.storage(name, planned.choice))
    denoiser = family.empty_denoiser(planned.load_dtype(DENOISER), merged.storage(DENOISER, planned.choice))
    encoders = {name: empty(name) for name in family.encoders if name in planned.learning.parts}
    vae = None
    if not planned.caches_latents:
        vae = family.part("vae").empty(family.vae_dtype(planned.dtype))
    models = Models(denoiser, encoders, vae)
    for module in models.all():
        materialise(module, device)
        module.requires_grad_(False)
    return models


def materialise(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None = None
) -> dict[nn.Parameter, nn.Parameter]:
    """Give a module new tensors of the active FakeTensorMode on `device`; old parameters -> new ones.

    New ones, because a fake tensor stays on the device that it was made on, whatever becomes of its `data`: neither
    `module.to` nor an assignment moves it. dtype: of what is floating point; None: as it is.
    """

    def fake(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device=device)

    parameters = {p: nn.Parameter(fake(p), p.requires_grad) for p in module.parameters()}
    buffers = {buffer: fake(buffer) for buffer in module.buffers()}
    for child in module.modules():
        child._parameters.update({n: parameters[p] for n, p in child._parameters.items() if p is not None})
        child._buffers.update({n: buffers[b] for n, b in child._buffers.items() if b is not None})
    return parameters


def moved(trainables: Trainables, device: torch.device, dtype: torch.dtype) -> Trainables:
    """What learns, as new fake tensors on `device`: in its module, and in the optimizer's groups."""
    made = materialise(trainables.module, device, dtype)
    groups = [{**group, "params": [made[p] for p in group["params"]]} for group in trainables.groups]
    modules = {name: [made[p] for p in parameters] for name, parameters in trainables.modules.items()}
    return replace(trainables, groups=groups, modules=modules)


def _use_copies(trainables: Trainables, dtype: torch.dtype) -> list[WorkingCopy]:
    """Working copies of what learns, as a run has them (`WorkingCopies`), in use from now on."""
    if trainables.use_copies is None:
        return []
    use = Use()
    use.going_on = True
    copies: dict[Tensor, WorkingCopy] = {}
    for parameter in trainables.parameters():
        assert parameter.grad is not None
        value, gradient = parameter.detach(), parameter.grad
        if parameter.dtype != dtype:
            value, gradient = torch.zeros_like(value, dtype=dtype), torch.zeros_like(value, dtype=dtype)
        copies[parameter] = WorkingCopy(parameter, value, gradient, use)
    trainables.use_copies(copies.get)
    return [copy for parameter, copy in copies.items() if copy.gradient is not parameter.grad]


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers that are recomputed one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in encoder.modules() if isinstance(layer, GradientCheckpointingLayer)]


# ---- the batch ------------------------------------------------------------------------------------------------------


def _batch(planned: Planned) -> Batch:
    """A batch of the largest size, with all that batches of this run have."""
    (width, height), count = planned.batch.bucket, len(planned.batch.samples)
    latent, cached, family = planned.family.latent, planned.caches_latents, planned.family
    small = (height // latent.factor, width // latent.factor)
    shown = [(height, width) for width, height in planned.batch.references]
    encoded = [torch.zeros(count, latent.channels, h // latent.factor, w // latent.factor) for h, w in shown]
    return Batch(
        names=[""] * count,
        captions=[""] * count,
        loss_weights=torch.ones(count),
        pixels=None if cached else torch.zeros(count, 3, height, width),
        latents=torch.zeros(count, latent.channels, *small, dtype=planned.dtype) if cached else None,
        latent_seeds=[0] * count,
        references=tuple(encoded) if cached else (),
        reference_pixels=() if cached else tuple(torch.zeros(count, 3, h, w) for h, w in shown),
        cond=family.blank_cond(count, planned.dtype),
        masks=torch.ones(count, 1, *(small if cached else (height, width))) if planned.masked_loss else None,
        original_sizes=torch.zeros(count, 2),
        crop_top_lefts=torch.zeros(count, 2),
        target_sizes=torch.zeros(count, 2),
        control=torch.zeros(count, 3, height, width) if planned.learning.conditioned else None,
        keep_prior=[False] * count,
    ).to(planned.device)


# ---- the step -------------------------------------------------------------------------------------------------------


def _step(
    planned: Planned, models: Models, trainables: Trainables, batch: Batch, copies: Sequence[WorkingCopy], *, flat: bool
) -> Simulation:
    """copies: those of what learns that take memory of their own."""
    family, parameters = planned.family, trainables.parameters()
    layers = [layer for encoder in models.encoders.values() for layer in encoder_layers(encoder)]
    blocks = family.blocks(models.denoiser)
    modulated, split = family.modulations(models.denoiser), planned.split_weights(models.denoiser)
    if planned.learning.in_backward is not None:
        for unit in units(trainables.groups, blocks, planned.learning.in_backward):
            _step_in_backward(unit)
    loss_of = planned.loss_of(models, trainables, _Autocast(StepModule(family, models, trainables), planned))
    held = {
        "encoders": [t for encoder in models.encoders.values() for t in tensors_of(encoder)],
        "vae": tensors_of(models.vae) if models.vae is not None else [],
        "denoiser": tensors_of(models.denoiser),
        "learning": [*tensors_of(trainables.module), *(t for copy in copies for t in (copy.value, copy.gradient))],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "batch": [leaf for leaf in tree_leaves(vars(batch)) if isinstance(leaf, Tensor)],
    }
    meter = FakeMeter(counts_work=True, device=planned.device)
    sizes = {name: meter.hold(tensors, name) for name, tensors in held.items()}
    with meter, watched(meter, [*layers, *blocks]) as watch:
        loss = loss_of(batch)
        watch.forward_done()
        loss.backward()
    return Simulation(
        watch.figures(),
        len(layers),
        sizes["encoders"],
        sizes["vae"],
        sizes["batch"],
        sizes["learning"],
        tuple(_own_shape(p, planned.processes) if p in split else tuple(p.shape) for p in parameters),
        planned.trained_dtype,
        flat,
        batch.size,
        modulated is None or not trainables.reads_weights(modulated[1]),
        not trainables.reads_between_steps,
    )


def _own_shape(parameter: Tensor, processes: int) -> tuple[int, ...]:
    """The shape of the first process's rows of a weight."""
    return (-(-len(parameter) // processes), *parameter.shape[1:])


class _Autocast(nn.Module):
    """A model in autocast, as accelerate wraps it."""

    def __init__(self, module: nn.Module, planned: Planned) -> None:
        super().__init__()
        self.module, self.device, self.dtype = module, planned.device.type, planned.dtype
        self.mixes = planned.autocast

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, tokens: Tokens | None) -> Tensor:
        tokens = None if tokens is None else _longest(tokens)
        with torch.autocast(self.device, self.dtype) if self.mixes else nullcontext():
            return self.module(x_t, t, batch, tokens)


def _longest(tokens: Tokens) -> Tokens:
    """Tokens as long as those of captions that leave no room for padding."""
    full = {name: ids.shape[1] if ids.ndim == 2 else ids.shape[1] * CHUNK + 2 for name, ids in tokens.ids.items()}
    return replace(tokens, lengths={name: (full[name],) * len(ids) for name, ids in tokens.ids.items()})


def _step_in_backward(unit: Sequence[nn.Parameter]) -> None:
    """Free the gradients of weights as soon as all of them are there."""
    missing = len(unit)

    def arrived(parameter: Tensor) -> None:
        nonlocal missing
        missing -= 1
        for one in unit if missing == 0 else ():
            one.grad = None

    for parameter in unit:
        parameter.register_post_accumulate_grad_hook(arrived)
