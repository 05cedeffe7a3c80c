# SPDX-License-Identifier: Apache-2.0
"""The built-in base model: its drawings, criterion, tokenizer, trainings and the shipped folder."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from base_model import draw, score, text, tokenizer, unet, vae  # noqa: E402
from base_model.assemble import load_pipeline, sample  # noqa: E402
from base_model.training import Budget, Schedule  # noqa: E402

SHIPPED = ROOT / "examples" / "base_model"


def test_criterion_recognises_drawings():
    rng = random.Random(1)
    scenes = [draw.random_scene(rng) for _ in range(200)]
    noise = np.random.default_rng(1)
    right = 0
    for scene in scenes:
        pixels = np.asarray(draw.draw_scene(scene, rng)) + noise.normal(0, 8, (128, 128, 3))
        seen = score.score(pixels.clip(0, 255).astype(np.uint8), scene.background)
        right += (seen.thing, seen.colour) == (scene.thing, scene.colour)
    assert right >= 190


def test_criterion_tells_the_rocket_from_known_things():
    rng = random.Random(2)
    backgrounds = list(draw.CONCEPT_BACKGROUNDS) * 4
    drawings = [draw.draw_scene(draw.concept_scene(rng, name), rng) for name in backgrounds]
    report = score.concept_report(drawings, backgrounds)
    assert report.rocket_nearest >= 0.95
    assert report.mean_rocket_similarity > 0.9
    scores = [score.score(drawing, name) for drawing, name in zip(drawings, backgrounds)]
    assert max(s.known_similarity for s in scores) < 0.85


def test_empty_picture_shows_nothing():
    empty = np.full((128, 128, 3), draw.COLOURS["blue"], np.uint8)
    assert score.score(empty, "blue").thing == score.NOTHING


def test_captions_never_name_the_concept():
    rng = random.Random(3)
    words = {word for _ in range(2000) for word in draw.random_scene(rng).caption.split()}
    assert not words & {draw.CONCEPT, draw.CONCEPT_WORD}
    assert words <= set(tokenizer.WORDS)


@pytest.mark.parametrize("folder, count", [("rocket", 12), ("known", 48)])
def test_example_pictures_have_captions(folder, count):
    pictures = sorted((ROOT / "examples" / folder).glob("*.png"))
    assert len(pictures) == count
    assert all(picture.with_suffix(".txt").read_text().startswith("a ") for picture in pictures)


def test_tokenizer_words_and_round_trip():
    built = tokenizer.build_tokenizer()
    assert [word for word in tokenizer.WORDS if len(built.tokenize(word)) != 1] == []
    caption = "a sks rocket, on a blue background (zebra café!)"
    assert built.decode(built(caption).input_ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")


def test_tokenizer_loads_from_vocab_and_merges(tmp_path):
    tokenizer.save_tokenizer(tmp_path)
    loaded = tokenizer.CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    from_tables = tokenizer.CLIPTokenizer.from_pretrained(tmp_path)
    caption = "A red zebra, sks 12"
    expected = tokenizer.build_tokenizer()(caption).input_ids
    assert loaded(caption).input_ids == expected == from_tables(caption).input_ids


def test_schedule_warms_up_stays_and_decays():
    schedule = Schedule(1.0, warmup_steps=10, decay_share=0.2)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(50, 0.8) == pytest.approx(1.0)
    assert schedule.rate(90, 0.9) == pytest.approx(0.5)
    assert Budget(minutes=10).fraction(0, 5) == 0.5


def test_whitening_keeps_reconstructions():
    torch.manual_seed(0)
    model = vae.build_vae().eval()
    pictures, _ = draw.picture_chunk(1, 4)
    inputs = vae.to_tensor(pictures)
    with torch.no_grad():
        before = model.decode(model.encode(inputs).latent_dist.mean).sample
        vae.whiten(model, pictures)
        after = model.decode(model.encode(inputs).latent_dist.mean).sample
    latents = vae.encode(model, pictures)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)


def _toy_training() -> unet.DenoiserTraining:
    torch.manual_seed(0)
    text_encoder = text.build_text_encoder(tokenizer.build_tokenizer())
    return unet.DenoiserTraining(unet.build_unet(), text_encoder, unet.UnetOptions(batch_size=2))


def _toy_data() -> unet.TrainingSet:
    built = tokenizer.build_tokenizer()
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = text.token_ids(built, ["a red circle", "a blue star", "a green tree", "a black house"])
    return unet.TrainingSet(latents, ids, text.token_ids(built, [""])[0])


def test_resumed_training_is_bit_exact(tmp_path):
    data, checkpoint = _toy_data(), tmp_path / "denoiser.pt"
    straight = _toy_training()
    unet.train_denoiser(straight, data, Budget(samples=6), tmp_path / "straight.pt")

    first = _toy_training()
    for _ in range(2):  # the learning rates of a budget of 6 samples
        first.train_step(data, Schedule(first.options.learning_rate).rate(first.step, first.samples / 6))
    torch.save(first.state_dict(), checkpoint)
    resumed = _toy_training()
    resumed.load_state_dict(torch.load(checkpoint, weights_only=True))
    unet.train_denoiser(resumed, data, Budget(samples=6), checkpoint)

    assert resumed.step == straight.step == 3
    for name in ("unet", "text_encoder"):
        ours, expected = resumed.state_dict()[name], straight.state_dict()[name]
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
    averages = zip(resumed.state_dict()["averages"], straight.state_dict()["averages"])
    assert all(torch.equal(a, b) for a, b in averages)


def test_shipped_folder_draws_what_is_asked():
    prompts = score.known_prompts(1)
    images = sample(load_pipeline(SHIPPED), [prompt.caption for prompt in prompts], seed=11)
    report = score.known_report(images, prompts)
    assert report.count == 8
    assert report.thing_right >= 0.75
