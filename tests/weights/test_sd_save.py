# SPDX-License-Identifier: Apache-2.0
"""Whole models of Stable Diffusion as files and folders: what survives, and that diffusers reads them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from library.io.atomic import clean_leftovers
from library.io.checkpoint import CheckpointForm, check_output, is_save_of, remove_save
from tests.tiny import make_tiny_sd, vocabulary, write_tokenizer

PROMPT = "a photo of a cat"
FOLDERS = ("diffusers", "diffusers_safetensors")
CASES: dict[str, dict[str, Any]] = {"sd1": {}, "sd2 v": {"v2": True, "v_parameterization": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(case, layout) -> path."""
    root = tmp_path_factory.mktemp("models")
    made = {"sd1": {"version": 1}, "sd2 v": {"version": 2, "v_prediction": True}}
    return {
        (name, layout): make_tiny_sd(root / f"{name}_{layout}", layout=layout, **values)  # type: ignore[arg-type]
        for name, values in made.items()
        for layout in ("diffusers", "single")
    }


def family(path: Path, case: str = "sd1", **options: Any) -> StableDiffusion:
    return StableDiffusion(SDOptions(pretrained_model_name_or_path=str(path), **CASES[case], **options))


def trained(sd: StableDiffusion) -> dict[str, nn.Module]:
    """The modules that a run may have, changed by what could be training."""
    unet, encoder = sd.load_denoiser(torch.float32, "cpu"), sd.load_text_encoder("clip", torch.float32, "cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*unet.parameters(), *encoder.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return {"unet": unet, "text_encoder": encoder}


def write(sd: StableDiffusion, modules: dict[str, nn.Module], path: Path, kind: str, **values: Any) -> Path:
    form = CheckpointForm(kind, metadata={"modelspec.title": "t"}, **values)
    sd.save(modules["unet"], {"clip": modules["text_encoder"]}, path, form)
    return path


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- diffusers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def denoised(sd: StableDiffusion, modules: dict[str, nn.Module], pipeline: Any, latents: Tensor) -> Tensor:
    """What our encoding and prediction make of `latents` in four steps of the pipeline's own schedule."""
    negative, positive = (
        sd.encode_text(sd.tokenize([text]), {"clip": modules["text_encoder"]}) for text in ("", PROMPT)
    )
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    x = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        inputs, step = scheduler.scale_model_input(x, t), t.view(1)
        without, with_text = (sd.predict(modules["unet"], inputs, step, cond, None) for cond in (negative, positive))
        x = scheduler.step(without + 5 * (with_text - without), t, x).prev_sample
    return x


def assert_denoises_alike(sd: StableDiffusion, modules: dict[str, nn.Module], pipeline: Any) -> None:
    """In the steps of a schedule that draws no noise."""
    from diffusers import DDIMScheduler

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT, latents=latents.clone(), num_inference_steps=4, guidance_scale=5.0, width=64, height=64,
        output_type="latent",
    ).images  # fmt: skip
    ours = denoised(sd, modules, pipeline, latents)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((theirs - latents).abs().max()) > 0.1


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("layout", ["diffusers", "single"])
@pytest.mark.parametrize("case", CASES)
def test_folder_is_a_pipeline(models: Any, tmp_path: Path, case: str, layout: str, kind: str) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    sd = family(models[case, layout], case)
    modules = trained(sd)
    folder = write(sd, modules, tmp_path / "out", kind)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert_equal(pipeline.unet, modules["unet"])
    assert_equal(pipeline.vae, sd.load_vae(None, "cpu"))
    assert_equal(pipeline.text_encoder, modules["text_encoder"])
    assert pipeline.tokenizer.pad_token_id == sd.tokenizers["clip"].padding
    assert pipeline.tokenizer(PROMPT).input_ids == sd.tokenizers["clip"].tokenizer(PROMPT).input_ids
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if case == "sd2 v" else "epsilon")
    if layout == "single":
        assert isinstance(pipeline.scheduler, DDIMScheduler)
        assert pipeline.scheduler.config.steps_offset == 1 and not pipeline.scheduler.config.clip_sample
    endings = {path.suffix for path in folder.rglob("*") if path.stat().st_size > 10_000 and path.suffix != ".json"}
    assert endings == {".safetensors" if kind == "diffusers_safetensors" else ".bin"}
    assert_denoises_alike(sd, modules, pipeline)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize("case", CASES)
