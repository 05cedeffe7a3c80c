# SPDX-License-Identifier: Apache-2.0
"""A whole run: the stages of a method, then the training loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from library.errors import UserError
from library.log import get_logger
from library.planner.memory_plan import plan_memory
from library.stopping import StopRequest
from library.trainers.checks import check
from library.trainers.debug_dataset import write_dataset_sheets
from library.trainers.method import Method
from library.trainers.options import TrainerOptions
from library.trainers.stages import Running, Start, build, choose_compiling, choose_memory, load, restore, schedule
from library.trainers.trainer import Trainer
from library.weights.quick_import import import_diffusers

log = get_logger()
Loop = Callable[[Running, Start], Trainer]


def run(method: Method[TrainerOptions], stop: StopRequest | None = None, loop: Loop = Trainer) -> int:
    """Train. Returns exit code 0, or EXIT_STOPPED if the run was asked to stop. Raises UserError and StopTraining."""
    try:
        return _run(method, stop or StopRequest(), loop)
    except Exception as error:
        line = method.explained(error)
        if line is None:
            raise
        raise UserError(line) from error


def _run(method: Method[TrainerOptions], stop: StopRequest, loop: Loop) -> int:
    if (minutes := method.options.train.max_train_minutes) is not None:
        stop.most_seconds = 60 * minutes
    checked, options = check(method, stop), method.options
    accelerator = checked.processes.accelerator
    if options.data.debug_dataset:
        if checked.processes.is_main:
            write_dataset_sheets(checked.data, Path(options.save.output_dir or "."))
        accelerator.end_training()
        return 0
    scheduled = schedule(checked)
    if options.memory.plan:
        if checked.processes.is_main:
            sys.stdout.write(plan_memory(choose_compiling(scheduled).planned).table())
        accelerator.end_training()
        return 0
    if scheduled.is_finished:
        log.info(f"--resume auto: the run is finished, all of its {scheduled.plan.total_steps} steps are done")
        accelerator.end_training()
        return 0
    import_diffusers()
    loaded = load(choose_memory(scheduled))
    stop.check()
    running = build(loaded)
    try:
        code = loop(running, restore(running)).train()
        running.memory.keep_code()
        return code
    finally:
        running.memory.close()
