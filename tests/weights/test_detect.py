# SPDX-License-Identifier: Apache-2.0
"""Files of other architectures and parts of models are named as what they are."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.families.detect import architectures, foreign_file, foreign_pipeline
from library.families.registry import scripts
from tests.tiny import tiny_modules

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data_files" / "weights"
SCRIPTS = {
    "sdxl": "an SDXL checkpoint: use sdxl_train_network.py",
    "sd3": "an SD3 checkpoint: use sd3_train_network.py",
    "sd3_5": "an SD3 checkpoint: use sd3_train_network.py",
    "flux": "a FLUX.1 checkpoint: use flux_train_network.py",
    "chroma": "a Chroma checkpoint: use flux_train_network.py --model_type chroma",
    "lumina": "a Lumina-Image-2.0 checkpoint: use lumina_train_network.py",
    "hunyuan_image": "a HunyuanImage-2.1 checkpoint: use hunyuan_image_train_network.py",
    "anima": "an Anima checkpoint: use anima_train_network.py",
}


def published_names():
    with gzip.open(DATA / "architectures.json.gz") as file:
        return json.load(file)


@pytest.mark.parametrize("name", SCRIPTS)
def test_real_files_of_other_architectures(name):
    assert foreign_file(dict.fromkeys(published_names()[name], ())) == SCRIPTS[name]


def test_the_scripts_that_are_named_exist():
    named = {word for kind in architectures() for word in kind.answer.split() if word.endswith(".py")}
    assert named and all((ROOT / script).is_file() for script in named)
    assert all((ROOT / script).is_file() for script in scripts())


@pytest.mark.parametrize("name", ["flux", "chroma", "lumina", "hunyuan_image"])
def test_the_same_inside_an_all_in_one_file(name):
    assert foreign_file({f"model.diffusion_model.{n}": () for n in published_names()[name]}) == SCRIPTS[name]


def diffusers_models():
    import diffusers as d

    return {
        "sd3": lambda: d.SD3Transformer2DModel(num_layers=1, qk_norm="rms_norm"),
        "flux": lambda: d.FluxTransformer2DModel(num_layers=1, num_single_layers=1),
        "flux2": lambda: d.Flux2Transformer2DModel(num_layers=1, num_single_layers=1),
        "lumina": lambda: d.Lumina2Transformer2DModel(num_layers=1),
        "hunyuan_image": lambda: d.HunyuanImageTransformer2DModel(
            num_layers=1, num_single_layers=1, text_embed_2_dim=16
        ),
        "anima": lambda: d.CosmosTransformer3DModel(num_layers=1, num_attention_heads=2),
        "sana": lambda: d.SanaTransformer2DModel(num_layers=1),
        "sdxl": lambda: d.UNet2DConditionModel(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
        ),
    }


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "lumina", "hunyuan_image", "anima", "sana", "sdxl"])
def test_diffusers_files_of_other_architectures(name):
    with torch.device("meta"):
        names = diffusers_models()[name]().state_dict()
    answer = next(kind.answer for kind in architectures() if kind.name == name)
    assert foreign_file(dict.fromkeys(names, ())) == answer


@pytest.mark.parametrize(
    "names, answer",
    [
        (["lora_unet_x.lora_down.weight"], "a LoRA or other adapter, not a checkpoint"),
        (["unet.x.lora_A.weight"], "a LoRA or other adapter, not a checkpoint"),
        (["lora_unet_x.hada_w1_a"], "a LoRA or other adapter, not a checkpoint"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet, not a checkpoint"),
        (["emb_params"], "a textual inversion embedding"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
        (["something.else"], "no Stable Diffusion checkpoint"),
        ([], "no Stable Diffusion checkpoint"),
    ],
)
def test_other_files(names, answer):
    assert foreign_file(dict.fromkeys(names, ())).startswith(answer)


def test_parts_alone_and_whole_models():
    unet, vae, _ = tiny_modules()
    assert foreign_file(dict.fromkeys(unet.state_dict(), ())).startswith("a U-Net in diffusers names")
    assert foreign_file(dict.fromkeys(vae.state_dict(), ())) == "a VAE, not a checkpoint: it belongs to --vae"
    assert foreign_file({"model.diffusion_model.input_blocks.0.0.weight": ()}) is None


@pytest.mark.parametrize("kind", architectures(), ids=lambda kind: kind.name)
def test_pipelines(kind):
    other = "sdxl" if kind.name == "sd" else "sd"
    for start in kind.pipelines:
        assert foreign_pipeline(f"{start}Pipeline", other) == kind.answer
    assert foreign_pipeline("StableDiffusionPipeline") is None
    assert foreign_pipeline("UnheardOfPipeline") is None
