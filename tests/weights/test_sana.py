# SPDX-License-Identifier: Apache-2.0
"""SANA: every way to load, what text and pictures become, the model's time, what is saved, and what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_autoencoder_dc_checkpoint_to_diffusers,
    convert_sana_transformer_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.adapters.formats.conversion import convert
from library.adapters.surgery.tool_files import open_checkpoint
from library.errors import UserError
from library.families.adapters import adapter_tables, known_architectures
from library.families.registry import FAMILIES
from library.families.sana.model import ENCODER, MASK, Sana
from library.families.sana.options import SanaFlowOptions, SanaOptions
from library.families.sana.parts import build, layout, sana_rules
from library.families.sana.targets import TARGETS
from library.io.checkpoint import CheckpointForm
from library.key_tables import publish, read
from library.memory.quantise import QuantLinear
from library.objectives.base import Predict
from library.objectives.options import LossOptions
from library.rng import torch_generator
from library.types import Batch, Cond
from library.weights import dc_ae
from library.weights.loading import build_empty, shipped_config
from networks import lora_sana
from tests.adapters.models import randomize
from tests.families.lumina import make as make_lumina
from tests.families.sana import SHORT, TEXT_WIDTH, loss, make, tiny_modules

LAYOUTS = ("diffusers", "transformer", "files", "plain")
CAPTIONS = ["A photo of a Cat ", "red dog", ""]
# the published models: hub name -> (configuration, parameters of the denoiser, targets of a LoRA)
BIG = {"num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
       "cross_attention_dim": 2240}  # fmt: skip
SMALL = {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
         "cross_attention_dim": 1152}  # fmt: skip
NORMED = {"qk_norm": "rms_norm_across_heads"}
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Sana_1600M_1024px": ({**BIG, "num_layers": 20}, 1_604_462_752, 120),
    "Sana_600M_512px": (SMALL, 591_747_872, 168),
    "SANA1.5_4.8B_1024px": ({**BIG, **NORMED, "num_layers": 60}, 4_721_825_952, 360),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Layout -> options that name the model; SANA-1.5, but for "diffusers"."""
    root = tmp_path_factory.mktemp("sana")
    return {name: make(root / name, layout=name, normed=name != "diffusers") for name in LAYOUTS}


def family(options: dict[str, Any], **more: Any) -> Sana:
    return Sana(SanaOptions(**{name: str(value) for name, value in options.items()}, **more))


def load_all(sana: Sana, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        sana.load_denoiser(dtype, "cpu"),
        sana.load_text_encoder(ENCODER, dtype, "cpu"),
        sana.load_vae(dtype, "cpu"),
    )


def encode(sana: Sana, captions: list[str]) -> Cond:
    with torch.no_grad():
        return sana.encode_text(sana.tokenize(captions), {ENCODER: sana.load_text_encoder(ENCODER, None, "cpu")})


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_modules(models: Any, name: str) -> None:
    sana = family(models[name])
    sana.check()
    sana.check_weights()
    for found, expected in zip(load_all(sana), tiny_modules(normed=name != "diffusers"), strict=True):
        a, b = found.state_dict(), expected.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert sana.facts().architecture == ("sana" if name == "diffusers" else "sana-1.5")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "net."])
def test_files_of_the_denoiser(models: Any, prefix: str, tmp_path: Path) -> None:
    """NVIDIA's .pth, and names with what programs put before them."""
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    file = tmp_path / ("model.safetensors" if prefix else "model.pth")
    torch.save({"epoch": 1, "state_dict": tensors}, file) if not prefix else save_file(tensors, file)
    sana = family({**models["files"], "pretrained_model_name_or_path": file})
    sana.check()
    sana.check_weights()
    found, expected = sana.load_denoiser(None, "cpu").state_dict(), tiny_modules(normed=True)[0].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_folder_of_the_variant_in_bf16(models: Any, tmp_path: Path) -> None:
    """As `hf download` leaves it that asks for no other."""
    folder = Path(shutil.copytree(models["diffusers"]["pretrained_model_name_or_path"], tmp_path / "pipeline"))
    for file in [*folder.glob("*/*.safetensors")]:
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
        file.rename(file.with_suffix(".bf16.safetensors"))
    sana = family({"pretrained_model_name_or_path": folder})
    sana.check_weights()
    assert {p.dtype for module in load_all(sana) for p in module.parameters()} == {torch.bfloat16}


