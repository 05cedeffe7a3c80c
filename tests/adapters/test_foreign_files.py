# SPDX-License-Identifier: Apache-2.0
"""Adapter files of PEFT and diffusers, made by them, and what other programs call layers: they mean what we read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.checkpoint_merge import Adapter, MergedWeights
from library.adapters.table_targets import text_targets
from library.errors import UserError
from networks import convert_lora, lora
from tests.adapters.known_formats import BY_NAME, architecture_of, format_of, read_adapter, to_kohya
from tests.adapters.lora_samples import Sample, changed, flat, flux, published_weights, sd3
from tests.adapters.single_layers import CONV, Held, merged, module_for
from tests.families.sdxl import tiny_clip

# ---- PEFT ---------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "lora_alpha": 3,
        "rank_pattern": {r"1\.attn\.to_q": 2},
        "alpha_pattern": {"attn.to_k": 9, r"ff\..*": 1},
    },
    "dora": {"lora_alpha": 16, "use_dora": True},
    "bias": {"lora_alpha": 16, "lora_bias": True},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "net.0.proj", "net.2"]


def peft_model(model: nn.Module, **config: Any) -> Any:
    """A model of PEFT with random adapters."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**config))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped


def peft_folder(sample: Sample, folder: Path, **config: Any) -> dict[str, Tensor]:
    """A folder that PEFT writes, with random values. Returns the published weights with the adapter in them."""
    wrapped = peft_model(sample.model, **{"r": 4, "target_modules": TARGETS, **config})
    wrapped.save_pretrained(folder)
    wrapped.merge_and_unload()
    return published_weights(sample)


def applied(tensors: dict[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: changed(tensors, f"lora_unet_{flat(path)}", weight) for path, weight in base.items()
            if f"lora_unet_{flat(path)}.lora_up.weight" in tensors}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes its own biases for damaged matrices
def test_folders_of_peft(case: str, tmp_path: Path) -> None:
    """The scale is in adapter_config.json, which lies beside the tensors; magnitudes and a bias are in the file."""
    sample = flux(double=2, single=1)
    base = {path: weight.clone() for path, weight in published_weights(sample).items()}
    bias = sample.model.state_dict()["transformer_blocks.1.ff.net.2.bias"].clone()
    # what is added to a bias has no name in parts of a layer
    targets = {"target_modules": ["net.0.proj", "net.2"]} if case == "bias" else {}
    expected = peft_folder(sample, tmp_path, **CONFIGS[case], **targets)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        tensors = read_adapter(path)
        found = applied(tensors, base)
        assert len(found) == (8 if targets else 13)
        for name, weight in found.items():
            assert torch.allclose(weight, expected[name], atol=1e-5), name
            assert not torch.allclose(weight, base[name], atol=1e-3), name
    if case == "bias":
        moved = sample.model.state_dict()["transformer_blocks.1.ff.net.2.bias"] - bias
        assert torch.allclose(tensors["lora_unet_double_blocks_1_img_mlp_2.diff_b"], moved, atol=1e-6)


def test_a_square_convolution_of_peft_with_dora(tmp_path: Path) -> None:
    """(1, out, 1, 1) there, which is what kohya's files have for the other axis."""
    unet, block = nn.Module(), nn.Module()
    unet.mid_block, block.resnets = block, nn.ModuleList([nn.Module()])
    block.resnets[0].conv1 = module_for(CONV)
    base = {key: value.detach().clone() for key, value in block.resnets[0].conv1.state_dict().items()}
    wrapped = peft_model(unet, r=2, lora_alpha=6, target_modules=["conv1"], use_dora=True)
    wrapped.save_pretrained(tmp_path)
    wrapped.merge_and_unload()
    expected = block.resnets[0].conv1.weight.detach().clone()
    tensors = read_adapter(tmp_path, among=("sd1",))
    assert tensors[f"{CONV}.dora_scale"].shape == (16, 1, 1, 1)
    assert not torch.allclose(expected, base["weight"], atol=1e-2)
    assert torch.allclose(merged(CONV, module_for(CONV), tensors)["weight"], expected, atol=1e-5)


def test_what_a_folder_of_peft_may_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    path = "base_model.model.single_transformer_blocks.0.proj_mlp"
    save_file({f"{path}.lora_A.weight": torch.ones(4, 32), f"{path}.lora_B.weight": torch.ones(128, 4)}, file)
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "fan_in_fan_out": False}
    for text, expected in (
        (json.dumps({**good, "fan_in_fan_out": True}), "fan_in_fan_out has no meaning here"),
        (json.dumps({**good, "modules_to_save": ["proj_out"]}), "modules_to_save has no meaning here"),
        (json.dumps({**good, "bias": "all"}), "bias has no meaning here"),
        (json.dumps({**good, "peft_type": "LOHA"}), "peft_type LOHA is not read, only LORA"),
        (
            json.dumps({**good, "init_lora_weights": "pissa_niter_4"}),
            "init_lora_weights pissa_niter_4 changes the base",
        ),
        (json.dumps({**good, "r": 8}), "is of another adapter: rank 8 for single_transformer_blocks.0.proj_mlp, which"),
        (json.dumps({**good, "lora_alpha": "much"}), "is not understood"),
        (json.dumps({**good, "alpha_pattern": {"(": 1}}), "is not understood"),
        (json.dumps({**good, "lora_alpha": [1]}), "is not understood"),
        ("[" * 100000, "is not understood"),
        ("[]", "is not understood (it is not an object)"),
    ):
        config.write_text(text)
        with pytest.raises(UserError) as error:
            read_adapter(tmp_path)
        assert str(config) in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)
    config.unlink()
    assert "lora_unet_single_blocks_0_linear1.alpha" not in read_adapter(tmp_path)
    assert "the scale of this adapter is unknown, it is in PEFT's adapter_config.json" in caplog.text
    with pytest.raises(UserError, match="is a folder without adapter_model"):
        (tmp_path / "empty").mkdir()
        read_adapter(tmp_path / "empty")


