# SPDX-License-Identifier: Apache-2.0
"""Host milliseconds per step (A1): a FLUX so small that Python and launches are what is measured.

    OMP_NUM_THREADS=1 python benchmarks/cpu/host.py

19 double and 38 single blocks of width 64, 24 tokens, batch 1, one thread; LoRA of rank 16 on every Linear of the
blocks, frozen weights in bf16, adapters in float32, autocast. All ways learn the same matrices: diffusers + PEFT in the
loop of their examples (gradient checkpointing as the model has it, AdamW of torch, clipping), and ours (adapters of
networks.lora_flux, compiled blocks with the recomputation inside, flat buffers with fused clip and step).

The ways take turns within one process, and CPU time is counted, not wall time, so other programs matter little. The
first run compiles for some minutes; what is compiled is kept.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from benchmarks.common import cpu_seconds, host_line, interleaved, markdown, quartiles
from library.memory.checkpointing import Recomputation
from library.memory.compiling import CompiledBlocks
from library.optim.flat import FlatParameters

DOUBLE, SINGLE, HEADS, HEAD = 19, 38, 4, 16
TOKENS, WORDS, RANK, RATE, LIMIT = 16, 8, 16, 1e-4, 1.0
GOAL = 0.33

Step = Callable[[], Tensor]


def make_model() -> Any:
    """The tiny FLUX, frozen, in bf16. Always the same weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=HEAD, num_attention_heads=HEADS,
        in_channels=16, joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model.to(torch.bfloat16).requires_grad_(False).train()


def make_loss(model: Any) -> Step:
    """A prediction and its squared error, on fixed inputs."""
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32).bfloat16()

    inputs = {
        "hidden_states": random(1, TOKENS, 16), "encoder_hidden_states": random(1, WORDS, 32),
        "pooled_projections": random(1, 16), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(TOKENS, 3), "txt_ids": torch.zeros(WORDS, 3),
    }  # fmt: skip
    target = random(1, TOKENS, 16).float()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            answer = model(**inputs, return_dict=False)[0]
        return (answer.float() - target).square().mean()

    return loss


def theirs(recompute: bool) -> Step:
    """diffusers + PEFT, as in diffusers' training examples."""
    from peft import LoraConfig

    model = make_model()
    names = [n for n, module in model.named_modules() if "transformer_blocks." in n and isinstance(module, nn.Linear)]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if recompute:
        model.enable_gradient_checkpointing()
    optimizer, loss_of = torch.optim.AdamW(trained, lr=RATE, foreach=True), make_loss(model)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(recompute: bool, backend: str | None) -> Step:
    """What the trainer puts together. backend None: blocks are not compiled."""
    from networks.lora_flux import create_network

    model = make_model()
    network = create_network(1.0, RANK, RANK, None, [], model)
    network.attach(train_denoiser=True, train_text_encoder=False)
    network.train()
    flat = FlatParameters(network.param_groups(learning_rate=RATE))
    optimizer, loss_of = torch.optim.AdamW(flat.param_groups, lr=RATE, fused=True), make_loss(model)
    blocks, budget = [*model.transformer_blocks, *model.single_transformer_blocks], 0.0 if recompute else 1.0
    if backend is None:
        Recomputation(blocks).set_budget(budget)
    else:
        CompiledBlocks(blocks, backend, budget=budget)

    def step() -> Tensor:
        loss = loss_of()
        loss.backward()
        flat.clip_grad_norm(LIMIT)
        optimizer.step()
        flat.zero_grad()
        return loss.detach()

    return step


def milliseconds(step: Step) -> float:
    return cpu_seconds(step) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--backend", default="inductor")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Step] = {}
    for recompute in (True, False):
        what = "recomputed" if recompute else "all kept"
        ways[f"diffusers + PEFT, {what}"] = theirs(recompute)
        ways[f"ours, not compiled, {what}"] = ours(recompute, None)
        ways[f"ours, compiled, {what}"] = ours(recompute, settings.backend)
    for name, step in ways.items():
        started = time.monotonic()
        losses = [step().item() for _ in range(3)]
        print(f"{name}: three steps in {time.monotonic() - started:.0f} s, losses {losses}", flush=True)
    gc.collect()
    gc.freeze()
    before = os.getloadavg()[0]
    figures = interleaved({name: partial(milliseconds, step) for name, step in ways.items()}, settings.rounds)
    print(f"\n{host_line()}; load {before:.1f} before; {settings.rounds} rounds; ms of CPU per step\n")
    rows = []
    for name, values in figures.items():
        low, middle, _ = quartiles(values)
        base = quartiles(figures[f"diffusers + PEFT, {name.rpartition(', ')[2]}"])
        ratio = f"{low / base[0]:.2f} / {middle / base[1]:.2f}"
        rows.append((name, f"{min(values):.0f}", f"{low:.0f}", f"{middle:.0f}", ratio))
    head = ["step", "least", "lower quartile", "median", "of diffusers + PEFT (lower quartile / median)"]
    print(markdown(head, rows))
    print(f"\ngoal: {GOAL} of diffusers + PEFT with recomputation")


if __name__ == "__main__":
    main()
