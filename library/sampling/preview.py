# SPDX-License-Identifier: Apache-2.0
"""Previews: one denoise loop for every architecture, built from the same `predict` that the training uses.

A preview leaves no trace in the training: modes, gradients and generators are as before. A preview that fails is one
warning; the run goes on.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from library.data.encoding import Text, TextSource, pixels_of, reference_pixels
from library.data.images import load_control, resize
from library.device import empty_cache, kept_random_state, on_device
from library.errors import ProcessDied, first_names
from library.families.family import ModelFamily
from library.io.atomic import atomic_write
from library.log import get_logger
from library.objectives.base import Objective, Sampler
from library.rng import derive_seed
from library.sampling.guidance import Guidance
from library.sampling.options import SampleOptions
from library.sampling.prompts import INLINE, Prompt, given_fields
from library.sampling.references import references_of, shown_of, size_of
from library.types import Cond, Size, like

log = get_logger()

# Fields of prompts that only some architectures support.
SPECIAL_FIELDS = (
    "guidance_scale", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "references", "image_scale",
)  # fmt: skip


@dataclass(frozen=True)
class PreviewModels:
    """The models of a preview. `encoders`: those whose outputs are not cached. `others` are modules that act on them
    from outside, such as a network."""

    denoiser: nn.Module
    vae: nn.Module
    encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    others: Sequence[nn.Module] = ()
    set_condition: Callable[[Tensor | None], None] = lambda control: None  # shows them a control image, 1 3 H W


class Preview(NamedTuple):
    """A finished preview."""

    path: Path
    image: Image.Image
    prompt: Prompt


def due(options: SampleOptions, step: int, epoch_end: int | None) -> bool:
    """Whether previews are made now. `step`: optimizer steps done, 0 before the first; `epoch_end`: the number of the
    epoch that just ended (1 is the first), None inside one. Epochs win over steps when both intervals are given."""
    if step == 0:
        return options.sample_at_first
    if options.every_n_epochs:
        return epoch_end is not None and epoch_end % options.every_n_epochs == 0
    return options.every_n_steps > 0 and epoch_end is None and step % options.every_n_steps == 0


class Stopped(Exception):
    """Raised inside a picture when the run should stop."""


class Previewer:
    """Makes the pictures of a run's prompts and writes them to `<output_dir>/sample`."""

    def __init__(
        self,
        family: ModelFamily,
        objective: Objective,
        prompts: Sequence[Prompt],
        *,
        output_dir: str | Path,
        output_name: str | None,
        sampler: str = "ddim",
        seed: int = 0,
        default_size: Size = (512, 512),
        texts: TextSource | None = None,
        conditioned: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        all_or_none: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        writes: bool = True,
    ) -> None:
        """seed: of the run, for prompts without one. default_size: (width, height) of prompts without one.

        texts: the cached outputs of text encoders for all prompts. conditioned: what learns looks at control images
        (--cn of a prompt). stopped: whether the run should stop, so that no further picture is made. writes: False in
        processes that make the pictures only because the others need them to. all_or_none: context of each picture, in
        which processes that make it together learn that another one failed. Raises UserError
        for a sampler that the objective does not have, and for control images and references that cannot be read.
        """
        self.family, self.objective, self.prompts = family, objective, tuple(prompts)
        self.folder, self.output_name = Path(output_dir) / "sample", output_name
        self.sampler, self.seed, self.default_size = sampler, seed, default_size
        self.texts, self.stopped, self.writes, self.all_or_none = texts, stopped, writes, all_or_none
        honoured = [*family.preview.honoured, *(["controlnet_image"] if conditioned else [])]
        spec = family.preview_references
        if spec is not None:
            honoured += ["references", *(["image_scale"] if spec.scale is not None else [])]
        ignored = given_fields(prompts, [name for name in SPECIAL_FIELDS if name not in honoured])
        self.controls = [self._control(prompt) if conditioned else None for prompt in self.prompts]
        self.references = [references_of(prompt, spec, self.size_of(prompt)) for prompt in self.prompts]
        if conditioned and None in self.controls:
            log.warning(f"--sample_prompts: {self.controls.count(None)} prompts have no control image (--cn)")
        if ignored:
            short = {key: f"--{name}" for name, key in INLINE.items()}
            log.warning(
                f"--sample_prompts: {', '.join(short[n] for n in ignored)} has no effect with {family.name} models"
            )
        for prompt in self.prompts:
            self._sampler(prompt)

    def render(
        self, models: PreviewModels, *, step: int, epoch: int | None, device: torch.device | str, dtype: torch.dtype
    ) -> list[Preview]:
        """Make, write and return the pictures of all prompts.

        epoch: the one that just ended (0 before the first step), None inside one. dtype: of the computation (autocast).
        What fails is one warning. Raises only KeyboardInterrupt, and ProcessDied of `all_or_none`.
        """
        pictures: list[Preview] = []
        failed: list[str] = []
        device = torch.device(device)
        with undisturbed([models.denoiser, models.vae, *models.encoders.values(), *models.others], device):
            for index, prompt in enumerate(self.prompts):
                if self.stopped():
                    break
                try:
                    with self.all_or_none():
                        image = self._picture(models, prompt, index, device, dtype)
                        path = self.folder / self.file_name(index, prompt, step=step, epoch=epoch, now=datetime.now())
                        if self.writes:
                            self._write(path, image, prompt, self.seed_of(prompt, index))
                    pictures.append(Preview(path, image, prompt))
                except Stopped:
                    break
                except ProcessDied:
                    raise
                except Exception as error:  # a failed preview must not end the training
                    lines = str(error).splitlines() or [""]
                    failed.append(f"{index:02d} {type(error).__name__}: {lines[0]}")
                    empty_cache()
        if failed:
            count = f"{len(failed)} of {len(self.prompts)} previews"
            log.warning(f"{count} failed at step {step}, the training goes on: {first_names(failed, 1)}")
        return pictures

    def file_name(self, index: int, prompt: Prompt, *, step: int, epoch: int | None, now: datetime) -> str:
        """`name_e000001_00_20261120103000_42.png`"""
        name = "" if self.output_name is None else f"{self.output_name}_"
        when = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        return f"{name}{when}_{index:02d}_{now:%Y%m%d%H%M%S}{seed}.png"

    def size_of(self, prompt: Prompt) -> Size:
        """(width, height) in pixels, rounded down to what the model can make."""
        return size_of(prompt, self.default_size, self.family.latent.factor)

    def seed_of(self, prompt: Prompt, index: int) -> int:
        """The prompt's seed, or one that stays the same through the run, so that its pictures can be compared."""
        return derive_seed(self.seed, "preview", index) if prompt.seed is None else prompt.seed

    # ---- one picture ------------------------------------------------------------------------------------------------

    def _picture(
        self, models: PreviewModels, prompt: Prompt, index: int, device: torch.device, dtype: torch.dtype
    ) -> Image.Image:
        seed = self.seed_of(prompt, index)
        # Third-party code inside a model may draw from the global generators.
        torch.manual_seed(seed)
        autocast = torch.autocast(device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))
        control = self.controls[index]
        models.set_condition(None if control is None else on_device(control, device))
        pictures = [on_device(reference_pixels(job)[None], device) for job in self.references[index]]
        encode = partial(self.family.encode_reference, models.vae)
        references = self.family.encode_references(encode, pictures) if pictures else ()
        with autocast:
            latents = self._denoise(models, prompt, index, device, references)
        models.set_condition(None)
        pixels = self.family.decode_latent(models.vae, latents)  # in the VAE's own precision
        if not bool(torch.isfinite(pixels).all()):
            raise ArithmeticError("the decoded picture is not finite")
        return to_image(pixels[0])

    def _denoise(
        self, models: PreviewModels, prompt: Prompt, index: int, device: torch.device, references: Sequence[Tensor]
    ) -> Tensor:
        """Noise to latents (1 C h w). All predictions that guidance combines are made in one batch.

        references: latents of the reference pictures, 1 C h w each.
        """
        guidance, alone = self.guidance_of(prompt), Guidance(1.0)
        sampler = self._sampler(prompt)
        # On the CPU, so that a seed gives the same picture on every device.
        generator = torch.Generator().manual_seed(self.seed_of(prompt, index))
        shape = (1, self.family.latent.channels, *self._latent_size(prompt))
        x = on_device(torch.randn(shape, generator=generator) * sampler.init_noise_sigma, device)
        guided_above = self._guided_above(prompt)
        ways = [guidance if float(t) > guided_above else alone for t in sampler.timesteps]
        conds = {way: self._cond(models, prompt, index, way.texts(prompt), device) for way in set(ways)}
        batches = {way: way.batch(prompt, references) for way in set(ways)}
        ends = torch.cat([sampler.timesteps[1:], torch.zeros_like(sampler.timesteps[:1])])
        for t, end, way in zip(sampler.timesteps, ends, ways, strict=True):
            if self.stopped():
                raise Stopped
            count = len(way.texts(prompt))
            shown = torch.cat([sampler.scale_input(x, t)] * count)
            times = on_device(t, device).expand(count)
            cond = conds[way] | {"step_end": on_device(end, device).expand(count)}
            pred = self.family.predict(models.denoiser, shown, times, cond, batches[way]).float()
            if not way.is_idle:
                pred = self._renormed(way.combined(pred), pred[-1:], prompt)
            x = sampler.step(pred, t, x, generator)
        return x

    def _control(self, prompt: Prompt) -> Tensor | None:
        """The control image of a prompt at the size of its picture, 1 3 H W in [-1, 1]. Raises UserError."""
        if prompt.controlnet_image is None:
            return None
        return pixels_of(resize(load_control(prompt.controlnet_image), self.size_of(prompt)))[None]

    def scale_of(self, prompt: Prompt) -> float:
        """Classifier-free guidance; 1: the prompt alone."""
        return self.family.preview.scale if prompt.scale is None else prompt.scale

    def guidance_of(self, prompt: Prompt) -> Guidance:
        """Guidance of a prompt, by its reference picture too where it has one and the family guides by it."""
        spec = self.family.references
        guided = spec is not None and spec.scale is not None and prompt.references
        scale = (spec.scale if prompt.image_scale is None else prompt.image_scale) if spec and guided else None
        return Guidance(self.scale_of(prompt), scale)

    def _latent_size(self, prompt: Prompt) -> tuple[int, int]:
        width, height = self.size_of(prompt)
        factor = self.family.latent.factor
        return height // factor, width // factor

    def _sampler(self, prompt: Prompt) -> Sampler:
        return self.objective.sampler(
            prompt.sample_sampler or self.sampler,
            prompt.sample_steps or self.family.preview.steps,
            size=self._latent_size(prompt),
            shift=prompt.flow_shift,
        )

    def _guided_above(self, prompt: Prompt) -> float:
        """The time above which there is guidance. --ctr counts from pure noise: 0.25 is noise levels 1 to 0.75."""
        ratio = self.family.preview.cfg_trunc_ratio if prompt.cfg_trunc_ratio is None else prompt.cfg_trunc_ratio
        return -1.0 if ratio is None else 1.0 - ratio

    def _renormed(self, guided: Tensor, plain: Tensor, prompt: Prompt) -> Tensor:
        """`guided`, at most renorm_cfg times as long as `plain` (Lumina-Image 2.0, arXiv:2503.21758, section 3.4)."""
        limit = self.family.preview.renorm_cfg if prompt.renorm_cfg is None else prompt.renorm_cfg
        if not limit:
            return guided
        lengths = [like(torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim()))), x) for x in (plain, guided)]
        return guided * (limit * lengths[0] / lengths[1].clamp_min(1e-8)).clamp(max=1)

    def _cond(
        self, models: PreviewModels, prompt: Prompt, index: int, texts: Sequence[str], device: torch.device
    ) -> Cond:
        """What `predict` reads of these texts of a prompt."""
        spec, cond = self.family.references, Cond()
        shown = shown_of(self.references[index], spec)
        if self.texts is not None:
            cond = self.family.join_conds([self.texts.get(Text(text, shown)) for text in texts])
        if models.encoders:
            pictures = [[reference_pixels(job) for job in shown]] * len(texts)
            cond |= self.family.encode_text(self.family.tokenize_with([*texts], pictures), models.encoders)
        guidance = self.family.preview.guidance if prompt.guidance_scale is None else prompt.guidance_scale
        if guidance is not None:
            cond["guidance"] = torch.full((len(texts),), guidance)
        return {k: on_device(v, device) for k, v in cond.items()}

    def _write(self, path: Path, image: Image.Image, prompt: Prompt, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        info = PngInfo()
        info.add_itxt("prompt", prompt.prompt)
        info.add_itxt("parameters", self._parameters(prompt, image, seed))
        atomic_write(path, lambda temp: image.save(temp, format="PNG", pnginfo=info))

    def _parameters(self, prompt: Prompt, image: Image.Image, seed: int) -> str:
        """The picture's settings in the text form that picture viewers of web UIs know."""
        guidance = self.guidance_of(prompt)
        settings = {
            "Steps": prompt.sample_steps or self.family.preview.steps,
            "Sampler": prompt.sample_sampler or self.sampler,
            "CFG scale": guidance.text,
            **({} if guidance.picture is None else {"Image CFG scale": guidance.picture}),
            "Seed": seed,
            "Size": f"{image.width}x{image.height}",
        }
        negative = f"\nNegative prompt: {prompt.negative_prompt}" if prompt.negative_prompt else ""
        return f"{prompt.prompt}{negative}\n{', '.join(f'{k}: {v}' for k, v in settings.items())}"


# ---- leaving no trace ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside it: evaluation mode, no gradients, free use of the global generators. Restores everything afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    python = random.getstate()
    try:
        with kept_random_state(device), torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        random.setstate(python)
        for module, mode in modes.items():
            module.training = mode


# ---- pictures -----------------------------------------------------------------------------------------------------


def to_image(pixels: Tensor) -> Image.Image:
    """3 H W in [-1, 1] (or 1 H W: grey) as a picture."""
    levels = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy(), "RGB")


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str], columns: int) -> Image.Image:
    """All pictures on one white sheet, row by row, each with its label below."""
    assert images and len(images) == len(labels) and columns > 0
    gap, line = 8, 18
    width, height = max(i.width for i in images), max(i.height for i in images)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + line + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = gap + index % columns * (width + gap)
        top = gap + index // columns * (height + line + gap)
        sheet.paste(image.convert("RGB"), (left + (width - image.width) // 2, top + height - image.height))
        draw.text((left, top + height + 2), fitted(label, font, width), fill="black", font=font)
    return sheet


def fitted(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The label, cut to `width` pixels. The built-in font knows Latin letters only."""
    text = label.encode("latin-1", "replace").decode("latin-1")
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…" if isinstance(font, ImageFont.FreeTypeFont) else text[:-1]
    return text