def test_file_opens_in_diffusers_and_denoises_alike(models: Any, tmp_path: Path, case: str, kind: str) -> None:
    from diffusers import StableDiffusionPipeline

    sd = family(models[case, "single"], case)
    modules = trained(sd)
    path = write(sd, modules, tmp_path / f"out.{kind}", kind)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(models[case, "diffusers"]), local_files_only=True
    )
    for name, module in modules.items():
        assert_equal(getattr(pipeline, name), module)
    assert_denoises_alike(sd, modules, pipeline)


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_is_read_again_bit_for_bit_also_in_half_precision(models: Any, tmp_path: Path, kind: str) -> None:
    sd = family(models["sd2 v", "diffusers"], "sd2 v")
    modules = trained(sd)
    folder = tmp_path / "half"
    sd.save(modules["unet"], {}, folder, CheckpointForm(kind, dtype=torch.float16))
    again = family(folder, "sd2 v")
    again.check()
    assert_equal(again.load_denoiser(None, "cpu"), modules["unet"].half())
    assert_equal(again.load_text_encoder("clip", None, "cpu"), sd.load_text_encoder("clip", None, "cpu").half())
    assert_equal(again.load_vae(None, "cpu"), sd.load_vae(None, "cpu").half())
    assert again.tokenizers["clip"].fingerprint() == sd.tokenizers["clip"].fingerprint()


def test_tokenizer_of_a_single_sd2_file_names_its_padding(models: Any, tmp_path: Path) -> None:
    """It may come from SD 1, whose padding is another one; old folders have nothing but the vocabulary."""
    words, merges = vocabulary()
    for place in (tmp_path / "whole", tmp_path / "vocabulary"):
        write_tokenizer(place / "tokenizer")
        if place.name == "vocabulary":
            for file in (place / "tokenizer").iterdir():
                file.unlink()
            (place / "tokenizer" / "vocab.json").write_text(json.dumps(words))
            lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
            (place / "tokenizer" / "merges.txt").write_text("\n".join(lines))
        (place / "model.safetensors").symlink_to(models["sd2 v", "single"])
        sd = family(place / "model.safetensors", "sd2 v")
        assert sd.tokenizers["clip"].padding == 0 != sd.tokenizers["clip"].tokenizer.pad_token_id
        write(sd, trained(sd), place / "out", "diffusers_safetensors")
        again = family(place / "out", "sd2 v")
        assert again.tokenizers["clip"].fingerprint() == sd.tokenizers["clip"].fingerprint()
        assert torch.equal(again.tokenize([PROMPT]).ids["clip"], sd.tokenize([PROMPT]).ids["clip"])


# ---- one file -------------------------------------------------------------------------------------------------------


STRANGERS = {
    "model_ema.decay": torch.tensor(0.5),
    "model_ema.diffusion_modeltime_embed0weight": torch.randn(4, 4),
    "alphas_cumprod": torch.rand(10, dtype=torch.float64),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
}


@pytest.mark.parametrize("case", CASES)
def test_what_nobody_reads_survives(models: Any, tmp_path: Path, case: str) -> None:
    source = {**load_file(models[case, "single"]), **STRANGERS}
    save_file(source, tmp_path / "source.safetensors")
    (tmp_path / "tokenizer").symlink_to(models[case, "single"].parent / "tokenizer")
    sd = family(tmp_path / "source.safetensors", case)
    modules = {"unet": sd.load_denoiser(None, "cpu"), "text_encoder": sd.load_text_encoder("clip", None, "cpu")}
    found = load_file(write(sd, modules, tmp_path / "out.safetensors", "safetensors"))
    assert found.keys() == source.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in source.items())


def test_ckpt_counts_on_from_its_source(models: Any, tmp_path: Path) -> None:
    """As Lightning wrote them: numbers beside the weights, and keys of other programs below `state_dict`."""
    tensors = {**load_file(models["sd1", "single"]), **STRANGERS}
    torch.save({"epoch": 3, "global_step": 1000, "state_dict": tensors}, tmp_path / "source.ckpt")
    (tmp_path / "tokenizer").symlink_to(models["sd1", "single"].parent / "tokenizer")
    for name, expected in ((tmp_path / "source.ckpt", (5, 1040)), (models["sd1", "single"], (2, 40))):
        sd = family(name)
        modules = trained(sd)
        path = write(sd, modules, tmp_path / "out.ckpt", "ckpt", epochs=2, steps=40)
        found = torch.load(path, weights_only=True)
        assert found.keys() == {"state_dict", "epoch", "global_step"}
        assert (found["epoch"], found["global_step"]) == expected
        assert (found["state_dict"].keys() == tensors.keys()) == (name == tmp_path / "source.ckpt")
        assert_equal(family(path).load_denoiser(None, "cpu"), modules["unet"])


