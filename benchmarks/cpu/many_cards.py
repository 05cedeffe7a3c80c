# SPDX-License-Identifier: Apache-2.0
"""What one, two and three processes learn, on the CPU with gloo: tiny models of every kind, real training runs.

    OMP_NUM_THREADS=1 python benchmarks/cpu/many_cards.py [--rows "flux LoRA,lumina full"] [--list]

Each row compares two and three processes with one that takes as many batches a step: the largest relative difference
of a loss, and the distance of the learned weights as a part of how far they have moved (0: the same bits). The chain
takes a step of one process, one of two, one of three and one of one again, each from the state of the one before, and
is compared with four steps of one process; six batches a step. Then the bytes of the denoiser's weights in the first
process, and by how much the save raised the peak of the main memory of the first and of any other of two processes.
Speed is not measured: all processes share the cores of this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.common import host_line, markdown
from library.io.state import load_state
from tests.families import CASES
from tests.trainers import child, finetune_runs, helpers

MODELS = ("sd1", "sdxl", "flux", "sd3", "lumina")  # rows of CASES
STEPS, LINKS, SECONDS = 2, (1, 2, 3, 1), 300
SHARDED: dict[str, Any] = {"shard_base": True}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"network_args": ["dora_wd=True"]},
    "LoKr": {"network_module": "networks.lokr"},
}
BASES: dict[str, dict[str, Any]] = {"fp8": {"fp8_base_unet": True}, "nf4": {"base_quant": "nf4"}}
LORA: dict[str, Any] = {"network_train_unet_only": True, "cache_latents": True, "mixed_precision": "bf16"}
FULL: dict[str, Any] = {"optimizer_type": "AdamW", "mixed_precision": "bf16", "cache_latents": True}


@dataclass(frozen=True)
class Row:
    """A run that is made with one, two and three processes."""

    model: str
    name: str
    values: dict[str, Any]
    full: bool = False


def all_rows() -> Iterator[Row]:
    for model in MODELS:
        for kind, values in ADAPTERS.items():
            yield Row(model, f"{model} {kind}, DDP", {**LORA, **values})
            yield Row(model, f"{model} {kind}, --shard_base", {**LORA, **values, **SHARDED})
        for base, values in BASES.items():
            yield Row(model, f"{model} LoRA on {base}, --shard_base", {**LORA, **values, **SHARDED})
        yield Row(model, f"{model} full, --shard_base", {**FULL, **SHARDED}, full=True)
        bf16 = {"full_bf16": True, "optimizer_type": "SGDNesterov", "learning_rate": 1e-2}
        yield Row(model, f"{model} full bf16, --shard_base", {**FULL, **bf16, **SHARDED}, full=True)


# ---- one process ----------------------------------------------------------------------------------------------------


def rank_of(rank: int, world: int, port: int, row: Row, values: Mapping[str, Any], folder: Path) -> None:
    """One process of a run. It writes `<rank>.json` into the folder, the first one the weights before the run, too."""
    child.meet(rank, port, world)
    torch.set_num_threads(1)
    helpers.settle()
    child.redirect(folder / f"{rank}.log")
    make = finetune_runs.make_finetune if row.full else helpers.make_trainer
    trainer = make(values, family=CASES[row.model].family)
    rises: list[int] = []

    def before(trainer: helpers.Recorded) -> None:
        loop = trainer.loop
        if world == 1:
            first = {name: value.detach().clone() for name, value in trainer.trainables.state().items()}
            save_file(first, folder / "first.safetensors")
        write = loop.saver.write_model

        def measured(path: Path) -> None:
            resident = forget_peak()
            write(path)
            rises.append(peak() - resident)

        loop.saver.write_model = measured

    trainer.before = before
    assert trainer.run() == 0
    facts = {
        "losses": [report.loss for report in trainer.reports],
        "bytes": child.local_bytes(trainer.models.denoiser),
        "rise": max(rises),
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))


def status(name: str) -> int:
    """A figure of this process in bytes, as Linux has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> int:
    """Start a new peak. Returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The most bytes that were resident since `forget_peak`."""
    return status("VmHWM")


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    folder: Path
    world: int

    @property
    def facts(self) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(self.world)]

    @property
    def losses(self) -> Tensor:
        return torch.tensor(self.facts[0]["losses"])

    @property
    def state(self) -> dict[str, Tensor]:
        return load_state(self.folder / "x-state").weights


