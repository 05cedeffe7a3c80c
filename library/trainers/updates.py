# SPDX-License-Identifier: Apache-2.0
"""From gradients to new weights: clipping, the optimizer, its schedule, the moving average, and their states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from library.errors import UserError, first_names
from library.io.state import StateParts, unlike
from library.learning import StepModule, Trainables
from library.memory.sharding import LocalShards
from library.optim.bf16 import build_bf16
from library.optim.ema import Ema
from library.optim.flat import FlatParameters
from library.optim.in_backward import InBackward
from library.optim.optimizers import OptimizerChoice
from library.optim.replicas import Replicas
from library.optim.schedulers import build_scheduler
from library.optim.working_copy import WorkingCopies
from library.planner.optimizer_memory import appetite
from library.trainers.options import TrainerOptions

LIKE_WEIGHT = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z")  # of an optimizer's state: as large as the weight


@dataclass
class Exchange(DistributedDataParallelKwargs):
    """Arguments of DistributedDataParallel, with one that accelerate does not name."""

    init_sync: bool = True  # whether the weights of the first process are sent to all others


class Updates:
    """The optimizer of a run and its schedule, scaler and average. Made when weights are at their final location."""

    def __init__(
        self, options: TrainerOptions, choice: OptimizerChoice, trainables: Trainables, module: StepModule,
        accelerator: Accelerator, *, total_steps: int, seed: int, dtype: torch.dtype, sharded: bool = False,
        shards: LocalShards | None = None,
    ) -> None:  # fmt: skip
        """module: of the run; accelerate wraps it as `model`, which every pass must call from now on.

        dtype: of the computation.
        sharded: some weights of `module` are split over processes, so DistributedDataParallel cannot wrap it.
        shards: of the weights that learn, if those may be split.
        """
        self.options, self.choice, self.trainables, self.accelerator = options, choice, trainables, accelerator
        joined = choice.row.elementwise and trainables.flat and not options.distributed.deepspeed
        self.flat = FlatParameters(trainables.groups) if joined else None
        self.copies: WorkingCopies | None = None
        if self.flat is not None and trainables.use_copies is not None:
            self.copies = WorkingCopies(self.flat, dtype)
            trainables.use_copies(self.copies.find)
        self.shards = shards
        self.weights = shards.weights if shards is not None else trainables.parameters()  # what the optimizer steps
        self.exchanged: FlatParameters | Replicas | None = None  # gradients that are added up here
        if shards is not None:  # the gradients of split weights are added up already
            self.exchanged = Replicas(shards.whole)
        elif accelerator.num_processes > 1:
            self.exchanged = self.flat or (Replicas(trainables.parameters()) if sharded else None)
            if self.exchanged is not None:
                self.exchanged.broadcast_weights()
        groups = self.flat.param_groups if self.flat else shards.param_groups if shards else trainables.groups
        self.grouped = [[*group["params"]] for group in groups]  # DeepSpeed replaces those of the optimizer
        rows = shards.rows() if shards is not None else None
        self.optim = build_bf16(choice, groups, options.bf16_update, seed=seed, rows=rows)
        self.in_backward: InBackward | None = None
        # DDP learns a static graph from the first pass; exchanging in every pass gives the same result, only slower
        self._first_exchanges = options.distributed.ddp_static_graph
        self._room: Tensor | None = None
        self._has_states = False
        decay = options.ema.ema_decay
        self.ema = Ema(self.weights, decay, self.flat) if decay is not None else None
        exchanges = self.flat is None and not sharded
        # DDP and DeepSpeed divide the sum of all gradients by the number of processes, and shares of a step add up to 1
        self.loss_factor = accelerator.num_processes if exchanges else 1
        self.model, self.optimizer = self._wrapped(module, exchanges=exchanges)
        self.scheduler = build_scheduler(options.scheduler, self.optim, total_steps=total_steps)
        self.optim.train_mode()

    def _wrapped(self, module: StepModule, *, exchanges: bool) -> tuple[nn.Module, AcceleratedOptimizer]:
        """exchanges: whether the wrapper exchanges gradients."""
        if not exchanges:  # "evaluation": not for DDP, which would put its own gradients in place of the views
            model = self.accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
            return model, self.accelerator.prepare_optimizer(self.optim.optimizer)
        self.accelerator.ddp_handler = self._exchange()
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        unshared = [*frozen, *(name for name, _ in module.named_buffers())]
        # every process has read the same files, and weights in main memory cannot be broadcast
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, unshared)
        # all weights are at their final location, and those in main memory must stay there
        places = {} if self.options.distributed.deepspeed else {"device_placement": [False, True]}
        return self.accelerator.prepare(module, self.optim.optimizer, **places)

    def _exchange(self) -> Exchange:
        """Arguments of DistributedDataParallel."""
        options, trainables = self.options.distributed, self.trainables
        # --clip_skip leaves the last layers of a text encoder without gradient
        skips = bool(trainables.encoders) or trainables.skips
        return Exchange(
            gradient_as_bucket_view=options.ddp_gradient_as_bucket_view,
            static_graph=options.ddp_static_graph,
            broadcast_buffers=False,
            find_unused_parameters=skips and not options.ddp_static_graph,
            init_sync=not trainables.read_from_files,
        )

    def step_in_backward(
        self, units: Sequence[Sequence[nn.Parameter]], changed: Callable[[Sequence[Tensor]], None]
    ) -> InBackward:
        """Step each of `units` as soon as its gradients are complete. changed: called with the weights stepped."""
        limit = self.options.optimizer.max_grad_norm
        self.in_backward = InBackward(self.optim.optimizer, units, limit, changed)
        return self.in_backward

    # ---- room for the optimizer's states: made in its first step, which cannot be repeated halfway ------------------

    def hold_room(self) -> None:
        """Reserve the memory of the optimizer's states until they are made.

        If the first step does not fit beside them, it then runs out of memory in a pass, which can be repeated, and
        not after some weights were stepped.
        """
        if self._room is None and not self._has_states:
            self._room = torch.empty(self._bytes_of_states(), dtype=torch.uint8, device=self.accelerator.device)

    def release_room(self) -> None:
        """Free the memory reserved by `hold_room`."""
        self._room = None

    def _bytes_of_states(self) -> int:
        """Bytes of optimizer states on the device, if known; 0 on the CPU, where memory is taken only when used."""
        if self.accelerator.device.type == "cpu" or self.choice.row.paged or self.options.distributed.deepspeed:
            return 0
        weights = self.weights
        dtype = torch.float32 if self.options.bf16_update != "plain" else weights[0].dtype
        hunger = appetite(self.choice, dtype)
        return 0 if hunger.guessed else hunger.states([weight.shape for weight in weights])

    # ---- a step -----------------------------------------------------------------------------------------------------

    @contextmanager
    def backward(self, *, is_last: bool) -> Iterator[None]:
        """Context manager around a backward pass. In the last of a step, gradients are exchanged, weights may step."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        if self.in_backward is not None:
            self.in_backward.last_micro_batch(is_last)
            if is_last:
                self.release_room()
        exchanges, self._first_exchanges = is_last or self._first_exchanges, False
        quiet = nullcontext() if exchanges else self.accelerator.no_sync(self.model)
        with quiet, self.copies.in_use() if self.copies is not None else nullcontext():
            yield
        if is_last and self.exchanged is not None:
            self.exchanged.add_up_gradients()

    def step(self) -> Tensor:
        """Clip the gradients and step the optimizer. Returns the gradient norm before clipping, on the device."""
        self.release_room()
        if self.in_backward is not None:
            self._has_states = True
            return self.in_backward.finish()
        if self.shards is not None:
            self.shards.take_gradients()
        norm = self.clip_gradients()
        with self.flat.silent_kept(processes=self.accelerator.num_processes) if self.flat else nullcontext():
            self.optimizer.step()
        self._has_states |= not self.optimizer.step_was_skipped  # fp16's first steps often are, and make no states
        return norm

    def clip_gradients(self) -> Tensor:
        """Clip to --max_grad_norm. Returns the norm before clipping, on the device."""
        limit = self.options.optimizer.max_grad_norm or float("inf")
        if self.flat is not None:
            self.flat.require_joined()
            self.accelerator.unscale_gradients(self.optimizer)
            return self.flat.clip_grad_norm(limit)
        if self.shards is not None:
            return self.shards.clip_grad_norm(limit)
        norm = self.accelerator.clip_grad_norm_(self.trainables.parameters(), limit)
        return torch.as_tensor(0.0 if norm is None else norm, device=self.accelerator.device)  # DeepSpeed's is a float

    def rates(self) -> dict[str, float | Tensor]:
        """The learning rate of each group, and its product with the step size if the optimizer finds that itself."""
        found: dict[str, float | Tensor] = {}
        for group, rate in zip(self.optim.optimizer.param_groups, self.scheduler.get_last_lr()):
            name = group.get("name", f"group {len(found)}")
            found[f"lr/{name}"] = rate
            if self.choice.row.finds_rate:
                found[f"lr/d*{name}"] = rate * group["d"]
        return found

    def finish_step(self, step: int) -> None:
        """After optimizer step `step`, counted from 0: clear the gradients, average the weights."""
        self.zero_gradients()
        if self.ema:
            self.ema.update(step)

    def zero_gradients(self) -> None:
        """Clear all gradients."""
        if self.flat is not None:
            self.flat.zero_grad()
        elif self.shards is not None:
            self.shards.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    # ---- weights to show --------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context with the averaged weights in place; on exit the weights are restored bit for bit."""
        parameters = self.weights if self.optim.schedule_free else []
        kept = [p.detach().to("cpu", copy=True) for p in parameters]  # the device may have no room for a copy
        try:
            self.optim.eval_mode()
            with self.ema.swapped() if self.ema else nullcontext():
                yield
        finally:
            self.optim.train_mode()
            with torch.no_grad():  # train_mode() rounds
                for parameter, value in zip(parameters, kept):
                    parameter.copy_(value)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which the model equals the saved file: averaged weights, no dropout, full strength."""
        self.trainables.set_multiplier(1.0)
        was_training = self.trainables.module.training
        self.trainables.module.eval()
        try:
            with self.averaged():
                yield
        finally:
            self.trainables.module.train(was_training)

    # ---- states -----------------------------------------------------------------------------------------------------

    def states(self) -> dict[str, Any]:
        """The fields of StateParts that belong to the optimizer and the weights that learn."""
        scaler = self.accelerator.scaler
        return {
            "weights": self.trainables.state(),
            "optimizer": self.optim.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema": self.ema.state_dict() if self.ema else None,
        }

    def load(self, parts: StateParts) -> None:
        """Continue from a state. Raises UserError if it has other weights or another optimizer."""
        mine, found = ({n: tuple(t.shape) for n, t in w.items()} for w in (self.trainables.state(), parts.weights))
        wrong = sorted(name for name in mine.keys() | found.keys() if mine.get(name) != found.get(name))
        if wrong:
            raise UserError(f"--resume: the state holds other weights than those that learn now: {first_names(wrong)}")
        place = unlike(self.optim.state_dict(), parts.optimizer, "optimizer")
        place = place or unlike(self.scheduler.state_dict(), parts.scheduler, "scheduler")
        if place:
            raise UserError(f"--resume: the state's {place} is not what this run has there")
        try:
            self._load(parts)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"--resume: the state's optimizer or schedule is of another run ({reason})") from None
        states = self.optim.optimizer.state if self.options.bf16_update == "plain" else {}  # else of hidden copies
        for parameter, state in states.items():
            bad = [key for key, value in state.items() if isinstance(value, (str, bytes))]
            own = (key for key in LIKE_WEIGHT if key in state)
            bad += [key for key in own if not isinstance(state[key], Tensor) or state[key].shape != parameter.shape]
            if bad:
                raise UserError(f"--resume: the state's optimizer is of other weights: its {bad[0]} does not fit")

    def _load(self, parts: StateParts) -> None:
        self.trainables.load(parts.weights)
        self.optim.load_state_dict(parts.optimizer)
        self._has_states = True
        self.scheduler.load_state_dict(parts.scheduler)
        if self.accelerator.scaler is not None and parts.scaler is not None:
            self.accelerator.scaler.load_state_dict(parts.scaler)
        if self.ema and parts.ema is not None:
            self.ema.load_state_dict(parts.ema)

    def skip_schedule(self, steps: int) -> None:
        """Fast-forward the schedule by `steps`, unless it follows the loss."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: a schedule before the first optimizer step. Here it is meant
            for _ in range(0 if self.scheduler.needs_loss else steps):
                self.scheduler.step()
