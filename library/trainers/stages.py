# SPDX-License-Identifier: Apache-2.0
"""The stages of a run before its first step: each owns what is known by then, and a function leads to the next one.

Checked    options, data and files are valid, and the processes are connected
Scheduled  the length of the run and its memory options are known
Loaded     the caches are filled and the models are loaded
Running    the weights that learn, their optimizer, and everything else that a step needs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.data.dataset import TrainingData
from library.data.plan import BatchPlan, EpochPlan
from library.data.scan import Scan
from library.device import (
    free_memory,
    is_card,
    limit_memory,
    seed_everything,
)
from library.errors import UserError
from library.exchange import least
from library.families.family import ModelFamily
from library.io.weights_port import ReplicatedWeights, ShardedBase, ShardedWeights, WeightsPort
from library.io.zero_states import ZeroStates
from library.learning import DENOISER, Learning, Models, StepModule, Trainables
from library.log import get_logger
from library.memory.checkpointing import recompute_encoders
from library.memory.choice import MemoryChoice
from library.memory.estimate import CUDA_CONTEXT
from library.memory.sharding import LocalShards, shard, shard_learning
from library.objectives.base import Objective
from library.objectives.selective import SelectiveObjective
from library.optim.in_backward import units
from library.optim.optimizers import OptimizerChoice
from library.optim.schedulers import check_scheduler
from library.planner.compiling import with_compilation
from library.planner.memory_plan import PeakCheck, memory_to_use, plan_memory
from library.planner.planned import Loss, Planned, largest
from library.rng import derive_seed, torch_generator
from library.sampling.prompts import Prompt
from library.sampling.references import texts_of
from library.stopping import StopRequest
from library.trainers.caching import Caches, encoders_that_stay, filled_by_all, vae_that_stays
from library.trainers.facts import RunRecord
from library.trainers.memory import Memory, moves_weights, static_shapes
from library.trainers.method import Method
from library.trainers.options import TrainerOptions
from library.trainers.out_of_memory import Retry
from library.trainers.previews import Previews
from library.trainers.resume import Resumption, RunIdentity
from library.trainers.run_plan import RunPlan, describe, make_plan
from library.trainers.settings import compute_dtype, trained_dtype
from library.trainers.signals import Passes
from library.trainers.step import Pass, Step
from library.trainers.updates import Updates
from library.trainers.validation import Validation
from library.types import Position

log = get_logger()
WARMED_SHAPES = 3  # compiled before the first step: all that are static; of dynamic ones, each differs a little


@dataclass(frozen=True)
class Processes:
    """This process and the others of the run."""

    accelerator: Accelerator
    device: torch.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.accelerator.is_main_process


@dataclass(frozen=True)
class Checked:
    """A run whose options, data and files are valid. No model is loaded."""

    method: Method[TrainerOptions]
    learning: Learning
    found: Scan
    data: TrainingData
    validation_plans: EpochPlan | Sequence[BatchPlan]
    prompts: tuple[Prompt, ...]  # of the previews
    optimizer: OptimizerChoice
    seed: int
    resumption: Resumption
    processes: Processes
    stop: StopRequest

    @property
    def family(self) -> ModelFamily:
        """The model family."""
        return self.method.family

    @property
    def options(self) -> TrainerOptions:
        """The options of the run."""
        return self.method.options

    @property
    def sharded(self) -> bool:
        """Whether the denoiser's weights are split over several processes."""
        return self.options.distributed.shard_base and self.processes.world > 1

    @property
    def shards_learn(self) -> bool:
        """Whether the split weights learn."""
        return self.sharded and DENOISER in self.learning.changed

    @cached_property
    def passes(self) -> Passes:
        """The rules of previews and validation. The first access is collective."""
        return Passes(self.stop, together=self.sharded)


@dataclass(frozen=True)
class Scheduled:
    """A run whose length and memory options are known."""

    checked: Checked
    plan: RunPlan
    identity: RunIdentity
    planned: Planned  # with the planner's choice, if it was asked
    peak_check: PeakCheck | None = None  # of the planner's prediction

    @property
    def is_finished(self) -> bool:
        """Whether --resume auto has found a run with nothing left to do."""
        return self.identity.is_finished(self.checked.resumption)


@dataclass(frozen=True)
class Loaded:
    """A run with its models and caches."""

    scheduled: Scheduled
    objective: Objective
    models: Models
    data: TrainingData
    previews: Previews


