# SPDX-License-Identifier: Apache-2.0
"""networks.lora on Stable Diffusion XL: names, ranks by block, files of other programs, and diffusers reads ours."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.adapters.adapter_network import AdapterNetwork
from library.adapters.formats.conversion import alphas_in
from library.adapters.layer_network import LayerNetwork
from library.adapters.targets import AdaptedModels
from library.errors import UserError
from library.families.adapters import unets
from library.families.sdxl.targets import SDXL_BLOCKS, TARGETS
from library.weights.loading import shipped_config
from networks.lora import create_network, create_network_from_weights
from tests.adapters.known_formats import BY_NAME, architecture_of, convert, format_of, header, to_kohya
from tests.adapters.models import DATA, distance, randomize, tiny_clip, tiny_unet
from tests.families.sdxl import POOLED, WIDTHS, published_layers, tiny_modules

FACTS: dict[str, Any] = json.loads(gzip.decompress((DATA / "sdxl.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def real() -> tuple[list[nn.Module], nn.Module]:
    """Text encoders and U-Net at full size, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    clip_l, clip_g = (CLIPTextConfig.from_dict(shipped_config(name)) for name in ("clip_l", "clip_g"))
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(shipped_config("sdxl")["unet"])
        return [CLIPTextModel(clip_l), CLIPTextModelWithProjection(clip_g)], unet


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return {name: module.requires_grad_(False) for name, module in tiny_modules().items()}


def encoders(models: dict[str, Any]) -> list[nn.Module | None]:
    return [models["clip_l"], models["clip_g"]]


def trained(models: dict[str, Any], **arguments: Any) -> AdapterNetwork:
    torch.manual_seed(5)
    network = create_network(1.0, 4, 2.0, None, encoders(models), models["unet"], **arguments)
    randomize(network, size=0.1)
    return network


def answer(models: dict[str, Any]) -> list[Tensor]:
    """What U-Net and text encoders say to one input."""
    generator = torch.Generator().manual_seed(1)
    x_t, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 80, generator=generator)
    added = {"text_embeds": torch.ones(1, POOLED), "time_ids": torch.tensor([[64.0, 96, 0, 3, 64, 64]])}
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        found = [models["unet"](x_t, torch.tensor([300]), context, added_cond_kwargs=added).sample]
        outputs = [models[name](ids, output_hidden_states=True) for name in WIDTHS]
    return [*found, *(output.hidden_states[-2] for output in outputs), outputs[1].text_embeds]


def assert_same_answer(one: list[Tensor], other: list[Tensor], limit: float = 1e-5) -> None:
    assert max(distance(a, b) for a, b in zip(one, other, strict=True)) < limit


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- names, ranks, rates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "arguments"), [("sdxl", {}), ("sdxl_conv2", {"conv_dim": "2"})])
def test_saved_keys_shapes_and_order(real: Any, variant: str, arguments: dict[str, Any]) -> None:
    state = create_network(1.0, 4, 1.0, None, *real, **arguments).state(None)
    assert [(key, list(value.shape)) for key, value in state.items()] == [*FACTS["keys"][variant].items()]
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("case", FACTS["network_args"])
def test_ranks_alphas_and_rates(real: Any, case: str) -> None:
    """As sd-scripts 0.10.1 makes them, but each text encoder has groups of its own: its rate may be another."""
    golden = FACTS["network_args"][case]
    network = create_network(1.0, 4, 1.0, None, *real, **golden["network_args"])
    assert isinstance(network, LayerNetwork)
    found: list[Any] = [(name, [layer.rank, layer.alpha]) for name, layer in network.named_layers().items()]
    assert found == [*golden["modules_rank_alpha"].items()]
    for rates in golden["lr_groups"].values():
        groups = network.param_groups(
            learning_rate=rates["learning_rate"], unet_lr=rates["unet_lr"], text_encoder_lr=rates["text_encoder_lr"]
        )
        joined: dict[str, dict[str, Any]] = {}
        for group in groups:
            name = group["name"].replace("textencoder 1", "textencoder").replace("textencoder 2", "textencoder")
            own = joined.setdefault(name, {"lr": group["lr"], "n_tensors": 0, "n_params": 0})
            assert own["lr"] == group["lr"]
            own["n_tensors"] += len(group["params"])
            own["n_params"] += sum(p.numel() for p in group["params"])
        assert [*joined] == rates["descriptions"] and [*joined.values()] == rates["groups"]