def test_published_names_are_those_that_diffusers_converts() -> None:
    """And back again, bit by bit. Its converter of the denoiser knows no norms, and wants what no picture needs."""
    denoiser, _, vae = tiny_modules()
    unused = {"pos_embed": torch.ones(1), "y_embedder.y_embedding": torch.ones(1)}
    cases: list[tuple[nn.Module, Any, dict[str, Tensor], Any]] = [
        (denoiser, sana_rules, unused, convert_sana_transformer_to_diffusers),
        (vae, dc_ae.dc_ae_rules, {}, convert_autoencoder_dc_checkpoint_to_diffusers),
    ]
    for module, rules_of, more, converter in cases:
        state, rules = module.state_dict(), rules_of(module)
        published = publish(state, rules)
        assert len(published) == len(rules)
        theirs = converter({**published, **more})
        assert theirs.keys() == state.keys() and all(torch.equal(theirs[name], state[name]) for name in state)
        back, wrong = read(published.__getitem__, published, rules, {n: tuple(t.shape) for n, t in state.items()})
        assert not wrong and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_sizes(name: str) -> None:
    """On the meta device: the published configuration, read again from the shapes of both kinds of names; targets."""
    config, parameters, count = PUBLISHED[name]
    full = {**shipped_config("sana"), "caption_channels": 2304, **config}
    module = build_empty(lambda: build(full))
    assert sum(p.numel() for p in module.parameters()) == parameters
    state = module.state_dict()
    for tensors in (state, publish(state, sana_rules(module))):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        again = build_empty(lambda shapes=shapes: build(layout(shapes)))
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in state.items()}
        found = layout(shapes)
        assert all(found[key] == value for key, value in config.items())
    network = lora_sana.create_network(1.0, 16, 16, None, [], module)
    assert len(network.named_layers()) == count
    assert {key.rpartition("_")[2] for key in network.named_layers()} == {"q", "k", "v"}


def test_real_size_of_the_autoencoder() -> None:
    """312M parameters, and the configuration of the published one from the shapes of both kinds of names."""
    kinds, widths = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, [128, 256, 512, 512, 1024, 1024]
    scales: list[list[int]] = [[], [], [], [5], [5], [5]]
    config = {
        **shipped_config("sana_vae"), "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3] * 6, "encoder_block_types": kinds, "decoder_block_types": kinds,
        "encoder_block_out_channels": widths, "decoder_block_out_channels": widths,
        "encoder_qkv_multiscales": scales, "decoder_qkv_multiscales": scales,
    }  # fmt: skip
    module = build_empty(lambda: dc_ae.build(config))
    assert sum(p.numel() for p in module.parameters()) == 312_250_275
    state = module.state_dict()
    for tensors in (state, publish(state, dc_ae.dc_ae_rules(module))):
        found = dc_ae.layout({key: tuple(tensor.shape) for key, tensor in tensors.items()})
        assert all(found[key] == config[key] for key in found)


def test_positions_of_the_models_for_large_pictures() -> None:
    """4096 px: the file's table of positions says what its configuration says."""
    denoiser = build_empty(lambda: build({**tiny_modules()[0].config, "sample_size": 32}))
    shapes = {key: tuple(value.shape) for key, value in publish(denoiser.state_dict(), sana_rules(denoiser)).items()}
    for side, scale in ((16, None), (32, None), (64, 1.0), (128, 2.0)):
        found = layout({**shapes, "pos_embed": (1, side**2, 64)})
        assert (found["sample_size"], found["interpolation_scale"]) == (side, scale)


def test_quantised_bases_leave_convolutions_as_they_are(models: Any) -> None:
    denoiser = family(models["files"]).load_denoiser(torch.bfloat16, "cpu", storage="fp8")
    kinds = {name: type(module) for name, module in denoiser.named_modules() if hasattr(module, "weight")}
    assert kinds["transformer_blocks.0.ff.conv_inverted"] is nn.Conv2d
    quantised = {name for name, module in denoiser.named_modules() if isinstance(module, QuantLinear)}
    assert "transformer_blocks.1.attn2.to_k" in quantised and not any(".ff." in name for name in quantised)


# ---- text -----------------------------------------------------------------------------------------------------------


def pipeline(folder: Path) -> Any:
    from diffusers import SanaPipeline
    from transformers import Gemma2Model, GemmaTokenizer

    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer")
    encoder = Gemma2Model.from_pretrained(folder / "text_encoder")
    return SanaPipeline(tokenizer, encoder, None, None, None)  # type: ignore[arg-type]