# ---- names --------------------------------------------------------------------------------------------------------


def plain(*layers: tuple[str, int, int], down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, Tensor]:
    """(path, rows, inputs) -> matrices of rank 1."""
    found: dict[str, Tensor] = {}
    for path, rows, inputs in layers:
        found |= {f"{path}.{down}": torch.ones(1, inputs), f"{path}.{up}": torch.ones(rows, 1)}
    return found


DEFAULTS_OF_SD3 = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def test_diffusers_file_of_sd3_with_default_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every name of it is in FLUX.1 too. The widths of the real models decide, or the block that is cut short."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict

    sample = sd3()
    assert isinstance(sample.model, SD3Transformer2DModel)
    sample.model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=[f"attn.{n}" for n in DEFAULTS_OF_SD3]))
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(sample.model))
    source, target = tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors"
    assert convert_lora.main(["--src", str(source), "--dst", str(target), "--to", "kohya"]) == 0
    names = {key.partition(".")[0] for key in load_file(target)}
    assert len(names) > 8 and all(name.startswith("lora_unet_joint_blocks_") for name in names)
    block = "transformer.transformer_blocks.0.attn"
    for width, title in ((3072, "flux"), (1536, "sd3"), (2432, "sd3")):
        assert architecture_of(plain(*((f"{block}.{name}", width, width) for name in DEFAULTS_OF_SD3))) == title
    tiny = plain(*((f"{block}.{name}", 8, 8) for name in DEFAULTS_OF_SD3))
    assert architecture_of(tiny, among=("sd3",)) == "sd3"
    save_file(tiny, source)
    target.unlink()
    words = ["--src", str(source), "--dst", str(target), "--to", "kohya"]
    assert convert_lora.main(words) == 2 and not target.exists()
    titles = "FLUX.1 or Chroma and Stable Diffusion 3 or 3.5 and FLUX.2 and HunyuanImage-2.1"
    assert f"fit {titles} alike" in capsys.readouterr().err
    base = tmp_path / "base.safetensors"
    save_file({"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(24, 8)}, base)
    assert convert_lora.main([*words, "--base_model", str(base)]) == 0
    assert all(key.startswith("lora_unet_joint_blocks_0_") for key in load_file(target))


INPUTS = {  # model -> inputs of a layer that reads the states, of the second layer of an MLP, of linear2
    "flux": (3072, 12288, 15360),
    "flux2 klein 4b": (3072, 9216, 12288),
    "flux2 klein 9b": (4096, 12288, 16384),
    "flux2 dev": (6144, 18432, 24576),
}


@pytest.mark.parametrize("start", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize("model", INPUTS)
def test_widths_tell_flux2_from_flux(model: str, start: str) -> None:
    """Their layers have the same names."""
    layers = ("double_blocks.0.txt_attn.qkv", "double_blocks.0.img_mlp.2", "single_blocks.0.linear2")
    flat = start == "lora_unet_"
    names = [start + (name.replace(".", "_") if flat else name) for name in layers]
    form = {"down": "lora_down.weight", "up": "lora_up.weight"} if flat else {}
    tensors = plain(*((name, 8, size) for name, size in zip(names, INPUTS[model])), **form)
    assert architecture_of(tensors) == model.partition(" ")[0]


SPELLINGS = {
    "SimpleTuner": ("transformer.base_model.model.single_transformer_blocks.0.proj_mlp", "flux"),
    "PEFT": ("base_model.model.single_transformer_blocks.0.proj_mlp", "flux"),
    "ai-toolkit": ("transformer.single_transformer_blocks.0.proj_mlp", "flux"),
    "LyCORIS": ("lycoris_single_transformer_blocks_0_proj_mlp", "flux"),
    "OneTrainer": ("lora_transformer_single_transformer_blocks_0_proj_mlp", "flux"),
    "OneTrainer, SDXL": ("lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k", "sdxl"),
    "LyCORIS, SDXL": ("lycoris_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k", "sdxl"),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_spellings(program: str) -> None:
    path, architecture = SPELLINGS[program]
    tensors = plain((path, 32, 8), down="lora_down.weight", up="lora_up.weight")
    assert (architecture_of(tensors), format_of(tensors)) == (architecture, "peft")
    name = {
        "flux": "lora_unet_single_blocks_0_linear1",
        "sdxl": "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k",
    }
    assert {key.partition(".")[0] for key in to_kohya(tensors)} == {name[architecture]}


def test_unknown_keys_are_named_and_the_others_are_what_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = [f"lora_unet_down_blocks_2_attentions_1_transformer_blocks_{i}_attn2_to_k" for i in range(10)]
    tensors = plain(*((name, 8, 8) for name in known), down="lora_down.weight", up="lora_up.weight")
    assert format_of({**tensors, "lora_te2_other.lora_down.weight": torch.ones(1, 8)}) == "peft"
    for more in ("lora_te2_other.lora_down.weight", "lora_unet_foo.lora_down.weight"):
        with pytest.raises(UserError) as error:
            to_kohya({**tensors, more: torch.ones(1, 8)})
        assert str(error.value) == (
            f"1 of 11 layers of the adapter are unknown: Stable Diffusion XL comes nearest but has not {more[:-17]}"
        )
    with pytest.raises(UserError, match="1 keys of the adapter file are not understood, 20 are: something"):
        to_kohya({**tensors, "something.else": torch.ones(1)})
    projection = plain(("lora_te2_text_projection", 8, 8), down="lora_down.weight", up="lora_up.weight")
    assert len(to_kohya({**tensors, **projection})) == 22
    path = tmp_path / "onetrainer.safetensors"
    save_file({**tensors, "bundle_emb.cat.clip_l": torch.ones(2, 8)}, path)
    assert len(read_adapter(path)) == 20
    assert "1 embeddings are not adapters and are not read: bundle_emb.cat.clip_l" in caplog.text
    path = "unet.down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k"
    twice = {**tensors, **plain((path, 8, 8))}
    with pytest.raises(UserError, match="1 layers are in the adapter file under two names: unet"):
        to_kohya(twice)


def test_a_text_projection_is_merged() -> None:
    """CLIP-G has it transposed, and as no layer, in files of SDXL."""
    key = "conditioner.embedders.1.model.text_projection"
    held = Held({key: torch.arange(12.0).reshape(3, 4), "model.diffusion_model.out.2.weight": torch.ones(4, 8, 3, 3)})
    layers = CheckpointLayers(BY_NAME["sdxl"], held.shapes)
    own = {"lora_down.weight": torch.arange(3.0)[None], "lora_up.weight": torch.ones(4, 1), "alpha": torch.ones(())}
    weights = MergedWeights(held, layers, [Adapter("x", {"lora_te2_text_projection": own}, lambda name: 2.0)])
    assert layers.shape("lora_te2_text_projection") == (4, 3)
    encoders = [None, tiny_clip("clip_g")]
    new = {target.name for target in text_targets(encoders)}
    [name] = [target.name for target in text_targets(encoders, outside=True) if target.name not in new]
    assert name == "lora_te2_text_projection"
    assert torch.equal(weights.tensor(key), held.tensors[key] + 2 * torch.arange(3.0)[:, None])


@pytest.mark.parametrize(
    "keys",
    [
        ("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),
        ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x.weight"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
        ("lycoris_stages_0_attn_to_q.lora_down.weight", "lycoris_stages_0_attn_to_q.lora_up.weight"),
        ("lllite_unet_x.conditioning1.0.weight",),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.lora_up.weight"),
    ],
    ids=["VAE", "checkpoint", "XLabs", "LyCORIS of another model", "LLLite", "another model"],
)
@pytest.mark.parametrize("to", ["kohya", "comfy", "peft"])
def test_what_is_no_adapter_is_not_converted(
    keys: tuple[str, ...], to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({key: torch.ones(4, 4) for key in keys}, source)
    assert convert_lora.main(["--src", str(source), "--dst", str(target), "--to", to]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(source) in line and any(key.removesuffix(".lora_down.weight") in line for key in keys)
    assert not target.exists()


def test_a_few_layers_of_sdxl_and_its_first_encoder_are_not_of_sd1() -> None:
    """Their names are in both; the encoder's widths are too, and those of the text that the U-Net reads are not."""
    unet, encoder = "unet.mid_block.attentions.0.transformer_blocks.0", "text_encoder.text_model.encoder.layers.0"
    for width, name in ((2048, "sdxl"), (768, "sd1")):
        layers = ((f"{unet}.attn2.to_k", 1280, width), (f"{encoder}.self_attn.q_proj", 768, 768))
        assert architecture_of(plain(*layers)) == name


# ---- damaged values -----------------------------------------------------------------------------------------------

DAMAGED: dict[str, tuple[dict[str, Tensor], str]] = {
    "vector as alpha": ({"alpha": torch.ones(4)}, "alpha has the shape (4,), one number is needed"),
    "no alpha": ({"alpha": torch.ones(0)}, "alpha has the shape (0,), one number is needed"),
    "nan as alpha": ({"alpha": torch.tensor(float("nan"))}, "alpha is nan"),
    "complex alpha": ({"alpha": torch.tensor(1j)}, "alpha is complex64"),
    "rank 0": ({"lora_down.weight": torch.ones(0, 16), "lora_up.weight": torch.ones(16, 0)}, "is empty, of the shape"),
    "two ranks": ({"lora_down.weight": torch.ones(3, 16)}, "has a down matrix of (3, 16) and an up matrix of (16, 4)"),
    "a vector": ({"lora_down.weight": torch.ones(16)}, "has a down matrix of (16,) and"),
    "a number": ({"lora_up.weight": torch.ones(())}, "and an up matrix of ()"),
    "inf": ({"lora_up.weight": torch.full((16, 4), float("inf"))}, "lora_up.weight is not finite"),
    "integers": ({"lora_up.weight": torch.ones(16, 4, dtype=torch.int8)}, "lora_up.weight is int8"),
    "Tucker": ({"lora_mid.weight": torch.ones(3, 3, 1, 1)}, "has a middle matrix of (3, 3, 1, 1) for rank 4"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_values_end_in_one_line(case: str, tmp_path: Path) -> None:
    """Wherever a file comes from: read by a tool, --network_weights, --dim_from_weights and --base_weights."""
    values, expected = DAMAGED[case]
    unet = nn.Module()
    block = unet.mid_block = nn.Module()
    block.conv1 = nn.Linear(16, 16)
    name = "lora_unet_mid_block_conv1"
    good = {"alpha": torch.ones(()), "lora_down.weight": torch.ones(4, 16), "lora_up.weight": torch.ones(16, 4)}
    tensors = {f"{name}.{suffix}": value for suffix, value in {**good, **values}.items()}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    network, _ = lora.create_network_from_weights(
        1.0, None, None, None, unet, {f"{name}.{suffix}": value for suffix, value in good.items()}
    )
    for read in (
        lambda: read_adapter(path),
        lambda: network.load(tensors),
        lambda: lora.create_network_from_weights(1.0, path, None, None, unet),
        lambda: lora.create_network_from_weights(1.0, path, None, None, unet, for_inference=True),
    ):
        with pytest.raises(UserError) as error:
            read()
        assert "is damaged: " in str(error.value) and expected in str(error.value) and "\n" not in str(error.value)
    path_in_diffusers = "unet.mid_block.resnets.0.conv1"  # the same in another format, where names become others first
    with pytest.raises(UserError, match="is damaged"):
        to_kohya({key.replace(name, path_in_diffusers): value for key, value in tensors.items()})