def test_rates_of_blocks_and_encoders(tiny: dict[str, Any]) -> None:
    network = trained(
        tiny, conv_dim="2", down_lr_weight=",".join(str(i) for i in range(9)), mid_lr_weight="1,0.5,2",
        up_lr_weight="zeros+0.25", loraplus_text_encoder_lr_ratio="2",
    )  # fmt: skip
    groups = {group["name"]: group for group in network.param_groups(learning_rate=1.0, text_encoder_lr=[0.25, 0.5])}
    rates = {name: group["lr"] for name, group in groups.items()}
    assert [rates[f"textencoder {name}"] for name in ("1", "1 plus", "2", "2 plus")] == [0.25, 0.5, 0.5, 1.0]
    assert {name: rate for name, rate in rates.items() if name.startswith("unet")} == {
        **{f"unet_block{i + 1}": float(i) for i in range(1, 9)},
        "unet_block10": 1.0, "unet_block11": 0.5, "unet_block12": 2.0,
        **{f"unet_block{i}": 0.25 for i in range(13, 22)},
    }  # fmt: skip
    layers = network.targets()
    assert layers["lora_unet_input_blocks_3_0_op"].block == 4 and layers["lora_unet_middle_block_1_proj_in"].block == 11
    assert layers["lora_unet_output_blocks_5_2_conv"].block == 18
    assert unets().of(AdaptedModels(None, tiny["unet"])) is TARGETS
    assert TARGETS.layout is SDXL_BLOCKS and SDXL_BLOCKS.total == 23


def test_wrong_number_of_blocks(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="block_dims needs 23 values, got 25"):
        trained(tiny, block_dims=",".join(["1"] * 25))


@pytest.mark.parametrize("number", [1, 2])
def test_one_encoder_without_adapters(tiny: dict[str, Any], number: int) -> None:
    chosen = [module if place == number else None for place, module in enumerate(encoders(tiny), start=1)]
    for unet in (tiny["unet"], None):
        layers = create_network(1.0, 4, 1.0, None, chosen, unet).targets()
        starts = {name.split("_text_model")[0] for name in layers if "_te" in name}
        assert starts == {f"lora_te{number}"}
        assert {layers[name].encoder for name in layers if "_te" in name} == {number - 1}


def test_every_layer_has_its_published_name(real: Any, tiny: dict[str, Any]) -> None:
    """Written down for the real blocks in tests/families/sdxl.py; the format table has the same ones."""
    clips, unet = real
    names = {target.name for target in TARGETS.every(AdaptedModels(None, unet), outside=True)}
    layers = {path: name for path, name in published_layers(unet).items() if is_layer(unet.get_submodule(path))}
    assert {f"lora_unet_{name}".replace(".", "_") for name in layers.values()} <= names
    assert len(names) - len(layers) == 7  # conv_in, embeddings, the last layers
    table = {layer.parts[0]: (layer.comfy, layer.kohya) for layer in BY_NAME["sdxl"].layers(32)}
    for path, name in layers.items():
        assert table[f"unet.{path}"] == (f"diffusion_model.{name}", f"lora_unet_{name}".replace(".", "_"))
    for part, encoder in zip(("text_encoder", "text_encoder_2"), clips):
        in_encoder = {path: module for path, module in encoder.named_modules() if "layers." in path}
        for path in (path for path, module in in_encoder.items() if is_layer(module)):
            level = "" if path.startswith("text_model.") else "text_model."
            assert f"{part}.{level}{path}" in table
    assert {"lora_te2_text_projection", "lora_unet_label_emb_0_0"} <= {
        target.name for target in TARGETS.every(AdaptedModels(encoders(tiny), tiny["unet"]), outside=True)
    }


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2.0, 2.7])
def test_no_format_loses_a_bit(tiny: dict[str, Any], alpha: float) -> None:
    tensors = trained(tiny, conv_dim="2", conv_alpha="1").state(torch.float16)
    tensors = {key: torch.tensor(alpha, dtype=value.dtype) if key.endswith("alpha") else value
               for key, value in tensors.items()}  # fmt: skip
    comfy = convert(tensors, "comfy")
    peft = convert(comfy, "peft")
    assert [architecture_of(t) for t in (tensors, comfy, peft)] == ["sdxl"] * 3
    assert [format_of(t) for t in (tensors, comfy, peft)] == ["kohya", "comfy", "peft"]
    assert "unet.down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight" in peft
    assert "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in peft
    assert "diffusion_model.input_blocks.7.1.transformer_blocks.1.attn1.to_q.lora_A.weight" in comfy
    assert_same(convert(peft, "kohya", alphas=alphas_in(header(comfy, "peft"))), tensors)