def test_states_are_those_of_the_pipeline(models: Any, tmp_path: Path) -> None:
    """With its own instruction; a caption that is too long is cut in the same place; "" is its negative prompt."""
    from diffusers import SanaPipeline

    long = " ".join(["cat", "dog", "photo"] * 150)
    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    options = {key: value for key, value in models["diffusers"].items() if key != "complex_human_instruction"}
    sana, pipe = family(options), pipeline(models["diffusers"]["pretrained_model_name_or_path"])
    cond = encode(sana, [CAPTIONS[0], long, ""])
    with torch.no_grad():
        for i, prompt in enumerate((CAPTIONS[0], long)):
            states, mask, none, none_mask = pipe.encode_prompt(prompt, complex_human_instruction=told, device="cpu")
            kept = int(mask.sum())
            torch.testing.assert_close(cond[ENCODER][i, :kept], states[0, :kept], rtol=1e-4, atol=1e-5)
            assert int(cond[MASK][i].sum()) == kept == (300 if prompt == long else kept)
    torch.testing.assert_close(cond[ENCODER][2, :1], none[0, :1], rtol=1e-4, atol=1e-5)
    assert int(cond[MASK][2].sum()) == int(none_mask.sum()) == 1
    assert not cond[ENCODER][2, 1:].any()
    assert sana.tokenize([CAPTIONS[0], long, ""]).truncated == (1,)
    counts = sana.count_tokens([CAPTIONS[0], long, ""])
    assert counts[1] > sana.token_limit >= counts[0] > counts[2] == 0
    assert sana.skipped > 1000 and all(len(part[ENCODER]) <= 300 for part in sana.split_cond(cond))  # what is cached


def test_another_instruction_and_none(models: Any) -> None:
    own = {key: value for key, value in models["diffusers"].items() if key != "complex_human_instruction"}
    usual = family({**own, "complex_human_instruction": SHORT})
    none = family({**own, "complex_human_instruction": ""})
    pipe = pipeline(own["pretrained_model_name_or_path"])
    for sana, told in ((usual, [SHORT]), (none, None)):
        with torch.no_grad():
            states, mask, *_ = pipe.encode_prompt("a photo", complex_human_instruction=told, device="cpu")
        kept = int(mask.sum())
        cond = encode(sana, ["a photo"])
        assert MASK not in cond and cond[ENCODER].shape[1] == kept
        torch.testing.assert_close(cond[ENCODER][0], states[0, :kept], rtol=1e-4, atol=1e-5)
    fingerprints = {sana.text_fingerprint(ENCODER) for sana in (usual, none, family(own))}
    assert len(fingerprints) == 3
    assert none.token_limit == 299 and none.count_tokens(["a photo"]) == [kept - 1]


def test_conds_survive_the_cache(models: Any) -> None:
    sana = family(models["files"])
    cond = encode(sana, CAPTIONS)
    parts = sana.split_cond(cond)
    assert [len(part[ENCODER]) for part in parts] == [int(n) for n in cond[MASK].sum(1)]
    again = sana.join_conds(parts)
    assert again.keys() == cond.keys() and all(torch.equal(again[key], cond[key]) for key in cond)
    assert MASK not in sana.join_conds([parts[0], parts[0]])


# ---- pictures and prediction ----------------------------------------------------------------------------------------


def test_latents(models: Any) -> None:
    sana = family(models["files"])
    vae: Any = sana.load_vae(None, "cpu")
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = sana.encode_image(vae, pixels, [1, 2])
    with torch.no_grad():
        expected = vae.encode(pixels).latent * 0.41407
        torch.testing.assert_close(sana.decode_latent(vae, latents), vae.decode(latents / 0.41407).sample.clamp(-1, 1))
    assert latents.shape == (2, 32, 2, 3) and torch.equal(latents, expected)
    assert torch.equal(sana.encode_image(vae, pixels, [7, 8]), latents)  # nothing is drawn


@pytest.mark.parametrize("name", ["diffusers", "files"])  # SANA, SANA-1.5
def test_one_step_loss_equals_the_literal_reference(models: Any, name: str) -> None:
    """With the instruction that SANA was trained with. The contract tests compare gradients."""
    options = {key: value for key, value in models[name].items() if key != "complex_human_instruction"}
    sana = family(options)
    denoiser, encoder, vae = load_all(sana)
    objective = sana.objective(SanaFlowOptions(), LossOptions())
    pixels = torch.rand(3, 3, 64, 96) * 2 - 1
    batch = Batch(
        names=["a", "b", "c"], captions=CAPTIONS, loss_weights=torch.ones(3), pixels=pixels, latent_seeds=[5, 6, 7]
    )
    generator = torch_generator("test")
    latents = sana.encode_image(vae, pixels, batch.latent_seeds)
    t = objective.sample_t(3, (2, 3), generator, "cpu")
    noised = objective.noise(latents, t, generator)
    with torch.no_grad():
        cond = sana.encode_text(sana.tokenize(CAPTIONS), {ENCODER: encoder})
        pred = sana.predict(denoiser, noised.x_t, noised.t, cond, batch)
        expected = loss(options, batch, {}, torch_generator("test"))
    torch.testing.assert_close(objective.loss(Predict.of(pred), noised, batch).mean(), expected, rtol=1e-5, atol=1e-6)


