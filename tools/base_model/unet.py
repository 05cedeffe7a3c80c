# SPDX-License-Identifier: Apache-2.0
"""The denoiser, trained together with the text encoder on cached latents; can be stopped and resumed."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, distributed, multiprocessing, nn
from transformers import CLIPTextModel

from .text import HIDDEN_SIZE
from .training import Budget, RunningMean, Schedule, Stopwatch, WeightAverage, progress_line, save_atomically


@dataclass(frozen=True)
class UnetOptions:
    learning_rate: float = 1e-3
    text_rate_factor: float = 0.3  # of the denoiser's learning rate
    batch_size: int = 24
    empty_caption_share: float = 0.1  # for classifier-free guidance
    average_decay: float = 0.999
    weight_decay: float = 1e-3
    save_minutes: float = 5.0
    report_steps: int = 200
    seed: int = 0


@dataclass(frozen=True)
class TrainingSet:
    """What the denoiser is trained on."""

    latents: Tensor  # N 4 16 16, scaled
    token_ids: Tensor  # N 77
    empty_ids: Tensor  # 77, of the empty caption


def build_unet() -> UNet2DConditionModel:
    """The U-Net, 2.5 M parameters: Stable Diffusion's architecture with two levels and four attention heads.

    As in SDXL, the upper level has no attention: 81 instead of 53 samples/s in training on two cores.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=4,  # the number of heads in this class, despite its name in diffusers
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Random timesteps, one in each of `count` equal parts of 0..999: less variance between batches."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long()


def loss_weights(alphas_bar: Tensor) -> Tensor:
    """Loss weight of each timestep: min(1 / alpha_bar, 25) / 4.

    v-prediction's weighting (Salimans & Ho 2022, arXiv:2202.00512: SNR + 1 on the error of the picture, hence
    1 + 1 / SNR = 1 / alpha_bar on that of the noise), cut off near pure noise. With the plain loss, which cares
    little about the noisy end, pictures ignored their captions for long.
    """
    return (1 / alphas_bar).clamp(max=25) / 4


class DenoiserTraining:
    """Denoiser, text encoder, their optimizer, averages and random state: everything that a checkpoint contains."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, options: UnetOptions) -> None:
        self.options = options
        self.unet, self.text_encoder = unet.train(), text_encoder.train()
        unet_parameters, text_parameters = list(unet.parameters()), list(text_encoder.parameters())
        self._parameters = unet_parameters + text_parameters
        self._optimizer = torch.optim.AdamW(
            [
                {"params": unet_parameters, "rate_factor": 1.0},
                {"params": text_parameters, "rate_factor": options.text_rate_factor},
            ],
            betas=(0.9, 0.99),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self._average = WeightAverage(self._parameters, options.average_decay)
        self._generator = torch.Generator().manual_seed(options.seed)
        self._alphas_bar = build_scheduler().alphas_cumprod
        self._share = slice(_rank(), None, distributed.get_world_size() if distributed.is_initialized() else 1)
        self.step = 0
        self.samples = 0
        self.minutes = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "averages": self._average.averages,
            "generator": self._generator.get_state(),
            "step": self.step,
            "samples": self.samples,
            "minutes": self.minutes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._average.load(state["averages"])
        self._generator.set_state(state["generator"])
        self.step, self.samples, self.minutes = state["step"], state["samples"], state["minutes"]

    def use_averages(self) -> None:
        """Copy the averaged weights to the models, for sampling or saving. Training cannot continue afterwards."""
        self._average.copy_to_parameters()
        self.unet.eval()
        self.text_encoder.eval()

    def train_step(self, data: TrainingSet, learning_rate: float) -> float:
        """Take one optimizer step. Returns the unweighted epsilon error.

        All processes draw the same random numbers for the whole batch, then each takes its share of it, so
        that the saved state is that of any of them.
        """
        count, generator = self.options.batch_size, self._generator
        chosen = torch.randint(0, len(data.latents), (count,), generator=generator)
        latents = data.latents[chosen]  # N 4 h w
        empty = torch.rand(count, 1, generator=generator) < self.options.empty_caption_share
        token_ids = torch.where(empty, data.empty_ids, data.token_ids[chosen])
        timesteps = stratified_timesteps(count, generator)
        noise = torch.randn(latents.shape, generator=generator)
        latents, token_ids, timesteps, noise = (part[self._share] for part in (latents, token_ids, timesteps, noise))
        alpha_bar = self._alphas_bar[timesteps]
        signal, spread = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
        text = self.text_encoder(token_ids).last_hidden_state  # N 77 c
        predicted = self.unet(signal * latents + spread * noise, timesteps, text).sample
        errors = (predicted - noise).square().mean((1, 2, 3))
        self._descend((errors * loss_weights(alpha_bar)).mean(), learning_rate)
        self.step, self.samples = self.step + 1, self.samples + count
        return errors.mean().item()

    def _descend(self, loss: Tensor, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        self._optimizer.zero_grad()
        loss.backward()
        if distributed.is_initialized():
            _average_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._average.update(self.step)


def _rank() -> int:
    """Rank of this process, 0 if there is only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over all processes, in one message. Every parameter must have a gradient."""
    gradients = [parameter.grad for parameter in parameters]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(joined)
    joined /= distributed.get_world_size()
    parts = joined.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


def train_denoiser(training: DenoiserTraining, data: TrainingSet, budget: Budget, checkpoint: Path) -> None:
    """Train until the budget is spent; save every few minutes and at the end."""
    first = _rank() == 0
    schedule = Schedule(training.options.learning_rate)
    watch, errors, saved_minutes = Stopwatch(training.minutes), RunningMean(), training.minutes
    while (fraction := budget.fraction(training.samples, training.minutes)) < 1:
        rate = schedule.rate(training.step, fraction)
        errors.add(training.train_step(data, rate))
        training.minutes = _first_process_value(watch.minutes)
        if first and training.step % training.options.report_steps == 0:
            minutes, error = training.minutes, errors.read()
            print(progress_line("unet", training.samples, minutes, fraction, error=error, rate=rate), flush=True)
        if first and training.minutes - saved_minutes >= training.options.save_minutes:
            save_atomically(training.state_dict(), checkpoint)
            saved_minutes = training.minutes
    if first:
        save_atomically(training.state_dict(), checkpoint)


def _first_process_value(value: float) -> float:
    """The value of the first process, in all processes: its clock decides when all of them stop."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(shared, src=0)
    return shared.item()


def in_processes(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run work(*arguments) in `count` one-thread processes that share gradients.

    On two cores 53 samples/s, against 29 in one process of two threads (batch 16, the wider attention).
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run_process, (count, f"file://{folder}/store", work, arguments), nprocs=count)


def _run_process(rank: int, count: int, store: str, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    work(*arguments)
    distributed.destroy_process_group()