def diffusers_names(models: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's layers by their path in diffusers, as some trainers write kohya files."""
    flat = {f"lora_unet_{name}".replace(".", "_"): f"lora_unet_{path}".replace(".", "_")
            for path, name in published_layers(models["unet"]).items()}  # fmt: skip
    found = {}
    for key, value in tensors.items():
        name, _, suffix = key.partition(".")
        found[f"{flat.get(name, name)}.{suffix}"] = value
    return found


@pytest.mark.parametrize("form", ["kohya", "comfy", "peft", "flat names of diffusers"])
def test_files_of_other_programs_load(tiny: dict[str, Any], form: str) -> None:
    network = trained(tiny, conv_dim="2", conv_alpha="1")
    state = network.state(None)
    written = diffusers_names(tiny, state) if form.startswith("flat") else convert(state, form)
    assert form == "kohya" or not written.keys() >= {key for key in state if "lora_unet" in key}
    keys = [*written]
    random.Random(0).shuffle(keys)
    shuffled = {key: written[key] for key in keys}
    assert to_kohya(shuffled).keys() - state.keys() == set()
    made, tensors = create_network_from_weights(1.0, None, None, encoders(tiny), tiny["unet"], weights_sd=shuffled)
    made.load(tensors)
    again = made.state(None)
    assert [*again] == [*state] if form not in ("peft",) else again.keys() == state.keys()
    plain = answer(tiny)
    results = []
    for one in (network, made):
        one.attach(train_denoiser=True, train_text_encoder=True)
        results.append(answer(tiny))
        one.detach()
    assert_same_answer(results[0], results[1])
    assert distance(results[0][0], plain[0]) > 0.01


def test_flat_names_of_stable_diffusion_1_stay() -> None:
    network = create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet())
    assert_same(to_kohya(network.state(None)), network.state(None))


def test_a_file_of_another_model(tiny: dict[str, Any]) -> None:
    state = create_network(1.0, 4, 1.0, None, None, tiny_unet()).state(None)
    with pytest.raises(UserError, match="name no layer of this model"):
        create_network_from_weights(1.0, "x", None, encoders(tiny), tiny["unet"], weights_sd=state)


# ---- diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_diffusers_loads_every_key(
    tiny: dict[str, Any], form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("peft")
    from diffusers import StableDiffusionXLPipeline

    network = trained(tiny, conv_dim="2", conv_alpha="1")
    network.save(tmp_path / "lora.safetensors", dtype=None, metadata=None)
    theirs = {name: copy.deepcopy(module) for name, module in tiny.items()}
    pipe: Any = StableDiffusionXLPipeline(
        vae=theirs["vae"], text_encoder=theirs["clip_l"], text_encoder_2=theirs["clip_g"], tokenizer=None,
        tokenizer_2=None, unet=theirs["unet"], scheduler=None, add_watermarker=False,
    )  # fmt: skip
    logging.getLogger("diffusers").propagate = True
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(
            str(tmp_path / "lora.safetensors") if form == "kohya" else convert(network.state(None), "peft")
        )
    assert [r.getMessage() for r in caplog.records if "key" in r.getMessage().lower()] == []
    parts = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    count = sum(name.endswith("lora_A.default_0") for part in parts for name, _ in part.named_modules())
    assert count == len(network.targets())
    own = {name: copy.deepcopy(module) for name, module in tiny.items()}
    merged, _ = create_network_from_weights(1.0, None, None, encoders(own), own["unet"], weights_sd=network.state(None))
    merged.merge_into()
    assert_same_answer(answer({"unet": parts[0], "clip_l": parts[1], "clip_g": parts[2]}), answer(own))
    assert distance(answer(own)[0], answer(tiny)[0]) > 0.01
