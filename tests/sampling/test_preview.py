# SPDX-License-Identifier: Apache-2.0
"""Previews with a tiny real Stable Diffusion: the right pictures, and no trace in the training."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.data.encoding import Text
from library.families.flux.options import FluxFlowOptions
from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from library.families.sheet import PreviewDefaults
from library.objectives.ddpm import DDPMObjective
from library.objectives.flow import FlowObjective, constant_shift
from library.objectives.options import DDPMOptions, LossOptions
from library.rng import derive_seed
from library.sampling.options import SAMPLER_NAMES, SampleOptions
from library.sampling.preview import Previewer, PreviewModels, contact_sheet, due, to_image, undisturbed
from library.sampling.prompts import Prompt
from library.types import Cond
from tests.tiny import make_tiny_sd

F32: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    folder = make_tiny_sd(tmp_path_factory.mktemp("model"))
    return StableDiffusion(SDOptions(pretrained_model_name_or_path=str(folder)))


@pytest.fixture
def models(family: StableDiffusion) -> PreviewModels:
    family = StableDiffusion(family.options)  # some tests write into the weights, which are mapped
    return PreviewModels(
        family.load_denoiser(torch.float32, "cpu"),
        family.load_vae(torch.float32, "cpu"),
        {"clip": family.load_text_encoder("clip", torch.float32, "cpu")},
    )


OBJECTIVE = DDPMObjective(DDPMOptions(), LossOptions(), prediction_type="epsilon")


def previewer(family: Any, prompts: Sequence[Prompt], folder: Path, **changes: Any) -> Previewer:
    known: dict[str, Any] = {"output_dir": folder, "output_name": "my", "seed": 42, "default_size": (64, 64)}
    return Previewer(family, OBJECTIVE, prompts, **{**known, **changes})


CAT = Prompt("red cat", negative_prompt="blue dog", seed=7, sample_steps=3, scale=4.0)


# ---- the picture --------------------------------------------------------------------------------------------------


def literal_picture(family: StableDiffusion, models: PreviewModels, prompt: Prompt, width: int, height: int) -> Tensor:
    """DDIM (Song et al. 2021, equation 12, eta 0) with classifier-free guidance, written out: two separate passes."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    assert prompt.sample_steps is not None and prompt.scale is not None and prompt.seed is not None
    stride = 1000 // prompt.sample_steps
    x = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(prompt.seed))
    contexts = [
        family.encode_text(family.tokenize([text]), models.encoders) for text in (prompt.negative_prompt, prompt.prompt)
    ]
    for i in reversed(range(prompt.sample_steps)):
        t = i * stride + 1
        without, with_prompt = (
            family.predict(models.denoiser, x, torch.tensor([t]), context, None) for context in contexts
        )
        noise = without + prompt.scale * (with_prompt - without)
        a, before = alphas[t].float(), alphas[max(t - stride, 0)].float()
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    pixels: Tensor = models.vae.decode(x / 0.18215).sample  # type: ignore[operator]
    return pixels.clamp(-1, 1)[0]


@torch.no_grad()
def test_the_picture_is_the_one_of_the_formula(family: StableDiffusion, models: PreviewModels, tmp_path: Path) -> None:
    (picture,) = previewer(family, [replace(CAT, width=79, height=100)], tmp_path).render(
        models, step=3, epoch=None, **F32
    )
    assert picture.image.size == (72, 96)
    expected = to_image(literal_picture(family, models, CAT, 72, 96))
    ours, theirs = (torch.tensor(list(i.tobytes()), dtype=torch.int16) for i in (picture.image, expected))
    assert (ours - theirs).abs().max() <= 1
    assert ours.float().std() > 1  # not a plain grey


@torch.no_grad()
def test_a_sampler_that_scales_its_input(family: StableDiffusion, models: PreviewModels, tmp_path: Path) -> None:
    """Euler: dx = noise * dsigma (Karras et al. 2022, algorithm 1, no churn); the model sees x / sqrt(sigma^2 + 1)."""
    prompt = replace(CAT, sample_sampler="euler", scale=1.0)
    (picture,) = previewer(family, [prompt], tmp_path).render(models, step=3, epoch=None, **F32)
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    sigmas = ((1 - alphas) / alphas).sqrt().float()
    context = family.encode_text(family.tokenize([prompt.prompt]), models.encoders)
    times = [667, 334, 1]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * (sigmas[times[0]] ** 2 + 1).sqrt()
    for t, after in zip(times, [*sigmas[times[1:]], torch.tensor(0.0)]):
        noise = family.predict(models.denoiser, x / (sigmas[t] ** 2 + 1).sqrt(), torch.tensor([t]), context, None)
        x = x + noise * (after - sigmas[t])
    expected = to_image(models.vae.decode(x / 0.18215).sample.clamp(-1, 1)[0])  # type: ignore[operator]
    ours, theirs = (torch.tensor(list(i.tobytes()), dtype=torch.int16) for i in (picture.image, expected))
    assert (ours - theirs).abs().max() <= 1