@dataclass(frozen=True)
class Running:
    """A run that is ready for its first step."""

    loaded: Loaded
    trainables: Trainables
    memory: Memory
    updates: Updates
    step: Step
    validation: Validation
    record: RunRecord
    port: WeightsPort  # gathers weights and states for files, and scatters them


@dataclass(frozen=True)
class Start:
    """Where a run begins: at its first step, or at a saved state."""

    position: Position = field(default_factory=Position)
    losses: Sequence[float] = ()  # of the steps before, for their moving average


# ---- scheduled ------------------------------------------------------------------------------------------------------


def schedule(checked: Checked) -> Scheduled:
    """The length of the run, checked against its schedule and its state, and logged. Raises UserError."""
    options, processes, data = checked.options, checked.processes, checked.data
    plan = make_plan(
        total_batches=data.batches_per_epoch,
        shares=data.shares,
        num_processes=processes.world,
        accumulation=options.train.gradient_accumulation_steps,
        max_steps=options.train.max_train_steps,
        max_epochs=options.train.max_train_epochs,
        seed=checked.seed,
    )
    check_scheduler(options.scheduler, checked.optimizer, total_steps=plan.total_steps)
    identity = RunIdentity(options, checked.optimizer, checked.found, checked.seed, plan)
    identity.check(checked.resumption)
    for line in describe(checked.found, data, plan) if processes.is_main else ():
        log.info(line)
    planned = as_planned(
        checked.method, checked.learning, checked.optimizer, largest(data.each_shape()), device=processes.device,
        processes=processes.world if checked.sharded else 1,
    )  # fmt: skip
    return Scheduled(checked, plan, identity, planned)


def as_planned(
    method: Method[TrainerOptions], learning: Learning, optimizer: OptimizerChoice, batch: BatchPlan, *,
    device: torch.device, processes: int = 1,
) -> Planned:  # fmt: skip
    """The run as the planner sees it. batch: the largest of the run. processes: that split the denoiser."""
    family, options = method.family, method.options
    choice, dtype = MemoryChoice.of(options.memory), compute_dtype(options.precision)

    def loss_of(models: Models, trainables: Trainables, model: nn.Module) -> Loss:
        objective = family.objective(options.objective, options.loss)
        forward = Pass(family, objective, models, trainables, model, device, dtype)
        return partial(forward.mean_loss, generator=torch.Generator(device=device))

    return Planned(
        family,
        learning,
        choice,
        options.memory,
        optimizer,
        batch,
        device,
        dtype,
        trained_dtype(options.precision),
        build=lambda models: method.build(models, choice, files=False),
        loss_of=loss_of,
        bf16_update=options.bf16_update,
        autocast=options.precision.mixed_precision != "no",
        averages_weights=options.ema.ema_decay is not None,
        deepspeed=options.distributed.deepspeed,
        processes=processes,
        caches_latents=options.cache.latents,
        caches_texts=options.cache.texts,
        masked_loss=options.data.masked_loss,
    )


def choose_compiling(scheduled: Scheduled) -> Scheduled:
    """Ask the planner whether compiling pays, if requested."""
    planned, checked, plan = scheduled.planned, scheduled.checked, scheduled.plan
    if not planned.memory.compiles_where_it_pays:
        return scheduled
    given = {"--shard_base": checked.options.distributed.shard_base, "--deepspeed": planned.deepspeed}
    forbidden = next((f"{flag} does not work with it" for flag, is_given in given.items() if is_given), None)
    graphs = max(1, static_shapes(planned.family, len(shapes_of(checked.data))))
    batches = plan.total_steps * plan.accumulation
    return replace(
        scheduled, planned=with_compilation(planned, batches=batches, graphs=graphs, forbidden=forbidden)
    )  # fmt: skip


def shapes_of(data: TrainingData) -> list[BatchPlan]:
    """One batch of each size of pictures and batches."""
    found = {(batch.bucket, len(batch.samples)): batch for batch in data.each_shape()}
    return [*found.values()]


def choose_memory(scheduled: Scheduled) -> Scheduled:
    """Ask the planner for a choice, if requested, and limit device memory to --vram_budget."""
    scheduled = choose_compiling(scheduled)
    planned, budget = scheduled.planned, scheduled.planned.memory.vram_budget
    if not planned.memory.asks_planner:
        return scheduled
    plan = plan_memory(planned)
    limit = memory_to_use(planned.device, budget)
    if planned.processes > 1:  # all must make the same passes
        limit = least(limit, planned.device)
    choice = plan.choose(limit)
    peak_check = PeakCheck(plan.needs(choice), planned.device) if is_card(planned.device) else None
    if budget is not None:
        limit_memory(planned.device, budget - CUDA_CONTEXT)
    return replace(scheduled, planned=replace(planned, choice=choice), peak_check=peak_check)


