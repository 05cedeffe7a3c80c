# SPDX-License-Identifier: Apache-2.0
"""LyCORIS itself with its own presets on every architecture: it reaches the blocks, its files are read and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.families.adapters import load_network_module
from networks import lora, merge_lora
from tests.adapters.families import TINY
from tests.adapters.lora_tool_models import MODELS, Model, Part, frozen, run_clip
from tests.adapters.models import distance, randomize, run_unet, tiny_clip, tiny_unet
from tests.families.lumina import tiny_modules as lumina_modules
from tests.families.sd3 import tiny_clip as sd3_clip
from tests.families.sd3 import tiny_t5
from tests.families.sdxl import POOLED
from tests.families.sdxl import tiny_modules as xl_modules

pytest.importorskip("lycoris.kohya")
BLOCKS = {  # what the published names of blocks begin with
    "sd": ("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_"),
    "sdxl": ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"),
    "flux": ("lora_unet_double_blocks_", "lora_unet_single_blocks_"),
    "chroma": ("lora_unet_double_blocks_", "lora_unet_single_blocks_"),
    "sd3": ("lora_unet_joint_blocks_",),
    "lumina": ("lora_unet_layers_", "lora_unet_noise_refiner_", "lora_unet_context_refiner_"),
    "sana": ("lora_unet_transformer_blocks_",),
}
CASES = [(name, "lora") for name in BLOCKS] + [("sd", "loha"), ("flux", "loha"), ("flux", "lokr")]


def model_of(name: str) -> Model:
    """A tiny model; the U-Nets are smaller than those of the tools' tests, and have no file."""
    if name == "sd":
        unet, encoder = tiny_unet(), tiny_clip()
        parts = (Part(unet, (), ""), Part(encoder, (), ""))
        return Model(parts, lora, lambda modules: [run_unet(modules[0]), run_clip(modules[1])], {})
    if name == "sdxl":
        modules = xl_modules()
        parts = tuple(Part(frozen(modules[part]), (), "") for part in ("unet", "clip_l", "clip_g"))
        added = {"text_embeds": torch.ones(1, POOLED), "time_ids": torch.tensor([[64.0, 96, 0, 3, 64, 64]])}
        x_t, context = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 560).reshape(1, 7, 80)
        noise = lambda unet: unet(x_t, torch.tensor([300]), context, added_cond_kwargs=added).sample
        return Model(parts, lora, lambda given: [noise(given[0]), *(run_clip(encoder) for encoder in given[1:])], {})
    return MODELS[name]()


def build(encoders: list[Any], denoiser: nn.Module, **arguments: Any) -> Any:
    torch.manual_seed(2)
    module = load_network_module("lycoris.kohya")
    return module.create_network(1.0, 4, 2.0, None, encoders, denoiser, None, **arguments)


def attached(encoders: list[Any], denoiser: nn.Module, **arguments: Any) -> Any:
    network = build(encoders, denoiser, **arguments)
    network.attach(train_denoiser=True, train_text_encoder=bool(encoders))
    return network


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert max(distance(a, b) for a, b in zip(one, other, strict=True)) < 1e-5


@pytest.mark.parametrize(("name", "algo"), CASES)
def test_default_preset(name: str, algo: str, tmp_path: Path) -> None:
    """What it trained is what our network, our merge tool and its own merge make of the file."""
    model = model_of(name)
    plain = model.outputs()
    network = attached(model.modules[1:], model.modules[0], algo=algo)
    assert_same(model.outputs(), plain)
    randomize(network, size=0.05)
    trained = model.outputs()
    assert min(distance(a, b) for a, b in zip(trained, plain, strict=True)) > 1e-3
    path, state = tmp_path / "file.safetensors", network.state(None)
    network.save(path, dtype=torch.float32, metadata=None)
    network.detach()
    assert_same(model.outputs(), plain)

    found = {key.partition(".")[0] for key in state}
    ours = model.network.create_network(1.0, 4, 2.0, None, [*model.modules[1:]] or None, model.modules[0])
    assert set(ours.targets()) <= found  # the layers that sd-scripts' own LoRA has, in its names
    assert all(any(layer.startswith(start) for layer in found) for start in BLOCKS[name])

    reader = model.network if algo == "lora" else load_network_module(f"networks.{algo}").module
    assert_same(model.applied(path, 1.0, reader), trained)
    if model.parts[0].rules:
        base, merged = model.write(tmp_path / "model.safetensors"), str(tmp_path / "merged.safetensors")
        arguments = ["--sd_model", str(base), "--models", str(path), "--ratios", "1", "--save_to", merged]
        assert merge_lora.main([*arguments, "--precision", "float", "--save_precision", "float"]) == 0
        assert_same(model.outputs(model.read(Path(merged))), trained)

    again, weights = load_network_module("lycoris.kohya").create_network_from_weights(
        1.0, path, None, model.modules[1:], model.modules[0], for_inference=algo != "lora"
    )
    again.load(weights)
    again.merge_into()
    assert_same(model.outputs(), trained)


def test_an_alpha_that_is_no_number_in_fp16() -> None:
    """As --full_fp16 casts the network, and as it is written."""
    network = build([], TINY["flux"].make(), algo="lokr", full_matrix="True")
    network.attach(train_denoiser=True, train_text_encoder=False)
    for layer in network.network.loras:
        layer.alpha.fill_(100_000)
    state = network.to(torch.float16).state(torch.float16)
    assert {float(value) for key, value in state.items() if key.endswith(".alpha")} == {100_000}


@pytest.mark.parametrize("preset", ["attn-mlp", "attn-only"])
@pytest.mark.parametrize("family", [*TINY, "sd"])
def test_smaller_presets(family: str, preset: str) -> None:
    """They reach every list of blocks; attn-only none where a block is one layer (the single blocks of FLUX.1)."""
    denoiser = tiny_unet() if family == "sd" else TINY[family].make()
    layers = attached([], denoiser, preset=preset).layers_reached()[None]
    if (family, preset) == ("hunyuan_image", "attn-only"):  # sd-scripts has no class for its attention
        assert not any(layer.changed for layer in layers)
        return
    changed = {id(module) for layer in layers if layer.changed for module in layer.modules}
    assert 0 < sum(layer.changed for layer in layers) < len(layers)
    main = dict(denoiser.named_children()).get("transformer", denoiser)  # without Anima's text conditioner
    lists = {name: part for name, part in main.named_children() if isinstance(part, nn.ModuleList)}
    lists.pop("single_transformer_blocks", None)
    assert lists and all(any(id(m) in changed for m in part.modules()) for part in lists.values())


def test_text_encoders_have_the_numbers_of_their_names() -> None:
    """Also where the first one does not learn, and for T5, which is the third one."""
    clips, t5 = [sd3_clip("clip_l"), sd3_clip("clip_g")], tiny_t5()
    sd3, gemma = TINY["sd3"].make(), next(m for m in lumina_modules() if type(m).__name__ == "Gemma2Model")
    cases = [([clips[0], None], TINY["flux"].make(), {"te1"}), ([None, clips[1], None], sd3, {"te2"}),
             ([None, None, t5], sd3, {"te3"}), ([*clips, t5], sd3, {"te1", "te2", "te3"}),
             ([gemma], TINY["lumina"].make(), {"te"}), ([tiny_clip()], tiny_unet(), {"te"})]  # fmt: skip
    for encoders, denoiser, expected in cases:
        network = build(encoders, denoiser, preset="attn-mlp")
        network.attach(train_denoiser=False, train_text_encoder=True)
        assert {key.split("_")[1] for key in network.state(None)} == expected