def run(row: Row, folder: Path, shared: Mapping[str, Any], world: int, **own: Any) -> Result:
    """A run of `world` processes. Raises RuntimeError with what the first one printed if it fails."""
    folder.mkdir(parents=True)
    defaults = finetune_runs.DEFAULTS if row.full else helpers.DEFAULTS
    values = {**defaults, **shared, **row.values, "output_dir": folder, "save_state": True, **own}
    if world == 1:
        values["shard_base"] = False
    (port,) = child.free_ports(1)
    processes = [child.start(rank_of, rank, world, port, row, values, folder) for rank in range(world)]
    codes = [child.exit_code(process, seconds=SECONDS) for process in processes]
    if codes != [0] * world:
        raise RuntimeError(f"{row.name}, {world} processes: {(folder / '0.log').read_text()[-2000:]}")
    return Result(folder, world)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(one[n].float() - other[n].float()) for n in one]).norm())


def compared(found: Result, alone: Result) -> str:
    """Difference of the losses, and of the weights as a part of how far they have moved."""
    losses = float((found.losses / alone.losses[-len(found.losses) :] - 1).abs().max())
    moved = distance(alone.state, load_file(alone.folder / "first.safetensors"))
    return f"{losses:.1g}, {distance(found.state, alone.state) / moved:.1g}"


def measured(row: Row, folder: Path, shared: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a row."""
    cells, kept, saves = [], [], ""
    for world in (2, 3):
        several = run(row, folder / f"{world}", shared, world, max_train_steps=STEPS)
        one = run(row, folder / f"as {world}", shared, 1, max_train_steps=STEPS, gradient_accumulation_steps=world)
        cells.append(compared(several, one))
        kept += [str(result.facts[0]["bytes"]) for result in ((one, several) if world == 2 else (several,))]
        if world == 2:
            saves = " / ".join(f"{fact['rise'] / 1e6:.1f}" for fact in several.facts)
    resume = None
    for step, world in enumerate(LINKS, 1):
        own = {"max_train_steps": step, "gradient_accumulation_steps": 6 // world, "resume": resume}
        last = run(row, folder / f"link {step}", shared, world, **own)
        resume = last.folder / "x-state"
    whole = run(row, folder / "whole", shared, 1, max_train_steps=len(LINKS), gradient_accumulation_steps=6)
    return (row.name, *cells, compared(last, whole), " / ".join(kept), saves)


HEAD = ("run", "2 processes: losses, weights", "3 processes", "1 → 2 → 3 → 1", "bytes of 1 / 2 / 3", "save, MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="What one, two and three processes learn.")
    parser.add_argument("--rows", help="only rows whose names contain one of these texts, separated by ;")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    options = parser.parse_args()
    wanted = options.rows.split(";") if options.rows else [""]
    rows = [row for row in all_rows() if any(text in row.name for text in wanted)]
    if options.list:
        print("\n".join(row.name for row in rows))
        return
    with tempfile.TemporaryDirectory() as name:
        place, cells = Path(name), []
        pictures = helpers.make_pictures(place / "pictures", 12)
        data = helpers.write_dataset(place / "data.toml", helpers.subset(pictures), batch_size=1)
        models: dict[str, dict[str, Any]] = {}
        for row in rows:
            case = CASES[row.model]
            if row.model not in models:
                models[row.model] = {**case.make(place / row.model), **case.options, "dataset_config": data}
            cells.append(measured(row, place / row.name.replace(",", ""), models[row.model]))
            print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
        print(host_line(), markdown(HEAD, cells), sep="\n\n")


if __name__ == "__main__":
    main()