def pixels_of(picture: Any) -> bytes:
    return picture.image.tobytes()


def test_seed_prompt_and_scale_matter_and_nothing_else(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path
) -> None:
    changed = [
        CAT, CAT, replace(CAT, seed=8), replace(CAT, prompt="star"), replace(CAT, negative_prompt=""),
        replace(CAT, scale=1.0), replace(CAT, scale=0.0), replace(CAT, sample_sampler="euler_a"),
    ]  # fmt: skip
    first, again, *others = previewer(family, changed, tmp_path).render(models, step=1, epoch=1, **F32)
    assert pixels_of(first) == pixels_of(again)
    assert len({pixels_of(p) for p in [first, *others]}) == len(others) + 1
    torch.manual_seed(999)
    (later,) = previewer(family, [CAT], tmp_path / "b").render(models, step=500, epoch=None, **F32)
    assert pixels_of(later) == pixels_of(first)


def test_prompts_without_a_seed_have_their_own_all_through_the_run(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path
) -> None:
    two = [replace(CAT, seed=None)] * 2
    maker = previewer(family, two, tmp_path)
    first = maker.render(models, step=1, epoch=None, **F32)
    later = maker.render(models, step=2, epoch=None, **F32)
    assert [pixels_of(p) for p in first] == [pixels_of(p) for p in later]
    assert pixels_of(first[0]) != pixels_of(first[1])
    explicit = replace(CAT, seed=derive_seed(42, "preview", 0))
    (same,) = previewer(family, [explicit], tmp_path).render(models, step=1, epoch=None, **F32)
    assert pixels_of(same) == pixels_of(first[0])


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_every_sampler_makes_a_picture(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path, name: str
) -> None:
    maker = previewer(family, [replace(CAT, sample_steps=4)], tmp_path, sampler=name)
    (picture,) = maker.render(models, step=1, epoch=None, **F32)
    assert picture.image.size == (64, 64) and len(set(pixels_of(picture))) > 10


def test_cached_texts_need_no_encoder(family: StableDiffusion, models: PreviewModels, tmp_path: Path) -> None:
    prompts = [CAT, Prompt("star", sample_steps=3, scale=1.0, seed=1)]
    expected = previewer(family, prompts, tmp_path).render(models, step=1, epoch=None, **F32)
    texts = [text for prompt in prompts for text in (prompt.negative_prompt, prompt.prompt)]
    conds = family.split_cond(family.encode_text(family.tokenize(texts), models.encoders))
    maker = previewer(family, prompts, tmp_path, texts=Stored(dict(zip(texts, conds, strict=True))))
    found = maker.render(replace(models, encoders={}), step=1, epoch=None, **F32)
    assert [pixels_of(p) for p in found] == [pixels_of(p) for p in expected]


class Stored(dict[str, Cond]):
    """Outputs of text encoders by caption."""

    def get(self, text: Text) -> Cond:  # type: ignore[override]
        return self[text.caption]


def test_bfloat16_computation(family: StableDiffusion, models: PreviewModels, tmp_path: Path) -> None:
    maker = previewer(family, [CAT], tmp_path)
    (exact,) = maker.render(models, step=1, epoch=None, **F32)
    for denoiser in (models.denoiser, family.load_denoiser(torch.bfloat16, "cpu")):
        (rough,) = maker.render(
            replace(models, denoiser=denoiser), step=1, epoch=None, device="cpu", dtype=torch.bfloat16
        )
        ours, theirs = (torch.tensor(list(pixels_of(p)), dtype=torch.float32) for p in (exact, rough))
        assert 0 < (ours - theirs).abs().mean() < 4


# ---- the file -----------------------------------------------------------------------------------------------------


def test_files_are_named_as_users_know_them(family: StableDiffusion, tmp_path: Path) -> None:
    maker = previewer(family, [CAT], tmp_path)
    now = datetime(2026, 11, 20, 10, 30, 5)
    assert maker.file_name(0, CAT, step=100, epoch=1, now=now) == "my_e000001_00_20261120103005_7.png"
    assert (
        maker.file_name(12, replace(CAT, seed=None), step=100, epoch=None, now=now) == "my_000100_12_20261120103005.png"
    )
    unnamed = previewer(family, [CAT], tmp_path, output_name=None)
    assert unnamed.file_name(0, CAT, step=0, epoch=0, now=now) == "e000000_00_20261120103005_7.png"


