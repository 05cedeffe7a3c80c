# SPDX-License-Identifier: Apache-2.0
"""Wrong, damaged and missing models: one line each, before anything is loaded."""

import gzip
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from tests.tiny import make_tiny_sd, write_tokenizer

DATA = Path(__file__).parents[1] / "data_files" / "weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_sd(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return make_tiny_sd(tmp_path_factory.mktemp("single"), layout="single")


def family(path, **options):
    return StableDiffusion(SDOptions(pretrained_model_name_or_path=str(path), **options))


def line(action):
    with pytest.raises(UserError) as caught:
        action()
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def changed(single, tmp_path, change):
    """A copy of the single file after `change(tensors)`, and its path."""
    tensors = load_file(single)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    if not (tmp_path / "tokenizer").exists():
        shutil.copytree(single.parent / "tokenizer", tmp_path / "tokenizer")
    return path


def test_missing_paths(single, folder):
    assert line(family(single.with_name("modell.safetensors")).check).endswith(f"Did you mean {single}?")
    assert "--pretrained_model_name_or_path: /nowhere/at/all.safetensors does not exist" in line(
        family("/nowhere/at/all.safetensors").check
    )
    assert line(family(folder, vae="/nowhere/vae.pt").check).startswith("--vae: /nowhere/vae.pt does not exist")


def test_a_hub_id_without_network_is_one_line():
    problem = line(family("nobody/no-such-model").check)
    assert problem.startswith("--pretrained_model_name_or_path: nobody/no-such-model does not exist here")


def test_a_hub_id_in_the_hubs_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--some--model"
    revision = "0123456789012345678901234567890123456789"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sd = family("some/model")
    sd.check()
    assert sd.parts.path == repository / "snapshots" / revision
    assert sd.model_names() == {"sd_model": "some/model"}


def test_other_architectures_are_named(tmp_path):
    with gzip.open(DATA / "architectures.json.gz") as file:
        names = json.load(file)
    for name, words in (("sdxl", "an SDXL checkpoint: use sdxl_train_network.py"), ("flux", "flux_train_network.py")):
        path = tmp_path / f"{name}.safetensors"
        save_file({n: torch.zeros(1) for n in names[name]}, path)
        assert line(family(path).check).startswith(f"{path} is ") and words in line(family(path).check)


def test_a_folder_of_another_architecture(folder, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    assert line(family(path).check) == f"{path} is an SDXL checkpoint: use sdxl_train_network.py"
    (path / "model_index.json").write_text("{")
    assert "not readable as JSON" in line(family(path).check)


def test_folders_that_lack_something(folder, tmp_path):
    assert "unet and text_encoder missing" in line(family(tmp_path).check)
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert line(family(path).check).startswith(f"{path / 'vae'} has no weights")
    (path / "vae" / "config.json").unlink()
    (path / "unet" / "config.json").unlink()
    assert line(family(path).check) == f"{path / 'unet' / 'config.json'} does not exist"


@pytest.mark.parametrize("kind", ["lora", "vae", "unet"])
def test_files_that_are_no_checkpoint(single, folder, tmp_path, kind):
    path = tmp_path / "m.safetensors"
    tensors = {
        "lora": {"lora_unet_a.lora_down.weight": torch.zeros(1), "lora_unet_a.alpha": torch.zeros(1)},
        "vae": {n: t for n, t in load_file(single).items() if n.startswith("first_stage_model.")},
        "unet": load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    }[kind]
    save_file(tensors, path)
    words = {"lora": "--network_weights", "vae": "belongs to --vae", "unet": "give the folder"}[kind]
    assert words in line(family(path).check)


def test_the_wrong_version(single, tmp_path):
    assert line(family(single, v2=True).check) == f"{single} is a Stable Diffusion 1.x model: leave out --v2"
    two = make_tiny_sd(tmp_path, version=2, layout="single")
    assert f"{two} is a Stable Diffusion 2.x model: add --v2" in line(family(two).check)


@pytest.mark.parametrize("width, v2, words", [(1024, False, "add --v2"), (768, True, "leave out --v2")])
def test_the_wrong_version_of_a_folder(folder, tmp_path, width, v2, words):
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    config = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": width}))
    assert words in line(family(path, v2=v2).check)


def test_incomplete_files(single, tmp_path):
    def without(*starts):
        def change(tensors):
            for name in [n for n in tensors if n.startswith(starts)]:
                del tensors[name]

        return changed(single, tmp_path, change)

    assert "no VAE inside; give one with --vae" in line(family(without("first_stage_model.")).check)
    assert "no text encoder inside" in line(family(without("cond_stage_model.")).check)
    missing = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert "encoder.layers.0.mlp.fc1.weight" in line(family(without(missing)).check)
    sd = family(without("model.diffusion_model.middle_block.1.norm"))
    sd.check()
    problem = line(lambda: sd.load_denoiser(None, "cpu"))
    assert "2 weights of the U-Net are missing" in problem and "middle_block.1.norm.bias" in problem


def test_inpainting_models(single, folder, tmp_path):
    def widen(tensors):
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)

    assert "inpainting model (9 input channels" in line(family(changed(single, tmp_path, widen)).check)


