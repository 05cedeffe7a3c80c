# SPDX-License-Identifier: Apache-2.0
"""Does full training in bf16 learn what it learns in float32? One small SD3-shaped model, four ways, the same draws.

    python benchmarks/bf16_update.py            # prints the table of docs/full_training.md, draws its picture

The losses are measured every ten steps with fixed noise. The learning rate is a usual one of full training, so small
that most updates are below the last digit of their bf16 weight. A few minutes on two CPU cores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "bf16_update.svg"
DOCUMENT = ROOT / "docs" / "full_training.md"
BEGIN, END = "<!-- figures of benchmarks/bf16_update.py -->\n", "<!-- end of figures -->\n"

STEPS, EVERY, RATE, BATCH = 200, 10, 5e-5, 4
# name -> (dtype of the weights, --bf16_update, colour)
RUNS: dict[str, tuple[torch.dtype, str, str]] = {
    "float32": (torch.float32, "plain", "#222222"),
    "bf16, stochastic": (torch.bfloat16, "stochastic", "#1f77b4"),
    "bf16, kahan": (torch.bfloat16, "kahan", "#2ca02c"),
    "bf16, plain": (torch.bfloat16, "plain", "#d62728"),
}


def make_model() -> nn.Module:
    """Four blocks of SD3 at width 128, with random weights."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip


def make_data() -> dict[str, Tensor]:
    """16 pictures' worth of smooth latents, each with a text of its own."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.randn(16, 4, 2, 2, generator=draw)
    return {
        "latents": nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear"),
        "states": torch.randn(16, 8, 32, generator=draw),
        "pooled": torch.randn(16, 32, generator=draw),
    }


def flow_loss(model: nn.Module, data: dict[str, Tensor], rows: Tensor, seed: int) -> Tensor:
    """The mean loss of these pictures with noise and noise levels of `seed`."""
    draw = torch.Generator().manual_seed(seed)
    x0 = data["latents"][rows]
    s = torch.rand(len(rows), generator=draw)
    noise = torch.randn(x0.shape, generator=draw)
    x_t = (1 - s.view(-1, 1, 1, 1)) * x0 + s.view(-1, 1, 1, 1) * noise
    dtype = next(model.parameters()).dtype
    pred = model(
        hidden_states=x_t.to(dtype), encoder_hidden_states=data["states"][rows].to(dtype),
        pooled_projections=data["pooled"][rows].to(dtype), timestep=1000 * s,
    ).sample  # fmt: skip
    return (pred.float() - (noise - x0)).square().mean()


def curve(dtype: torch.dtype, rounding: str) -> list[float]:
    """The measured losses of one run, the first before any step."""
    from library.optim.bf16 import build_bf16
    from library.optim.optimizers import choose_optimizer
    from library.optim.options import OptimizerOptions

    model, data = make_model().bfloat16().to(dtype), make_data()  # the same rounded start in each run
    choice = choose_optimizer(OptimizerOptions(optimizer_type="AdamW", learning_rate=RATE))
    groups: list[dict[str, Any]] = [{"params": [*model.parameters()], "lr": RATE}]
    optimizer = build_bf16(choice, groups, rounding, seed=0).optimizer
    everything, losses = torch.arange(16), []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(sum(flow_loss(model, data, everything, 10**6 + i).item() for i in range(4)) / 4)
        rows = torch.randperm(16, generator=torch.Generator().manual_seed(step))[:BATCH]
        flow_loss(model, data, rows, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


# ---- out ------------------------------------------------------------------------------------------------------------


def table(curves: dict[str, Sequence[float]]) -> str:
    """Markdown: losses at some steps, and the distance from float32 as a share of what float32 learned."""
    shown = (0, 50, 100, 150, 200)
    full = curves["float32"]
    lines = [
        f"| weights | {' | '.join(f'step {s}' for s in shown)} | learned | farthest from float32 |",
        "|---" * 8 + "|",
    ]
    for name, losses in curves.items():
        values = " | ".join(f"{losses[s // EVERY]:.4f}" for s in shown)
        learned = (losses[0] - losses[-1]) / (full[0] - full[-1])
        off = max(abs(a - b) for a, b in zip(losses, full, strict=True)) / (full[0] - full[-1])
        lines.append(f"| {name} | {values} | {learned:.1%} | {off:.1%} |")
    return "\n".join(lines) + "\n"


def picture(curves: dict[str, Sequence[float]]) -> str:
    """The curves as an SVG."""
    width, height, left, top, right, bottom = 640, 360, 56, 20, 150, 44
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    x = lambda step: left + (width - left - right) * step / STEPS
    y = lambda loss: top + (height - top - bottom) * (high - loss) / (high - low)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for i in range(5):
        loss, step = low + (high - low) * i / 4, STEPS * i // 4
        parts += [
            f'<line x1="{left}" x2="{x(STEPS)}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#e0e0e0"/>',
            f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end" fill="#444444">{loss:.2f}</text>',
            f'<text x="{x(step):.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="#444444">{step}</text>',
        ]
    parts.append(f'<text x="{x(STEPS / 2)}" y="{height - 8}" text-anchor="middle" fill="#444444">optimizer step</text>')
    parts.append(f'<text x="{left}" y="14" fill="#444444">loss with fixed noise</text>')
    for row, (name, losses) in enumerate(curves.items()):
        colour, legend = RUNS[name][2], top + 16 + 20 * row
        points = " ".join(f"{x(i * EVERY):.1f},{y(loss):.1f}" for i, loss in enumerate(losses))
        dashes = ' stroke-dasharray="6 4"' if row in (1, 2) else ""  # the float32 curve shows through
        stroke, begin = f'stroke="{colour}" stroke-width="2"{dashes}', x(STEPS) + 12
        parts += [
            f'<polyline points="{points}" fill="none" {stroke}/>',
            f'<line x1="{begin}" x2="{begin + 22}" y1="{legend}" y2="{legend}" {stroke}/>',
            f'<text x="{begin + 28}" y="{legend + 4}" fill="#222222">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    curves: dict[str, Sequence[float]] = {}
    for name, (dtype, rounding, _) in RUNS.items():
        curves[name] = curve(dtype, rounding)
        print(name, " ".join(f"{loss:.4f}" for loss in curves[name]), flush=True)
    figures = table(curves)
    print(figures)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(curves), encoding="utf-8")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + figures + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    main()