def test_padding_never_reaches_the_model(models: Any) -> None:
    sana = family(models["files"])
    denoiser = sana.load_denoiser(None, "cpu")
    x, t, cond = torch.randn(3, 32, 2, 4), torch.tensor([0.2, 0.5, 0.9]), encode(sana, CAPTIONS)
    with torch.no_grad():
        together = sana.predict(denoiser, x, t, cond, None)
        for i, part in enumerate(sana.split_cond(cond)):
            alone = sana.predict(denoiser, x[i : i + 1], t[i : i + 1], sana.join_conds([part]), None)
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_time_reaches_the_model_in_float32(models: Any) -> None:
    """bfloat16 has three digits: of eleven neighbours it would leave four. A model may have a scale of its own."""
    sana = family(models["files"])
    denoiser: Any = sana.load_denoiser(torch.bfloat16, "cpu")
    seen: list[Tensor] = []
    denoiser.time_embed.emb.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t, cond = torch.arange(900, 911) / 1000, {ENCODER: torch.randn(11, 3, TEXT_WIDTH)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        sana.predict(denoiser, torch.randn(11, 32, 2, 2), t, cond, None)
        sana.parts.config["timestep_scale"] = 0.001  # type: ignore[index]
        sana.predict(denoiser, torch.randn(11, 32, 2, 2), t, cond, None)
    assert seen[0].dtype == torch.float32 and len(seen[0].unique()) == 11
    torch.testing.assert_close(seen[0], 1000 * t)
    torch.testing.assert_close(seen[1], t)


def test_noise_levels_of_training_and_previews(models: Any) -> None:
    objective = family(models["files"]).objective(SanaFlowOptions(), LossOptions())
    s = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(objective.sampler("euler", 4, size=(2, 3)).timesteps.float(), 3 * s / (1 + 2 * s))
    levels = objective.sample_t(20000, (2, 3), torch_generator("test"), "cpu")
    torch.testing.assert_close(levels.median(), torch.tensor(0.75), rtol=0.02, atol=0)  # sigmoid(0), shifted by 3


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusers", "files"])
def test_a_saved_model_is_read_by_diffusers(models: Any, name: str, tmp_path: Path) -> None:
    from diffusers import SanaTransformer2DModel

    sana = family(models[name])
    denoiser = sana.load_denoiser(None, "cpu")
    file = tmp_path / "out.safetensors"
    sana.save(denoiser, {}, file, CheckpointForm(metadata={"a": "b"}))
    folder = tmp_path / "config"
    normed = tiny_modules(normed=name == "files")[0]
    normed.save_config(folder)
    theirs = SanaTransformer2DModel.from_single_file(str(file), config=str(folder), local_files_only=True)
    a, b = theirs.state_dict(), denoiser.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert load_file(file).keys() == b.keys()


def test_lora_through_the_pipeline(models: Any, tmp_path: Path) -> None:
    """The default file, with all kinds of layers and alpha unlike rank: SanaPipeline.load_lora_weights, outputs."""
    sana = family(models["files"])
    denoiser: Any = sana.load_denoiser(None, "cpu")
    arguments = {"out_dim": "3", "mlp_dim": "2", "embedder_dims": "2,2,2"}
    network = lora_sana.create_network(1.0, 4, 2.7, None, [], denoiser, **arguments)
    randomize(network, size=0.1)
    x, t, cond = torch.randn(1, 32, 2, 4), torch.tensor([0.4]), encode(sana, ["red dog"])
    theirs: Any = tiny_modules(normed=True)[0]
    pipe = pipeline(models["files"]["vae"].parent / "pipeline")
    pipe.register_modules(transformer=theirs)
    assert FAMILIES["sana"].lora_format == "peft"
    pipe.load_lora_weights(convert(network.state(None), "peft", adapter_tables()))
    count = sum(name.endswith("lora_A.default_0") for name, _ in theirs.named_modules())
    assert count == len(network.named_layers()) == 3 * (2 * 4 + 2) + 6
    with torch.no_grad():
        before = sana.predict(denoiser, x, t, cond, None)
        network.attach(train_denoiser=True, train_text_encoder=False)
        expected, found = (sana.predict(module, x, t, cond, None) for module in (denoiser, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - before).abs().max()) > 0.01


def test_a_file_that_the_tools_have_no_names_for(models: Any, tmp_path: Path) -> None:
    """LoRAs are merged into files in diffusers' names."""
    known = known_architectures()
    with pytest.raises(UserError, match="has not the names of diffusers: give the denoiser's file of its folder"):
        open_checkpoint("--sd_model", str(models["files"]["pretrained_model_name_or_path"]), known)
    open_checkpoint("--sd_model", str(models["plain"]["pretrained_model_name_or_path"]), known)


def test_the_targets_of_options() -> None:
    denoiser = tiny_modules()[0]
    make_network = lambda **args: lora_sana.create_network(1.0, 4, 4, None, [], denoiser, **args).named_layers()
    assert len(make_network()) == 18
    assert len(make_network(train_block_indices="0,2")) == 12
    assert {name.rpartition("_attn")[2] for name in make_network(attn_dim="0", out_dim="2")} == {
        "1_to_out_0", "2_to_out_0"
    }  # fmt: skip
    assert {name.rpartition("_ff_")[2] for name in make_network(attn_dim="0", mlp_dim="2")} == {
        "conv_inverted", "conv_point"
    }  # fmt: skip
    with pytest.raises(UserError, match="train_block_indices: there is no block 3; this model has 0 to 2"):
        make_network(train_block_indices="3")
    assert not any("conv_depth" in target.name for target in TARGETS.denoiser_targets(denoiser))


# ---- what is refused ------------------------------------------------------------------------------------------------


def line_of(options: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        family({**options, **more}).check()
    (line,) = caught.value.problems
    return line


def test_a_length_that_leaves_no_room_to_captions(models: Any) -> None:
    line = "^--gemma2_max_token_length 2 leaves no token to captions: give at least 3$"
    with pytest.raises(UserError, match=line):
        family(models["files"], gemma2_max_token_length=2).check()
    family(models["files"], gemma2_max_token_length=3).check()


def test_models_of_another_kind(models: Any, tmp_path: Path) -> None:
    files, folder = models["files"], models["diffusers"]["pretrained_model_name_or_path"]
    lumina = make_lumina(tmp_path / "lumina")
    assert line_of(files, vae=lumina["ae"]) == (
        f"--vae: {lumina['ae']} is not a DC-AE; the DC-AE of SANA (dc-ae-f32c32-sana-1.0 or 1.1) is needed"
    )
    kl = tmp_path / "lumina" / "pipeline" / "vae"
    assert line_of(files, vae=kl).startswith(f"--vae: {kl} is of the class AutoencoderKL; the DC-AE of SANA")
    model = lumina["pretrained_model_name_or_path"]
    assert "lumina_train_network.py" in line_of(files, pretrained_model_name_or_path=model)
    assert "is a Lumina checkpoint and has no Gemma 2" in line_of(files, gemma2=model)
    found = line_of(files, gemma2=files["vae"])
    assert found.startswith(f"--gemma2: {files['vae']} is no Gemma 2 text encoder")

    def changed(name: str, part: str = "transformer", **values: Any) -> Path:
        place = Path(shutil.copytree(folder, tmp_path / name))
        path = place / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return place

    told = {
        "is a SANA-Sprint, which is trained by distillation": changed("sprint", guidance_embeds=True),
        "holds a SanaVideoTransformer3DModel, not a": changed("video", _class_name="SanaVideoTransformer3DModel"),
        "SANA needs Gemma 2 2B-it": changed("wide", caption_channels=48),
        "latents of 128 channels, 32 times smaller": changed("f64", "vae", latent_channels=128),
    }
    for line, place in told.items():
        assert line in line_of(models["diffusers"], pretrained_model_name_or_path=place)


def test_parts_that_are_missing(models: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        family({"pretrained_model_name_or_path": models["files"]["pretrained_model_name_or_path"]}).check()
    assert [line.partition(" is missing")[0] for line in caught.value.problems] == ["--gemma2", "--vae"]
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    for spoiled in spoilt(tensors):
        save_file(spoiled, tmp_path / "spoilt.safetensors")
        line = line_of(models["files"], pretrained_model_name_or_path=tmp_path / "spoilt.safetensors")
        assert str(tmp_path / "spoilt.safetensors") in line


def spoilt(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A Sprint's file; one without the layer that tells the width; one with a size that makes no model."""
    yield {**tensors, "cfg_embedder.mlp.0.weight": torch.ones(2, 2)}
    yield {name: value for name, value in tensors.items() if not name.startswith("x_embedder.")}
    yield {**tensors, "x_embedder.proj.weight": torch.ones(64, 32)}