# ---- loaded ---------------------------------------------------------------------------------------------------------


def load(scheduled: Scheduled) -> Loaded:
    """Fill the caches, then load what the steps need. Each model is freed as soon as it has no more work."""
    checked, planned, plan = scheduled.checked, scheduled.planned, scheduled.plan
    family, options, processes, stop = checked.family, checked.options, checked.processes, checked.stop
    prompts, learning = checked.prompts, checked.learning
    objective = SelectiveObjective(family.objective(options.objective, options.loss), options.loss)
    size = checked.found.datasets[0].config.buckets.resolution
    caches = Caches(
        family, options, checked.data, planned.dtype, learning=learning.parts,
        more_texts=texts_of(prompts, family.references, size, family.latent.factor), check=stop.check,
    )  # fmt: skip
    previews = Previews(
        family, objective, options, prompts, device=planned.device, dtype=planned.dtype, seed=plan.seed,
        active=processes.is_main or checked.sharded, writes=processes.is_main, size=size, texts=caches.texts,
        conditioned=learning.conditioned, passes=checked.passes,
    )  # fmt: skip

    def load_encoder(name: str, device: str | None = None) -> nn.Module:
        dtype, storage = planned.load_dtype(name), planned.storage(name)
        return family.load_text_encoder(name, dtype, device or planned.device, storage=storage)

    with filled_by_all(caches):
        encoders = encoders_that_stay(caches, load_encoder)
        vae = vae_that_stays(caches, lambda: family.load_vae(planned.dtype, planned.device), previews=bool(prompts))
    free_memory()
    data = checked.data.prepared(
        total_steps=plan.total_steps, stages=plan.stages, latents=caches.latents, texts=caches.texts,
        join=family.join_conds,
        shown=family.references is not None and not family.references.seen_by.isdisjoint(encoders),
    )  # fmt: skip
    # weights that are swapped or split are loaded into main memory: the whole model may not fit on the card
    waits = moves_weights(planned.choice, learning.swap_options) or checked.sharded
    device = torch.device("cpu") if waits else planned.device
    dtype: torch.dtype | None = planned.load_dtype(DENOISER)
    if checked.shards_learn and not family.part(DENOISER).file.is_float8:
        dtype = None  # the file is mapped; each block is cast when it is split
    denoiser = family.load_denoiser(dtype, device, storage=planned.storage(DENOISER))
    models = Models(denoiser, encoders, vae)
    for module in models.all():
        module.requires_grad_(False)
    return Loaded(scheduled, objective, models, data, previews)


# ---- running --------------------------------------------------------------------------------------------------------