def test_old_text_encoder_names_are_replaced(models: Any, tmp_path: Path) -> None:
    """A file without the `text_model.` level becomes one with it, and holds no second, untrained encoder."""
    whole = load_file(models["sd1", "single"])
    save_file(
        {name.replace(".text_model.", "."): tensor for name, tensor in whole.items()}, tmp_path / "old.safetensors"
    )
    (tmp_path / "tokenizer").symlink_to(models["sd1", "single"].parent / "tokenizer")
    sd = family(tmp_path / "old.safetensors")
    assert load_file(write(sd, trained(sd), tmp_path / "new.safetensors", "safetensors")).keys() == whole.keys()


def test_vae_option_is_what_is_saved(models: Any, tmp_path: Path) -> None:
    other = make_tiny_sd(tmp_path / "other", seed=9)
    sd = family(models["sd1", "single"], vae=str(other))
    found = load_file(write(sd, trained(sd), tmp_path / "out.safetensors", "safetensors"))
    source = load_file(models["sd1", "single"])
    assert found.keys() == source.keys()
    name = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(found[name], family(other).load_vae(None, "cpu").state_dict()["decoder.conv_in.weight"])
    assert not torch.equal(found[name], source[name])


def test_sd2_folder_becomes_a_whole_file(models: Any, tmp_path: Path) -> None:
    """What a folder lacks of OpenCLIP is made up: a copy of the last block, ones, and 1."""
    sd = family(models["sd2 v", "diffusers"], "sd2 v")
    found = load_file(write(sd, trained(sd), tmp_path / "out.safetensors", "safetensors"))
    assert found.keys() == load_file(models["sd2 v", "single"]).keys()
    start = "cond_stage_model.model."
    width = len(found[f"{start}ln_final.weight"])
    assert torch.equal(found[f"{start}text_projection"], torch.ones(width, width))
    assert torch.equal(found[f"{start}logit_scale"], torch.tensor(1.0))
    names = [name for name in found if ".resblocks.3." in name]
    assert len(names) == 12
    assert all(torch.equal(found[name], found[name.replace(".3.", ".2.")]) for name in names)


# ---- folders among other files --------------------------------------------------------------------------------------


def test_older_folder_is_replaced_and_others_stay(models: Any, tmp_path: Path) -> None:
    sd = family(models["sd1", "diffusers"])
    write(sd, trained(sd), tmp_path / "out", "diffusers")
    (tmp_path / "out" / "extra.txt").write_text("old")
    write(sd, trained(sd), tmp_path / "out", "diffusers_safetensors")
    assert not (tmp_path / "out" / "extra.txt").exists() and not list((tmp_path / "out").rglob("*.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and clean_leftovers(tmp_path) == []

    assert check_output(tmp_path, "out", models=["out"]) == []
    (tmp_path / "notes").mkdir()
    assert check_output(tmp_path, "notes", models=["notes"]) == []
    (tmp_path / "notes" / "a.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="notes is a folder of other things") as refused:
        check_output(tmp_path, "x", models=["notes", "file"])
    assert len(refused.value.problems) == 2
    assert not remove_save(tmp_path, "notes") and remove_save(tmp_path, "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes"]


def test_names_of_saves_are_told_from_others() -> None:
    for name in ("a.ckpt", "a-000012.ckpt", "a-step00000500.ckpt"):
        assert is_save_of(name, "a", ".ckpt")
    for name in ("a.safetensors", "b.ckpt", "a-12.ckpt", "aa.ckpt", "a-000012", "a-step00000500-state"):
        assert not is_save_of(name, "a", ".ckpt")
    for name in ("last", "epoch-000001", "at-step00000001"):
        assert is_save_of(name, None, "")
    assert not is_save_of("last-state", None, "")
