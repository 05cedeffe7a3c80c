# SPDX-License-Identifier: Apache-2.0
"""One training step of a run on tensors without memory: what it would take, before a weight is read.

Models are built from the headers of their files, the method builds what learns on them, and one batch of the largest
bucket goes forward and backward, all under torch's FakeTensorMode: only shapes, dtypes and lifetimes are real.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.data.plan import BatchPlan, each_shape
from library.families.family import ModelFamily
from library.memory.estimate import StepFigures
from library.memory.meter import Meter, watched
from library.memory.quantise import Storage
from library.optim.in_backward import units
from library.trainers.options import TrainerOptions
from library.trainers.preparation import Preparation
from library.trainers.settings import trained_dtype
from library.trainers.step import Pass
from library.trainers.trainables import Models, StepModule, Trainables
from library.types import Batch, Tokens
from library.weights.text import CHUNK

ENDLESS = 1 << 30  # longer than any text
FILES_OF_WEIGHTS = ("base_weights", "network_weights")


class Simulated(Protocol):
    """What is used of a Trainer: after its plan is made, before its models are loaded."""

    family: ModelFamily
    options: TrainerOptions
    prepared: Preparation
    device: torch.device
    dtype: torch.dtype
    models: Models

    @property
    def learning(self) -> frozenset[str]: ...
    @property
    def conditioned(self) -> bool: ...
    @property
    def steps_in_backward(self) -> bool: ...
    def storage(self, part: str) -> Storage: ...
    def load_dtype(self, part: str) -> torch.dtype: ...
    def build_trainables(self) -> Trainables: ...


@dataclass(frozen=True)
class Simulation:
    """What a step was found to take, in bytes."""

    step: StepFigures
    encoder_blocks: int  # the first blocks of `step` are layers of text encoders that learn, the others the denoiser's
    encoders: int  # weights of the text encoders that learn
    vae: int  # weights of a VAE that encodes in each step
    batch: int
    learning: int  # weights of adapters; 0 where the models' own weights learn
    shapes: tuple[tuple[int, ...], ...]  # of what the optimizer steps
    dtype: torch.dtype  # of these weights
    flat: bool  # gradients are always there
    samples: int
    hoists: bool  # whether modulation weights may be away in a pass
    swaps: bool  # whether blocks may be away between steps


class FakeMeter(Meter):
    """A meter of fake tensors.

    Whoever reads a number from one gets what no length exceeds: texts are cut to the longest of a batch.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else ENDLESS
        return super().__torch_dispatch__(func, types, args, kwargs)


def simulate(trainer: Simulated) -> Simulation:
    """One micro-batch of the largest bucket, forward and backward."""
    own: Any = copy.copy(trainer)
    own.options = _without_files(trainer.options)
    plan = largest(trainer.prepared.data.plan_epoch(1))
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        own.models = _models(own)
        trainables = moved(own.build_trainables(), own.device, trained_dtype(own.options.precision))
        flat = trainables.flat and own.prepared.optimizer.row.elementwise and not own.options.distributed.deepspeed
        for parameter in trainables.parameters() if flat else ():
            parameter.grad = torch.zeros_like(parameter)
        return _step(own, trainables, _batch(own, plan), flat=flat)


def largest(plans: Sequence[BatchPlan]) -> BatchPlan:
    """The batch with most pixels."""
    return max(each_shape(plans), key=lambda plan: plan.bucket[0] * plan.bucket[1] * len(plan.samples))


def _without_files(options: TrainerOptions) -> TrainerOptions:
    """Options of a run that neither reads nor writes files of adapters.

    Adapters are built new: those of a file would be as large. With --dim_from_weights only the file says how large.
    """
    changed = {}
    for name, group in vars(options).items():
        values = vars(group)
        if "network_weights" not in values:
            continue
        files = () if values.get("dim_from_weights") else FILES_OF_WEIGHTS
        own: dict[str, Any] = {file: None for file in files if file in values}
        if "lora_format" in values:
            own["lora_format"] = "kohya"  # as adapters have it: nothing has to be named in another way
        changed[name] = replace(group, **own)
    return replace(options, **changed)


# ---- models ---------------------------------------------------------------------------------------------------------


def _models(trainer: Any) -> Models:
    """The denoiser, the text encoders that learn, and the VAE where latents are not cached."""
    family, device = trainer.family, trainer.device
    denoiser = family.empty_denoiser(trainer.load_dtype("denoiser"), trainer.storage("denoiser"))
    names = [name for name in family.encoders if name in trainer.learning]
    encoders = {name: family.part(name).empty(trainer.load_dtype(name), trainer.storage(name)) for name in names}
    vae = None
    if not trainer.options.cache.latents:
        half = not vars(family.options).get("no_half_vae", False)
        vae = family.part("vae").empty(trainer.dtype if half else torch.float32)
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