def build(loaded: Loaded) -> Running:
    """Build the weights that learn, their optimizer, and the memory-saving methods. Raises UserError."""
    checked, planned, plan = loaded.scheduled.checked, loaded.scheduled.planned, loaded.scheduled.plan
    family, options, models = checked.family, checked.options, loaded.models
    seed_everything(derive_seed(plan.seed, "first weights"))
    blocks, shards_learn = family.blocks(models.denoiser), checked.shards_learn
    if shards_learn:
        assert checked.optimizer.row.block is not None  # `check_sharding` has said so
        autocast = planned.autocast and planned.trained_dtype != planned.dtype
        shard_learning(
            models.denoiser, blocks, planned.device, optional=family.optional(models.denoiser),
            kept=planned.trained_dtype,
            gathered=planned.dtype if autocast else None, block=checked.optimizer.row.block,
        )  # fmt: skip
    trainables = checked.method.build(models, planned.choice)
    if not shards_learn:  # shards are at their final location
        trainables.module.to(planned.device, planned.trained_dtype)
    if planned.choice.activation_budget < 1:
        recompute_encoders([e for name, e in models.encoders.items() if name in trainables.encoders])
    trainables.check_format()
    if checked.sharded and not shards_learn:
        if trainables.reads_between_steps:
            raise UserError("--shard_base: ggpo_sigma and ggpo_beta read all weights after each step; leave it out")
        shard(models.denoiser, blocks, planned.device)
    memory = Memory(
        family, models.denoiser, planned.choice, options.memory, checked.learning.swap_options, planned.device
    )
    shapes = shapes_of(loaded.data)
    memory.prepare(shapes=len(shapes))
    accelerator = checked.processes.accelerator
    module = StepModule(family, models, trainables)
    updates = Updates(
        options, checked.optimizer, trainables, module, accelerator, total_steps=plan.total_steps, seed=plan.seed,
        dtype=planned.dtype, sharded=checked.sharded, shards=LocalShards(trainables.groups) if shards_learn else None,
    )  # fmt: skip
    memory.move_activations(trainables.parameters())
    if (stepped := checked.learning.in_backward) is not None:
        together = units(trainables.groups, memory.blocks, stepped)
        memory.steps_in_backward(updates.step_in_backward(together, memory.changed))
    forward = Pass(
        family, loaded.objective, models, trainables, updates.model, planned.device, planned.dtype, memory.around
    )  # fmt: skip
    retry = Retry(updates, memory, allowed=checked.processes.world == 1 and not planned.deepspeed)
    step = Step(forward, updates, memory, retry, accelerator, plan.seed)
    validation = Validation(
        options.train, checked.validation_plans, loaded.data, forward, plan.seed, plan.total_steps,
        checked.passes,
    )  # fmt: skip
    if memory.compiled is not None:
        compile_all(loaded, trainables, forward, memory, shapes[:WARMED_SHAPES])
    free_memory()  # of the weights as they were before they were joined
    record = record_of(loaded, trainables)
    return Running(
        loaded,
        trainables,
        memory,
        updates,
        step,
        validation,
        record,
        port_of(checked, trainables, updates),
    )


def port_of(checked: Checked, trainables: Trainables, updates: Updates) -> WeightsPort:
    """The port that gathers weights and states for files."""
    if checked.options.distributed.splits_states:
        return ZeroStates(updates.grouped, updates.optim.optimizer)
    if checked.shards_learn:
        return ShardedWeights(trainables.parameters(), trainables.state())
    return ShardedBase() if checked.sharded else ReplicatedWeights()


def compile_all(
    loaded: Loaded, trainables: Trainables, forward: Pass, memory: Memory, plans: Sequence[BatchPlan]
) -> None:
    """Compile the blocks for batches of these sizes before the first step."""

    def one_pass(plan: BatchPlan) -> Tensor:
        generator = torch_generator(loaded.scheduled.plan.seed, "compiling", device=forward.device)
        return forward.mean_loss(loaded.data.load(plan, step=0).to(forward.device), generator)

    parameters = trainables.parameters()
    # all weights that learn, or the first ones, before every block: the backward pass then goes through all blocks
    memory.compile_ahead([partial(one_pass, plan) for plan in plans], parameters if trainables.flat else parameters[:1])


def record_of(loaded: Loaded, trainables: Trainables) -> RunRecord:
    """The record of the run for the metadata of saves."""
    checked, plan = loaded.scheduled.checked, loaded.scheduled.plan
    return RunRecord(
        checked.options,
        plan,
        [(dataset.config, dataset.samples) for dataset in checked.found.datasets],
        loaded.data,
        checked.family.facts(),
        checked.family.model_names() if trainables.facts is not None else {},  # hashing gigabytes takes time
    )


# ---- where it begins -----------------------------------------------------------------------------------------------


def restore(running: Running) -> Start:
    """Load the state of --resume, or skip to --initial_step or --initial_epoch. Raises UserError."""
    scheduled = running.loaded.scheduled
    plan, options = scheduled.plan, scheduled.checked.options.state
    parts, start = scheduled.checked.resumption.taken(), Start()
    if parts is not None:
        running.memory.home()
        running.updates.load(running.port.scatter(parts))
        if changed := scheduled.identity.changed_schedule(parts):
            log.warning(f"--resume: from here on the learning-rate schedule is another one: {', '.join(changed)}")
        start = Start(Position(parts.step, parts.epoch, parts.batch), parts.losses)
        log.info(f"resumed at step {parts.step} of {plan.total_steps}, epoch {parts.epoch + 1}, batch {parts.batch}")
    elif options.initial_step or options.initial_epoch:
        step = options.initial_step or plan.step_of_epoch((options.initial_epoch or 1) - 1)
        start = Start(plan.position_of(step))
        running.updates.skip_schedule(step)
    plan.require_steps_after(start.position.step)
    return start