def test_the_file_tells_its_prompt(family: StableDiffusion, models: PreviewModels, tmp_path: Path) -> None:
    prompt = replace(CAT, prompt="red cat 猫")
    (picture,) = previewer(family, [prompt], tmp_path).render(models, step=2, epoch=None, **F32)
    assert picture.path.parent == tmp_path / "sample" and [picture.path] == list((tmp_path / "sample").iterdir())
    with Image.open(picture.path) as opened:
        assert opened.text["prompt"] == "red cat 猫"  # type: ignore[attr-defined]
        assert opened.text["parameters"] == (  # type: ignore[attr-defined]
            "red cat 猫\nNegative prompt: blue dog\nSteps: 3, Sampler: ddim, CFG scale: 4.0, Seed: 7, Size: 64x64"
        )
        assert opened.convert("RGB").tobytes() == pixels_of(picture)


# ---- no trace in the training -------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws from the global generators in every call, and would change a training run by that."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.dropout = nn.Dropout(0.5)
        self.was_training: list[bool] = []
        self.drawn: list[float] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.drawn.append(torch.rand(1).item())
        random.random()
        self.was_training.append(self.training or self.dropout.training or torch.is_grad_enabled())
        return self.inner(*args, **kwargs)


def test_training_goes_on_as_if_nothing_had_been(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2))
    denoiser = Noisy(models.denoiser).train()
    denoiser.inner.get_submodule("mid_block").eval()
    for parameter in denoiser.parameters():
        parameter.grad = torch.ones_like(parameter)
    changed = replace(models, denoiser=denoiser, others=[network])
    modules = [m for model in (denoiser, models.vae, *models.encoders.values(), network) for m in model.modules()]
    modes = [m.training for m in modules]
    assert any(modes) and not all(modes)
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(5)
    random.seed(5)
    maker = previewer(family, [CAT], tmp_path)
    assert maker.render(changed, step=1, epoch=None, **F32)
    assert denoiser.was_training == [False] * 3
    generator = torch.Generator().manual_seed(7)  # the prompt's seed, not the state of the training
    assert denoiser.drawn == [torch.rand(1, generator=generator).item() for _ in range(3)]
    assert [m.training for m in modules] == modes and torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in denoiser.parameters() if p.grad is not None)
    assert all(
        p.requires_grad == q.requires_grad for p, q in zip(denoiser.inner.parameters(), models.denoiser.parameters())
    )


class Broken(nn.Module):
    """Fails in the way it is told, in every second picture."""

    def __init__(self, inner: nn.Module, error: BaseException) -> None:
        super().__init__()
        self.inner, self.error, self.calls = inner, error, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            raise self.error
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), ValueError("bad"), MemoryError()]
)
def test_a_failing_preview_is_one_warning(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = Broken(models.denoiser, error).train()
    two = [CAT, replace(CAT, prompt="star")]
    with caplog.at_level(logging.WARNING, "trainyard"):
        found = previewer(family, two, tmp_path).render(replace(models, denoiser=denoiser), step=9, epoch=None, **F32)
    assert [p.prompt.prompt for p in found] == ["star"] and denoiser.training
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"1 of 2 previews failed at step 9, the training goes on: 00 {type(error).__name__}"
    )
    assert "\n" not in record.getMessage()


