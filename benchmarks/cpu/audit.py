# SPDX-License-Identifier: Apache-2.0
"""What a training step asks of any card, counted without one: full-size models on tensors without memory.

    OMP_NUM_THREADS=1 python benchmarks/cpu/audit.py [--jobs flux-1024,sdxl-1024] [--plain]

For every family: LoRA of rank 16 and full training, with and without recomputation, batch 1, bf16. Columns: matmul
TFLOPs (attention's backward pass counts twice its forward pass), GB that all other operations read and write,
operations that are no views, GB of activations kept for the backward pass and at the peak above weights; then GB of
weights by the way they are kept. --plain adds the plainest diffusers + PEFT step of the same model. What kernels take
for themselves is not seen, the CPU's attention stands for the card's, and under autocast norms stay in bf16, which CUDA
makes float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import host_line, markdown
from benchmarks.gpu.models import ARCHITECTURES, Architecture, write_model
from benchmarks.gpu.plain import PREDICT, Inputs, learning_weights
from library.cli import METHODS, load_attribute
from library.families.chroma.parts import build_chroma
from library.families.recipes import BenchmarkJob
from library.families.registry import FAMILIES, open_family
from library.memory.choice import MemoryChoice
from library.memory.estimate import Case, Fixed, Weights, tops, total_work
from library.options import resolve
from library.planner.case import weights_of
from library.planner.planned import Planned
from library.planner.simulation import FakeMeter, Simulation, materialise, simulate
from library.trainers.stages import as_planned
from library.weights.loading import shipped_config

RANK = 16
GB, TERA = 1e9, 1e12


def _sd3(**config: Any) -> Architecture:
    base = ARCHITECTURES["sd35m"]
    return replace(base, full={**base.full, **config})


MODELS: dict[str, Architecture] = {
    **ARCHITECTURES,
    "chroma": replace(
        ARCHITECTURES["flux"], pipeline="ChromaPipeline", build=build_chroma, full=shipped_config("chroma"),
        encoders=(replace(ARCHITECTURES["flux"].encoders[1], folder="text_encoder", tokenizer="tokenizer"),),
    ),
    "klein9b": replace(
        ARCHITECTURES["klein4b"],
        full={**ARCHITECTURES["klein4b"].full, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
              "joint_attention_dim": 12288},
        encoders=(replace(ARCHITECTURES["klein4b"].encoders[0], width=4096),),
    ),
    "sd35l": _sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                  pos_embed_max_size=192, dual_attention_layers=[]),
    "sana48": replace(ARCHITECTURES["sana"], full={
        **ARCHITECTURES["sana"].full, "num_layers": 60, "qk_norm": "rms_norm_across_heads"}),
    "sd3m": _sd3(pos_embed_max_size=192, dual_attention_layers=[], qk_norm=None),
}  # fmt: skip
SIZES = {"sd15": (512,), "sdxl": (1024,), "flux": (512, 1024), "chroma": (512, 1024), "sd35m": (1024,),
         "sd35l": (1024,), "sd3m": (1024,), "lumina": (1024,), "anima": (1024,)}  # fmt: skip
LIKE = {"sd35l": "sd35m", "sd3m": "sd35m"}  # called in the same way
JOBS = {f"{name}-{size}": (name, size) for name, sizes in SIZES.items() for size in sizes}
HEAD = ("job", "way", "matmul TF", "elementwise GB", "operations", "kept GB", "peak GB above weights")
WEIGHTS_HEAD = ("model", "bf16 GB", "fp8 GB", "int8 GB", "nf4 GB", "modulations, bf16 GB")


@dataclass(frozen=True)
class Found:
    """One step."""

    flops: float
    moved: float
    calls: int
    kept: float
    peak: float

    def cells(self) -> tuple[str, ...]:
        return (f"{self.flops / TERA:.2f}", f"{self.moved / GB:.0f}", f"{self.calls}", f"{self.kept / GB:.2f}",
                f"{self.peak / GB:.2f}")  # fmt: skip


# ---- ours -----------------------------------------------------------------------------------------------------------


def planned_of(name: str, size: int, folder: Path, *, full: bool) -> Planned:
    """The run of a script as the planner sees it; one batch of one square picture."""
    architecture = MODELS[name]
    entry = FAMILIES[architecture.family]
    words = ["--pretrained_model_name_or_path", folder, "--output_dir", folder / "out", "--output_name", "x",
             "--train_data_dir", folder, "--cache_latents", "--mixed_precision", "bf16"]  # fmt: skip
    words += ["--full_bf16"] if full else ["--network_dim", RANK, "--network_train_unet_only"]
    words += ["--model_type", "chroma"] if name == "chroma" else []
    path, options_type = METHODS["finetune" if full else "network"]
    options = resolve(options_type, entry.option_groups, [str(word) for word in words], prog="audit").options
    method = load_attribute(path)(open_family(entry, options.model), options)
    batch: Any = SimpleNamespace(bucket=(size, size), samples=(0,))
    optimizer: Any = SimpleNamespace(row=SimpleNamespace(elementwise=True))
    return as_planned(method, method.learning(), optimizer, batch, device=torch.device("cpu"))


def ours(name: str, size: int, folder: Path) -> Iterator[tuple[str, Found]]:
    for way, full in {"LoRA": False, "full": True}.items():
        found = simulate(planned_of(name, size, folder, full=full))
        for ending, budget in {"": 1.0, ", recomputed": 0.0}.items():
            yield way + ending, figures(found, budget)


def figures(found: Simulation, budget: float) -> Found:
    """Of a step in which all blocks, or none, are recomputed."""
    case = Case(found.step, Weights({"plain": ()}, {"plain": 0}), Fixed(), lambda n, c: range(n) if budget == 0 else ())
    choice = MemoryChoice(activation_budget=budget)
    work = total_work(case, choice)
    rows = list(tops(case, choice))
    turn = next(i for i, s in enumerate(found.step.segments) if s.phase == "backward")
    kept = rows[turn] - (found.step.segments[turn].peak - found.step.segments[turn].start)
    return Found(work.flops, work.moved, work.calls, kept, max(rows))


def weights(name: str, folder: Path) -> tuple[str, ...]:
    planned = planned_of(name, 512, folder, full=False)
    found = weights_of(planned, planned.family.empty_denoiser(torch.bfloat16), samples=1, hoists=True)
    sizes = [f"{found.total(storage) / GB:.2f}" for storage in ("plain", "fp8", "int8", "nf4")]
    return (name, *sizes, f"{sum(found.modulations.get('plain', ())) / GB:.2f}")


# ---- diffusers and PEFT ---------------------------------------------------------------------------------------------


def plain(name: str, size: int) -> Iterator[tuple[str, Found]]:
    """The loop of benchmarks/gpu/plain.py, one step, without the optimizer."""
    like = LIKE.get(name, name)
    predict: Callable[..., Any] = PREDICT[like]
    job = BenchmarkJob(like, "network", size, 1, forward_tf=0, step_tf=0, block_gb=0)
    for recompute in (False, True):
        module: Any = MODELS[name].empty(tiny=False)
        learning_weights(module, job)
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialise(module, torch.device("cpu"))
            if recompute:
                module.enable_gradient_checkpointing()
            module.train()
            inputs = Inputs(job, MODELS[name].config(tiny=False), torch.device("cpu"), tiny=False)
            meter = FakeMeter(counts_work=True)
            meter.hold([*module.parameters(), *module.buffers(), inputs.latents, inputs.states, inputs.pooled])
            before = meter.live
            with meter:
                noisy, t, target = inputs.noised(flows=name not in ("sd15", "sdxl"))
                with torch.autocast("cpu", torch.bfloat16):
                    pred = predict(module, noisy.to(torch.bfloat16), t, inputs)
                loss = F.mse_loss(pred.float(), target)
                kept = meter.live - before
                loss.backward()
            work = meter.work
        way = "diffusers + PEFT LoRA" + (", recomputed" if recompute else "")
        yield way, Found(work.flops, work.moved, work.calls, kept, meter.peak - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", default=",".join(JOBS), help="some of " + ", ".join(JOBS))
    parser.add_argument("--plain", action="store_true", help="diffusers and PEFT as well")
    settings = parser.parse_args()
    chosen = [JOBS[name] for name in settings.jobs.split(",")]
    print(f"{host_line()}\n")
    print(markdown(HEAD, ()), flush=True)
    sizes: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as root:
        for name, size in chosen:
            folder = Path(root) / name
            if not folder.exists():
                write_model(MODELS[name], folder, tiny=False)
                sizes.append(weights(name, folder))
            start = time.process_time()
            rows = list(ours(name, size, folder))
            if settings.plain and LIKE.get(name, name) in PREDICT:
                rows += plain(name, size)
            for way, found in rows:
                print("| " + " | ".join((f"{name} {size}", way, *found.cells())) + " |", flush=True)
            print(f"{name} {size}: {time.process_time() - start:.0f} CPU s", file=sys.stderr, flush=True)
    print("\n" + markdown(WEIGHTS_HEAD, sizes))


if __name__ == "__main__":
    main()
