# SPDX-License-Identifier: Apache-2.0
"""Seconds per step, memory, utilisation and idle times of training on this card, beside a plain diffusers + PEFT loop.

    python benchmarks/gpu/run.py
    python benchmarks/gpu/run.py --jobs sdxl_lora,flux_lora_512 --steps 30 --output results.md

Needs a card with CUDA and nothing else: models are random, of the real size and made on the card. Each row is a process
of its own; one that fails is a row that says why. --tiny runs everything on tiny models, also without a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import ROOT, host_line, markdown
from benchmarks.gpu.jobs import JOBS, Card, Way, card_of, chosen, ways, zero_stall_share
from library.cli import guarded
from library.errors import UserError, unknown
from library.families.recipes import BenchmarkJob
from library.machine import System, find_nvidia, private

WARMUP, STEPS = 5, 30
TINY_WARMUP, TINY_STEPS = 1, 2
MINUTES = 15  # after which a row is given up
MACHINE = "machine"  # the name of the process that measures the machine itself
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Failed)(:|$)")  # the last line of a traceback
HEAD = (
    "way", "s/step", "p95", "utilisation", "peak GB", "reserved GB", "set-up GB", "host s/step", "host idle",
    "device idle", "stall s/step", "first step s", "main memory GB", "learns M",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit code 2 where there is nothing to measure on."""
    settings = parse(argv)
    if settings.row:
        return guarded(lambda: measure_row(settings))
    return guarded(lambda: measure_all(settings))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", help=f"names with commas (default: all): {', '.join(JOBS)}")
    parser.add_argument("--ways", help="only rows whose names contain one of these texts, with commas")
    parser.add_argument("--steps", type=int, default=None, help=f"timed steps of a row (default {STEPS})")
    parser.add_argument("--output", type=Path, help="file for the tables")
    parser.add_argument("--peak_tflops", type=float, help="bf16 ceiling of the card (default: known or measured)")
    parser.add_argument("--folder", type=Path, help="folder for caches and compiled blocks (default: a temporary one)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, 2 steps, no card needed: for tests")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what one process does: its job, its way and times, as JSON
    return parser.parse_args(argv)


# ---- all rows -------------------------------------------------------------------------------------------------------