def test_a_folder_that_cannot_be_written_is_one_warning(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sample").write_text("a file")
    with caplog.at_level(logging.WARNING, "trainyard"):
        assert previewer(family, [CAT], tmp_path).render(models, step=9, epoch=None, **F32) == []
    assert len(caplog.records) == 1 and "sample" in caplog.text


def test_ctrl_c_is_not_swallowed(family: StableDiffusion, models: PreviewModels, tmp_path: Path) -> None:
    denoiser = Broken(models.denoiser, KeyboardInterrupt()).train()
    with pytest.raises(KeyboardInterrupt):
        previewer(family, [CAT], tmp_path).render(replace(models, denoiser=denoiser), step=9, epoch=None, **F32)
    assert denoiser.training and torch.is_grad_enabled()


def test_a_picture_that_is_not_finite_fails(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for parameter in models.denoiser.parameters():
        parameter.data.fill_(float("nan"))
    with caplog.at_level(logging.WARNING, "trainyard"):
        assert previewer(family, [CAT], tmp_path).render(models, step=9, epoch=None, **F32) == []
    assert "not finite" in caplog.text


def test_options_that_the_family_cannot_honour_are_named_once(
    family: StableDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [replace(CAT, guidance_scale=3.5), replace(CAT, flow_shift=2.0)]
    with caplog.at_level(logging.WARNING, "trainyard"):
        for honoured in (("flow_shift",), ("flow_shift", "guidance_scale")):
            own = type("Honouring", (StableDiffusion,), {"preview": PreviewDefaults(honoured=honoured)})
            previewer(own(family.options), prompts, tmp_path)
    assert [r.getMessage() for r in caplog.records] == ["--sample_prompts: --g has no effect with sd models"]


def test_guidance_only_in_the_first_steps_and_no_longer_than_allowed(
    family: StableDiffusion, models: PreviewModels, tmp_path: Path
) -> None:
    prompt = replace(CAT, sample_steps=4, cfg_trunc_ratio=0.5, renorm_cfg=1.0)
    objective = FlowObjective(FluxFlowOptions(), LossOptions(), preview_shift=constant_shift(1.0))
    maker = Previewer(family, objective, [prompt], output_dir=tmp_path, output_name="my", default_size=(64, 64))
    denoiser = Noisy(models.denoiser)
    (picture,) = maker.render(replace(models, denoiser=denoiser), step=1, epoch=None, **F32)
    sampler = objective.sampler("ddim", 4, size=(8, 8))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    conds = [family.encode_text(family.tokenize([text]), models.encoders) for text in ("blue dog", "red cat")]
    with torch.no_grad():
        for index, t in enumerate(sampler.timesteps):
            without, plain = (family.predict(models.denoiser, x, t.expand(1), cond, None) for cond in conds)
            pred = plain
            if index < 2:  # noise levels 1 and 0.75; 0.5 and 0.25 are not above 0.5
                pred = without + 4.0 * (plain - without)
                pred = pred * min(1.0, float(plain.norm() / pred.norm()))
            x = sampler.step(pred, t, x, None)
        expected = to_image(family.decode_latent(models.vae, x)[0])
    difference = (torch.tensor(list(pixels_of(picture))) - torch.tensor(list(expected.tobytes()))).abs().max()
    assert difference <= 1


def test_undisturbed_restores_after_an_error() -> None:
    layer = nn.Linear(1, 1)
    with pytest.raises(ZeroDivisionError), undisturbed([layer], torch.device("cpu")):
        assert not layer.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert layer.training and torch.is_grad_enabled()


# ---- when ---------------------------------------------------------------------------------------------------------


def test_when_previews_are_made() -> None:
    steps = SampleOptions(sample_prompts="p", sample_every_n_steps=3)
    both = replace(steps, sample_every_n_epochs=2)
    moments = [(0, None), (2, None), (3, None), (4, 1), (6, 2), (8, 3), (9, None), (12, 4)]
    assert [m for m in moments if due(steps, *m)] == [(3, None), (9, None)]
    assert [m for m in moments if due(both, *m)] == [(6, 2), (12, 4)]
    assert [m for m in moments if due(replace(both, sample_at_first=True), *m)] == [(0, None), (6, 2), (12, 4)]
    assert [m for m in moments if due(replace(steps, sample_every_n_steps=0), *m)] == []


# ---- sheets -------------------------------------------------------------------------------------------------------


def test_contact_sheet_places_pictures_and_labels() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (40, 30), c) for c in colours]
    sheet = contact_sheet(images, ["one", "猫 two", "a very long label that does not fit"], 2)
    assert sheet.size == (8 + 2 * 48, 8 + 2 * 56)
    centres = [(8 + 20, 8 + 15), (8 + 48 + 20, 8 + 15), (8 + 20, 8 + 56 + 15)]
    assert [sheet.getpixel(c) for c in centres] == colours
    label = sheet.crop((8, 8 + 30, 48, 8 + 48)).convert("L")
    assert min(label.tobytes()) < 128, "no text below the first picture"
    gap = sheet.crop((49, 8, 55, 56)).convert("L")
    assert min(gap.tobytes()) == 255
    assert contact_sheet(images[:1], ["x"], 5).size == (56, 64)


def test_to_image_rounds_and_clamps() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert list(to_image(pixels).convert("L").tobytes()) == [0, 0, 128, 255, 255]
    assert to_image(torch.zeros(1, 2, 2)).mode == "RGB"