def test_truncated_checkpoint(single, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(single.read_bytes()[:-1000])
    assert "cut short" in line(family(path).check)


def test_clip_skip_beyond_the_encoder(single):
    assert line(family(single, clip_skip=4).check) == "--clip_skip 4: the text encoder has 3 layers"
    family(single, clip_skip=3).check()


def test_a_tokenizer_of_another_model(single, tmp_path):
    def shrink(tensors):
        name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        tensors[name] = tensors[name][:-5].contiguous()

    path = changed(single, tmp_path, shrink)
    assert "it belongs to another model" in line(family(path).check)


def test_no_tokenizer(single, tmp_path):
    path = tmp_path / "m.safetensors"
    shutil.copy(single, path)
    cache = tmp_path / "cache"
    assert line(family(path, tokenizer_cache_dir=str(cache)).check).endswith(
        f"into {cache / 'openai_clip-vit-large-patch14'}"
    )
    write_tokenizer(cache / "openai_clip-vit-large-patch14")
    family(path, tokenizer_cache_dir=str(cache)).check()


def test_a_v_model_without_the_option_is_a_warning(tmp_path, caplog):
    path = make_tiny_sd(tmp_path, v_prediction=True)
    with caplog.at_level(logging.WARNING, logger="trainyard"):
        family(path).check()
    assert [r.message for r in caplog.records if r.name == "trainyard"] == [
        f"{path} is configured for v_prediction, and this run is without --v_parameterization"
    ]
    caplog.clear()
    family(path, v_parameterization=True).check()
    assert not caplog.records


@pytest.mark.parametrize("v_parameterization", [False, True])
def test_a_single_file_does_not_say_what_its_model_predicts(single, v_parameterization, caplog):
    with caplog.at_level(logging.WARNING, logger="trainyard"):
        family(single, v_parameterization=v_parameterization).check()
    assert not [r.message for r in caplog.records if r.name == "trainyard"]


def test_unknown_noise_schedule(folder, tmp_path):
    from library.objectives.options import DDPMOptions, LossOptions

    path = tmp_path / "m"
    shutil.copytree(folder, path)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "cosine"}))
    assert "'cosine'" in line(lambda: family(path).objective(DDPMOptions(), LossOptions()))


def test_a_tokenizer_of_the_hub_is_kept(single, tmp_path, monkeypatch):
    """Fetched from the hub (here: its local cache) once, then found in --tokenizer_cache_dir without it."""
    from huggingface_hub import constants

    hub, cache, path = tmp_path / "hub", tmp_path / "cache", tmp_path / "m.safetensors"
    shutil.copy(single, path)
    revision = "0123456789012345678901234567890123456789"
    repository = hub / "models--openai--clip-vit-large-patch14"
    write_tokenizer(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    first = family(path, tokenizer_cache_dir=str(cache))
    first.check()
    shutil.rmtree(hub)
    second = family(path, tokenizer_cache_dir=str(cache))
    second.check()
    assert second.tokenizers["clip"].folder == cache / "openai_clip-vit-large-patch14"
    assert second.tokenizers["clip"].fingerprint() == first.tokenizers["clip"].fingerprint()