def measure_all(settings: argparse.Namespace) -> int:
    """Every job's table, printed and written as soon as it is there."""
    import torch

    names = check_choice(settings)
    if not settings.tiny and not torch.cuda.is_available():
        raise UserError("no CUDA device here: run this on a machine with one, or give --tiny to test the script itself")
    lines = Lines(settings.output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        card = measure_machine(settings, folder, lines)
        for name in names:
            measure_job(name, settings, folder / name, card, lines)
    return 0


def checked(argv: Sequence[str]) -> None:
    """Ends as the command would where its options are wrong; measures nothing."""
    check_choice(parse(argv))


def check_choice(settings: argparse.Namespace) -> Sequence[str]:
    """The names of the jobs. UserError where jobs, rows or steps are wrong."""
    try:
        names = chosen(settings.jobs)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_ways(settings, names)
    return names


def check_ways(settings: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UserError where a table would have no rows, or rows would have no steps."""
    rows = [way.name for name in names for way in ways(JOBS[name], zero_stall=1.0)]
    for text in settings.ways.split(",") if settings.ways else ():
        if not any(text in row for row in rows):
            raise UserError(unknown("--ways", text, rows, kind="row"))
    if settings.steps is not None and settings.steps < 1:
        raise UserError(f"--steps: 1 or more, not {settings.steps}")


def measure_machine(settings: argparse.Namespace, folder: Path, lines: Lines) -> Card:
    """The head and the first table. Returns what utilisation and zero-stall shares are computed with."""
    from benchmarks.gpu.ceilings import as_card

    # in a process of its own, as the rows: this one keeps off the card, whose memory is theirs
    answer = in_process({"job": MACHINE}, settings, folder / MACHINE)
    failed = isinstance(answer, str)
    name = "this card" if failed else answer["name"]
    lines.add(f"## Training on {name}{', tiny models' if settings.tiny else ''}\n", f"`{command_of(settings)}`\n")
    lines.add(*(() if failed else (f"{answer['device']}  ",)), f"{host_line()}  ", f"{versions_line()}\n")
    if failed:
        lines.add(f"The machine itself could not be measured: {answer}")
        return card_of(name, peak_tf=settings.peak_tflops, measured=None)
    reached = ((what, f"{value:.3g} {unit}") for what, value, unit in answer["reached"])
    lines.add("### The machine itself\n", markdown(("what", "reached"), reached))
    card = card_of(name, peak_tf=settings.peak_tflops, measured=as_card(answer["reached"]))
    lines.add(f"\nUtilisation is of {card.peak_tf:.3g} TF/s, zero-stall shares are for {card.copy_gb_s:.3g} GB/s.")
    return card


def command_of(settings: argparse.Namespace) -> str:
    """The command without its folders and files, which are nobody else's."""
    words = ["python benchmarks/gpu/run.py", *(["--tiny"] if settings.tiny else [])]
    given = {name: getattr(settings, name) for name in ("jobs", "ways", "steps", "peak_tflops")}
    words += [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return " ".join(words)


def versions_line() -> str:
    """What, besides torch, the figures depend on."""
    nvidia = find_nvidia(System.here())
    driver = [f"NVIDIA driver {nvidia.driver}"] if nvidia and nvidia.driver else []
    names = ("diffusers", "transformers", "accelerate", "peft", "bitsandbytes")
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    return ", ".join([*driver, *(f"{name} {installed[name]}" for name in names if name in installed)])


def measure_job(name: str, settings: argparse.Namespace, folder: Path, card: Card, lines: Lines) -> None:
    """One job's table, a line after the other."""
    from benchmarks.gpu.ours import prepare

    job = JOBS[name]
    texts = settings.ways.split(",") if settings.ways else [""]
    rows = ways(job, zero_stall=zero_stall_share(job, card))
    prepare(job, folder, tiny=settings.tiny)
    goal = f", goal {job.goal}" if job.goal else ""
    lines.add(f"\n### {name}: {job.size} px, batch {job.batch}, {job.step_tf:g} TF per step{goal}\n")
    lines.add(markdown(HEAD, []))
    for way in (way for way in rows if any(text in way.name for text in texts)):
        spec = {"job": name, "way": dataclasses.asdict(way)}
        answer = in_process(spec, settings, folder)
        lines.add(markdown_row(way, answer if isinstance(answer, str) else row(job, answer, card, tiny=settings.tiny)))


def in_process(spec: dict[str, Any], settings: argparse.Namespace, folder: Path) -> Any:
    """What a process of its own measures (JSON), or the reason why it did not."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    whole = {**spec, "folder": str(folder), "result": str(result), "begun": time.time()}
    command = [sys.executable, __file__, "--row", json.dumps(whole)]
    command += ["--steps", str(settings.steps)] if settings.steps else []
    command += ["--tiny"] if settings.tiny else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, timeout=60 * MINUTES,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {MINUTES} minutes"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    return reason(done.stdout, done.returncode)


def reason(output: str, code: int) -> str:
    """Why a process ended without figures: what it says is wrong, else its exception, else its last line."""
    said = [line for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    raised = [line for line in said if EXCEPTION.match(line)]  # torch writes advice below the one of its compiler
    return "; ".join(errors) or [f"ended with {code}", *said[-1:], *raised[-1:]][-1].strip()


# ---- one row --------------------------------------------------------------------------------------------------------


def measure_row(settings: argparse.Namespace) -> int:
    """In a process of its own: measure, write the figures."""
    spec = json.loads(settings.row)
    folder, result = Path(spec["folder"]), Path(spec["result"])
    if spec["job"] == MACHINE:
        answer: Any = describe_machine(tiny=settings.tiny)
    else:
        answer = measure_way(JOBS[spec["job"]], spec, folder, settings)
    result.write_text(json.dumps(answer), encoding="utf-8")
    return 0


def describe_machine(*, tiny: bool) -> dict[str, Any]:
    """The device's name, its line, and what it reaches."""
    import torch

    from benchmarks.gpu.ceilings import ceilings
    from library.device_report import describe_device

    on_card = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_card else "the CPU"
    line = describe_device(torch.device("cuda", 0) if on_card else torch.device("cpu"))
    return {"name": name, "device": line, "reached": list(ceilings(tiny=tiny))}


def measure_way(job: BenchmarkJob, spec: dict[str, Any], folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.gpu.timing import Clock

    way = Way(**{**spec["way"], "words": tuple(spec["way"]["words"])})
    warmup, timed = (TINY_WARMUP, TINY_STEPS) if settings.tiny else (WARMUP, STEPS)
    clock = Clock(warmup=warmup, timed=settings.steps or timed, begun=spec["begun"])
    if way.plain:
        from benchmarks.gpu import plain

        figures = plain.run(job, way, clock, tiny=settings.tiny)
    else:
        from benchmarks.gpu import ours

        figures = ours.run(job, way, folder, clock, tiny=settings.tiny)
    shown = {"median": figures.median, "p95": figures.p95, "host_idle": figures.host_idle}
    return {**dataclasses.asdict(figures), **shown}


# ---- tables ---------------------------------------------------------------------------------------------------------


class Lines:
    """What is printed, and written to a file where one is given, without the user's name and home folder."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.write_text("", encoding="utf-8")

    def add(self, *lines: str) -> None:
        for line in map(private, lines):
            print(line, flush=True)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def row(job: BenchmarkJob, found: dict[str, Any], card: Card, *, tiny: bool) -> Iterator[str]:
    """The cells of HEAD after the first."""
    gigabytes = lambda value: "" if value is None else f"{value / 1e9:.2f}"
    share = lambda value: "" if value is None else f"{value:.0%}"
    seconds = lambda value: "" if value is None else f"{value:.4f}"
    yield from (seconds(found["median"]), seconds(found["p95"]))
    yield "" if tiny else share(job.step_tf / found["median"] / card.peak_tf)
    yield from (gigabytes(found[name]) for name in ("allocated", "reserved", "setup"))
    yield from (seconds(found["host"]), share(found["host_idle"]), share(found["idle"]), seconds(found["stall"]))
    yield f"{found['first_step']:.1f}"
    yield gigabytes(found["resident"])
    yield f"{found['trained'] / 1e6:.2f}"


def markdown_row(way: Way, cells: str | Iterator[str]) -> str:
    """A line of the table; of a row that failed, the reason."""
    rest = [f"not measured: {cells.replace('|', '/')}", *[""] * (len(HEAD) - 2)] if isinstance(cells, str) else [*cells]
    return f"| {' | '.join([way.name, *rest])} |"


if __name__ == "__main__":
    sys.exit(main())
