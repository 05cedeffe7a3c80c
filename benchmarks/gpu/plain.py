# SPDX-License-Identifier: Apache-2.0
"""The plainest loop of diffusers and PEFT for the same model: what diffusers' training examples do in a step.

Weights in bf16, adapters in float32, bf16 autocast, `torch.optim.AdamW`, clipping; latents and text states are random
and lie on the device already. Adapters of rank 16 on the linear layers that our networks take.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.jobs import RANK, Way
from benchmarks.gpu.models import ARCHITECTURES, fill
from benchmarks.gpu.timing import Clock, Figures
from library.families.recipes import BenchmarkJob

TINY_SIZE = 64
TOKENS = {"sd15": 77, "sdxl": 77, "flux": 512, "sd35m": 333, "lumina": 256}
IN_BLOCKS = {
    "sd15": r"attentions", "sdxl": r"attentions", "flux": r"(single_)?transformer_blocks",
    "sd35m": r"transformer_blocks", "lumina": r"(layers|noise_refiner|context_refiner)",
}  # fmt: skip


def run(job: BenchmarkJob, way: Way, clock: Clock, *, tiny: bool) -> Figures:
    """As many steps as the clock wants."""
    device = torch.device("cuda" if clock.on_card else "cpu")
    architecture = ARCHITECTURES[job.architecture]
    torch.manual_seed(1)
    module: Any = fill(architecture.empty(tiny=tiny), device)
    if way.recompute:
        module.enable_gradient_checkpointing()
    learning = learning_weights(module, job)
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    inputs = Inputs(job, architecture.config(tiny=tiny), device, tiny=tiny)
    predict, flows = PREDICT[job.architecture], job.architecture not in ("sd15", "sdxl")
    module.train()
    for _ in range(clock.total):
        with clock.step():
            noisy, t, target = inputs.noised(flows=flows)
            with torch.autocast(device.type, torch.bfloat16):
                pred = predict(module, noisy.to(torch.bfloat16), t, inputs)
            loss = F.mse_loss(pred.float(), target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return clock.figures(trained=sum(p.numel() for p in learning))


def learning_weights(module: Any, job: BenchmarkJob) -> list[nn.Parameter]:
    """All weights in full training, else adapters on the blocks' matrices, in float32."""
    if job.full:
        return list(module.requires_grad_(True).parameters())
    from peft import LoraConfig

    module.requires_grad_(False)
    inside = re.compile(rf"(.*\.)?{IN_BLOCKS[job.architecture]}\..*")
    layers = [name for name, child in module.named_modules() if inside.fullmatch(name) and is_matrix(child)]
    module.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules="|".join(map(re.escape, layers))))
    learning = [p for p in module.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.data = parameter.data.float()
    return learning


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


class Inputs:
    """Random latents and text states of one batch."""

    def __init__(self, job: BenchmarkJob, config: dict[str, Any], device: torch.device, *, tiny: bool) -> None:
        self.config, self.device, self.batch = config, device, job.batch
        side, tokens = (TINY_SIZE if tiny else job.size) // 8, TOKENS[job.architecture]
        channels = 4 if "cross_attention_dim" in config else 16
        widths = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim")
        width = next(config[name] for name in widths if name in config)
        pooled = config.get("pooled_projection_dim", 48 if tiny else 1280)
        draw = lambda *shape: torch.randn(*shape, device=device)
        self.latents = draw(job.batch, channels, side, side)
        self.states = draw(job.batch, tokens, width).to(torch.bfloat16)
        self.pooled = draw(job.batch, pooled).to(torch.bfloat16)
        self.size = TINY_SIZE if tiny else job.size
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
        self.kept = (1 - betas).cumprod(0)  # of the picture, by timestep

    def noised(self, *, flows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, and what is to be predicted."""
        noise = torch.randn_like(self.latents)
        if flows:
            s = torch.rand(self.batch, device=self.device).view(-1, 1, 1, 1)
            return (1 - s) * self.latents + s * noise, s.view(-1), noise - self.latents
        t = torch.randint(0, 1000, (self.batch,), device=self.device)
        kept = self.kept[t].view(-1, 1, 1, 1)
        return kept.sqrt() * self.latents + (1 - kept).sqrt() * noise, t, noise


def sd15(module: Any, noisy: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    return module(noisy, t, inputs.states).sample


def sdxl(module: Any, noisy: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    sizes = torch.tensor([[inputs.size, inputs.size, 0, 0, inputs.size, inputs.size]] * inputs.batch)
    added = {"text_embeds": inputs.pooled, "time_ids": sizes.to(inputs.device)}
    return module(noisy, t, inputs.states, added_cond_kwargs=added).sample


def flux(module: Any, noisy: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    axes = (torch.arange(n, device=noisy.device, dtype=torch.float32) for n in (rows, columns))
    places = torch.cartesian_prod(torch.zeros(1, device=noisy.device), *axes)
    answer = module(
        hidden_states=F.unfold(noisy, 2, stride=2).transpose(1, 2),
        timestep=t,
        encoder_hidden_states=inputs.states,
        pooled_projections=inputs.pooled,
        guidance=torch.ones_like(t) if inputs.config["guidance_embeds"] else None,
        txt_ids=torch.zeros(inputs.states.shape[1], 3, device=noisy.device),
        img_ids=places,
    ).sample
    return F.fold(answer.transpose(1, 2), (2 * rows, 2 * columns), 2, stride=2)


def sd35m(module: Any, noisy: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    texts = {"encoder_hidden_states": inputs.states, "pooled_projections": inputs.pooled}
    return module(hidden_states=noisy, timestep=1000 * t, **texts).sample


def lumina(module: Any, noisy: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    mask = torch.ones(inputs.states.shape[:2], dtype=torch.bool, device=noisy.device)
    return module(noisy, 1 - t, inputs.states, mask).sample


PREDICT: dict[str, Callable[[Any, Tensor, Tensor, Inputs], Tensor]] = {
    "sd15": sd15, "sdxl": sdxl, "flux": flux, "sd35m": sd35m, "lumina": lumina,
}  # fmt: skip