def encoder_layers(encoder: nn.Module) -> list[nn.Module]:
    """The layers that are recomputed one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in encoder.modules() if isinstance(layer, GradientCheckpointingLayer)]


# ---- the batch ------------------------------------------------------------------------------------------------------


def _batch(trainer: Any, plan: BatchPlan) -> Batch:
    """A batch of the plan's size, with all that batches of this run have."""
    (width, height), count, options = plan.bucket, len(plan.samples), trainer.options
    latent, device = trainer.family.latent, trainer.device
    small = (height // latent.factor, width // latent.factor)
    cached = options.cache.latents
    return Batch(
        names=[""] * count,
        captions=[""] * count,
        loss_weights=torch.ones(count),
        pixels=None if cached else torch.zeros(count, 3, height, width),
        latents=torch.zeros(count, latent.channels, *small, dtype=trainer.dtype) if cached else None,
        latent_seeds=[0] * count,
        cond=trainer.family.blank_cond(count, trainer.dtype),
        masks=torch.ones(count, 1, *(small if cached else (height, width))) if options.data.masked_loss else None,
        original_sizes=torch.zeros(count, 2),
        crop_top_lefts=torch.zeros(count, 2),
        target_sizes=torch.zeros(count, 2),
        control=torch.zeros(count, 3, height, width) if trainer.conditioned else None,
        keep_prior=[False] * count,
    ).to(device)


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch."""
    for value in vars(batch).values():
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, Tensor):
            yield value


# ---- the step -------------------------------------------------------------------------------------------------------


def _step(trainer: Any, trainables: Trainables, batch: Batch, *, flat: bool) -> Simulation:
    family, models, options = trainer.family, trainer.models, trainer.options
    layers = [layer for encoder in models.encoders.values() for layer in encoder_layers(encoder)]
    blocks = family.blocks(models.denoiser)
    modulated = family.modulations(models.denoiser)
    parameters = trainables.parameters()
    if trainer.steps_in_backward:
        for unit in units(trainables.groups, blocks, options.optimizer):
            _step_in_backward(unit)
    model = _Autocast(StepModule(family, models, trainables), trainer)
    objective = family.objective(options.objective, options.loss)
    forward = Pass(family, objective, models, trainables, model, trainer.device, trainer.dtype)
    held = {
        "encoders": [t for encoder in models.encoders.values() for t in _all(encoder)],
        "vae": [*_all(models.vae)] if models.vae is not None else [],
        "denoiser": [*_all(models.denoiser)],
        "learning": [*_all(trainables.module)],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "batch": [*tensors_of(batch)],
    }
    generator = torch.Generator(device=trainer.device)
    meter = FakeMeter(counts_work=True, device=trainer.device)
    sizes = {name: meter.hold(tensors, name) for name, tensors in held.items()}
    with meter, watched(meter, [*layers, *blocks]) as watch:
        noised = forward.noised(batch, generator)
        loss = objective.loss(forward.predict(batch), noised, batch).sum() / batch.size
        del noised
        watch.forward_done()
        loss.backward()
    return Simulation(
        watch.figures(),
        len(layers),
        sizes["encoders"],
        sizes["vae"],
        sizes["batch"],
        sizes["learning"],
        tuple(tuple(p.shape) for p in parameters),
        parameters[0].dtype,
        flat,
        batch.size,
        modulated is None or not trainables.reads_weights(modulated[1]),
        not trainables.reads_between_steps,
    )


class _Autocast(nn.Module):
    """As accelerate wraps a model."""

    def __init__(self, module: nn.Module, trainer: Any) -> None:
        super().__init__()
        self.module, self.device, self.dtype = module, trainer.device.type, trainer.dtype
        self.mixes = trainer.options.precision.mixed_precision != "no"

    def forward(self, x_t: Tensor, t: Tensor, batch: Batch, tokens: Tokens | None) -> Tensor:
        tokens = None if tokens is None else _longest(tokens)
        with torch.autocast(self.device, self.dtype) if self.mixes else nullcontext():
            return self.module(x_t, t, batch, tokens)


def _longest(tokens: Tokens) -> Tokens:
    """The same tokens as those of captions that leave no room for padding."""
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


def _all(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
