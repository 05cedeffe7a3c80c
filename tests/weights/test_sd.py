# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x / 2.x: every way to load, what text and pictures become, and what is saved."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file

from library.families.options import ModelOptions
from library.families.registry import FAMILIES
from library.families.sd.model import StableDiffusion
from library.families.sd.options import SDOptions
from library.families.sd.unet_family import betas
from library.io.checkpoint import CheckpointForm
from library.memory.checkpointing import Recomputation, recompute_encoders
from library.objectives.options import DDPMOptions, LossOptions
from tests.tiny import LAYERS, WIDTH, make_tiny_sd, tiny_modules, vocabulary

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a photo of a cat", "red dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(version, layout) -> path."""
    root = tmp_path_factory.mktemp("models")
    return {
        (v, layout): make_tiny_sd(root / f"{v}_{layout}", version=v, layout=layout)
        for v in (1, 2)
        for layout in ("diffusers", "single")
    }


def family(path, **options):
    return StableDiffusion(SDOptions(pretrained_model_name_or_path=str(path), **options))


def load_all(sd, dtype=None):
    return sd.load_denoiser(dtype, "cpu"), sd.load_vae(dtype, "cpu"), sd.load_text_encoder("clip", dtype, "cpu")


def assert_equal_modules(found, expected):
    for a, b in zip(found, expected, strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def text_context(sd, captions=CAPTIONS, encoder=None):
    encoders = {"clip": encoder if encoder is not None else sd.load_text_encoder("clip", None, "cpu")}
    with torch.no_grad():
        return sd.encode_text(sd.tokenize(list(captions)), encoders)["context"]


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", ["diffusers", "single"])
def test_loads_bit_equal_frozen_and_configured(models, version, layout):
    sd = family(models[version, layout], v2=version == 2)
    sd.check()
    loaded, made = load_all(sd), tiny_modules(version=version)
    assert_equal_modules(loaded, made)
    assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in loaded)
    for name in (
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "use_linear_projection",
        "attention_head_dim",
    ):
        expected = made[0].config[name]
        assert loaded[0].config[name] == (list(expected) if isinstance(expected, tuple) else expected)
    assert loaded[2].config.hidden_act == made[2].config.hidden_act
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, WIDTH)
    ids = torch.randint(0, len(vocabulary()[0]), (2, 77))
    with torch.no_grad():  # configuration that no weight shows (groups, heads, activation) is right as well
        assert torch.equal(loaded[0](x, t, context).sample, made[0](x, t, context).sample)
        assert torch.equal(loaded[2](ids).last_hidden_state, made[2](ids).last_hidden_state)
        pixels = torch.randn(1, 3, 64, 64)
        assert torch.equal(loaded[1].encode(pixels).latent_dist.mean, made[1].encode(pixels).latent_dist.mean)


def test_dtype_is_the_files_until_asked_otherwise(models, tmp_path):
    tensors = load_file(models[1, "single"])
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    (tmp_path / "tokenizer").symlink_to(models[1, "single"].parent / "tokenizer")
    assert {p.dtype for m in load_all(family(path)) for p in m.parameters()} == {torch.float16}
    assert {p.dtype for m in load_all(family(path), torch.bfloat16) for p in m.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in family(path, no_half_vae=True).load_vae(torch.float16, "cpu").parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize("nest", [True, False])
def test_ckpt(models, tmp_path, nest):
    tensors = load_file(models[1, "single"])
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": tensors, "global_step": 7} if nest else tensors, path)
    assert_equal_modules(load_all(family(path)), tiny_modules())


def test_clip_without_the_text_model_level(models, tmp_path):
    tensors = {n.replace(".text_model.", "."): t for n, t in load_file(models[1, "single"]).items()}
    save_file(tensors, tmp_path / "old.safetensors")
    assert_equal_modules(load_all(family(tmp_path / "old.safetensors")), tiny_modules())


def test_a_pipeline_saved_by_diffusers(models, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(models[1, "diffusers"], local_files_only=True)
    pipeline.save_pretrained(tmp_path / "whole")
    assert_equal_modules(load_all(family(tmp_path / "whole")), tiny_modules())
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    pipeline.save_pretrained(tmp_path / "split", max_shard_size="200KB")
    assert list((tmp_path / "split" / "unet").glob("*.index.json"))
    for kind in ("fp16", "split"):
        sd = family(tmp_path / kind)
        sd.check()
        assert_equal_modules(load_all(sd), tiny_modules())


def test_a_folder_with_pickles_and_text_model_level(models, tmp_path):
    """As transformers 4 and early diffusers wrote them."""
    folder = tmp_path / "m"
    shutil.copytree(models[1, "diffusers"], folder)
    for part, name, level in (("text_encoder", "model", "text_model."), ("unet", "diffusion_pytorch_model", "")):
        source = folder / part / f"{name}.safetensors"
        tensors = {level + n: t for n, t in load_file(source).items()}
        torch.save(tensors, folder / part / ("pytorch_model.bin" if level else f"{name}.bin"))
        source.unlink()
    assert_equal_modules(load_all(family(folder)), tiny_modules())


@pytest.mark.parametrize("version", [1, 2])
def test_diffusers_opens_our_single_file(models, tmp_path, version):
    from diffusers import StableDiffusionPipeline

    sd = family(models[version, "diffusers"], v2=version == 2)
    unet, vae, encoder = load_all(sd)
    path = tmp_path / "out.safetensors"
    sd.save(unet, {"clip": encoder}, path, CheckpointForm(metadata={"modelspec.title": "t"}))
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(models[version, "diffusers"]), local_files_only=True
    )
    assert_equal_modules([pipeline.unet, pipeline.vae, pipeline.text_encoder], [unet, vae, encoder])


# ---- the VAE --------------------------------------------------------------------------------------------------------


def old_names(tensors):
    """Diffusers names before 0.12, with the attention as 1x1 convolutions."""
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    result = {}
    for name, tensor in tensors.items():
        old = next((name.replace(f".{a}.", f".{b}.") for a, b in pairs.items() if f".attentions.0.{a}." in name), name)
        result[old] = tensor[:, :, None, None] if old != name and tensor.ndim == 2 else tensor
    return result


@pytest.mark.parametrize("kind", ["folder", "model", "file", "old_file", "published", "published_alone", "flat"])
def test_vae_option(models, tmp_path, kind):
    from library.weights.vae_names import VAE_PREFIX

    model = make_tiny_sd(tmp_path / "other", seed=5)
    single = load_file(make_tiny_sd(tmp_path / "other1", seed=5, layout="single"))
    own = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    below = {n[len(VAE_PREFIX) :]: t for n, t in single.items() if n.startswith(VAE_PREFIX)}
    files = {
        "file": own,
        "old_file": old_names(own),
        "published": single,
        "published_alone": below,
        "flat": {n: t.squeeze() if ".attn_1." in n and t.ndim == 4 else t for n, t in below.items()},
    }
    path = {"folder": model / "vae", "model": model}.get(kind, tmp_path / "vae.safetensors")
    if kind in files:
        save_file({n: t.contiguous() for n, t in files[kind].items()}, path)
    for layout in ("diffusers", "single"):
        loaded = family(models[1, layout], vae=str(path)).load_vae(None, "cpu")
        assert_equal_modules([loaded], [tiny_modules(seed=5)[1]])


def test_posterior_noise_comes_from_each_samples_seed(models):
    sd = family(models[1, "single"])
    vae = sd.load_vae(None, "cpu")
    pixels = torch.rand(3, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        latents = sd.encode_image(vae, pixels, [11, 12, 11])
        posterior = vae.encode(pixels).latent_dist
        alone = sd.encode_image(vae, pixels[1:2], [12])
    assert latents.shape == (3, 4, 8, 16) and latents.dtype == torch.float32
    for i, seed in enumerate((11, 12, 11)):
        noise = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed))
        expected = (posterior.mean[i] + posterior.std[i] * noise) * 0.18215
        torch.testing.assert_close(latents[i], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone[0], latents[1], rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_vae(models):
    """--no_half_vae means float32, also where the trainer runs under autocast."""
    sd = family(models[1, "single"], no_half_vae=True)
    vae, pixels = sd.load_vae(torch.bfloat16, "cpu"), torch.rand(1, 3, 64, 64)
    expected = sd.encode_image(vae, pixels, [1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sd.encode_image(vae, pixels, [1]), expected)
        decoded = sd.decode_latent(vae, expected)
    assert torch.equal(sd.decode_latent(vae, expected), decoded)


def test_decode_undoes_the_scale(models):
    sd = family(models[1, "single"])
    vae = sd.load_vae(None, "cpu")
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        found = sd.decode_latent(vae, latents)
        expected = vae.decode(latents / 0.18215).sample.clamp(-1, 1)
    assert found.shape == (2, 3, 64, 64)
    torch.testing.assert_close(found, expected)


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_last_states_and_clip_skip(models, version):
    path, v2 = models[version, "single"], version == 2
    plain = family(path, v2=v2)
    encoder = plain.load_text_encoder("clip", None, "cpu")
    ids = plain.tokenize(CAPTIONS).ids["clip"][:, 0]
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
        assert torch.equal(text_context(plain, encoder=encoder), output.last_hidden_state)
        for n in range(1, LAYERS + 1):
            found = text_context(family(path, v2=v2, clip_skip=n), encoder=encoder)
            x = output.hidden_states[-n]
            norm = encoder.final_layer_norm
            centred = x - x.mean(-1, keepdim=True)
            expected = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, output.last_hidden_state)


def test_sd2_leaves_out_the_last_block_of_the_file(models):
    blocks = {n.split(".")[4] for n in load_file(models[2, "single"]) if ".resblocks." in n}
    encoder = family(models[2, "single"], v2=True).load_text_encoder("clip", None, "cpu")
    assert len(blocks) == LAYERS + 1 and encoder.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit, length", [(75, 77), (150, 152), (225, 227)])
def test_chunks_are_encoded_apart_and_joined(models, version, limit, length):
    sd = family(models[version, "single"], v2=version == 2, max_token_length=limit)
    encoder = sd.load_text_encoder("clip", None, "cpu")
    caption = " ".join(["red dog cat"] * 40)  # 120 tokens
    found = text_context(sd, [caption, "cat"], encoder)
    assert found.shape == (2, length, WIDTH)
    ids = sd.tokenize([caption, "cat"]).ids["clip"]
    with torch.no_grad():
        parts = [encoder(ids[:, i]).last_hidden_state for i in range(limit // 75)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(found[:, 1 + 75 * i : 76 + 75 * i], part[:, 1:76], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, 0], parts[0][:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, -1], parts[-1][:, -1], rtol=1e-5, atol=1e-6)


def test_weights_multiply_the_states_of_their_tokens(models):
    path = models[1, "single"]
    plain, weighted = family(path, max_token_length=150), family(path, max_token_length=150, weighted_captions=True)
    found = text_context(weighted, ["(red:1.5) cat [dog]"])
    expected = text_context(plain, ["red cat dog"]).clone()
    expected[:, 1] *= 1.5
    expected[:, 3] /= 1.1
    torch.testing.assert_close(found, expected)
    assert torch.equal(text_context(weighted, ["red cat"]), text_context(plain, ["red cat"]))


def test_gradient_flows_into_an_encoder_that_learns(models):
    sd = family(models[1, "single"], clip_skip=2, weighted_captions=True)
    encoder = sd.load_text_encoder("clip", None, "cpu").requires_grad_(True)
    sd.encode_text(sd.tokenize(["(cat:1.2)"]), {"clip": encoder})["context"].pow(2).mean().backward()
    assert encoder.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert encoder.encoder.layers[-1].mlp.fc1.weight.grad is None  # above the layer that is read


def test_conds_split_and_join_again(models):
    sd = family(models[1, "single"])
    cond = {"context": text_context(sd)}
    parts = sd.split_cond(cond)
    assert [p["context"].shape for p in parts] == [(77, WIDTH)] * 2
    assert torch.equal(sd.join_conds(parts)["context"], cond["context"])
    short = {"context": parts[0]["context"][:10]}
    padded = sd.join_conds([short, parts[1]])["context"]
    assert torch.equal(padded[0, :10], short["context"]) and not padded[0, 10:].any()


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_predict_and_blocks(models, version):
    sd = family(models[version, "diffusers"], v2=version == 2)
    unet = sd.load_denoiser(None, "cpu")
    x, t, context = torch.randn(2, 4, 8, 16), torch.tensor([5, 700]), torch.randn(2, 77, WIDTH)
    ran = []
    for i, block in enumerate(sd.blocks(unet)):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        assert torch.equal(sd.predict(unet, x, t, {"context": context}, None), unet(x, t, context).sample)
    assert ran == 2 * list(range(len(sd.blocks(unet))))
    finest = (ResnetBlock2D, BasicTransformerBlock, Downsample2D, Upsample2D)
    assert {*map(id, sd.blocks(unet))} == {id(m) for m in unet.modules() if isinstance(m, finest)}


def test_checkpointing_changes_no_gradient(models):
    sd = family(models[1, "single"])
    tokens, x, t = sd.tokenize(CAPTIONS), torch.randn(2, 4, 8, 8), torch.tensor([5, 700])

    def gradients(checkpointing):
        unet, _, encoder = load_all(sd)
        unet.requires_grad_(True)
        encoder.requires_grad_(True)
        calls = []
        block = unet.mid_block.attentions[0].transformer_blocks[0]
        encoder.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("text"))
        block.ff.register_forward_pre_hook(lambda *_: calls.append("unet"))
        if checkpointing:
            Recomputation(sd.blocks(unet)).set_budget(0)
            recompute_encoders([encoder])
        sd.predict(unet, x, t, sd.encode_text(tokens, {"clip": encoder}), None).pow(2).mean().backward()
        return calls, {f"{i}.{n}": p.grad for i, m in enumerate((unet, encoder)) for n, p in m.named_parameters()}

    (calls, plain), (calls_again, recomputed) = gradients(False), gradients(True)
    assert sorted(calls) == ["text", "unet"] and sorted(calls_again) == ["text", "text", "unet", "unet"]
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


def test_objective_has_the_models_schedule(models, tmp_path):
    sd = family(models[1, "diffusers"])
    objective = sd.objective(DDPMOptions(), LossOptions())
    assert objective.prediction_type == "epsilon"
    expected = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).pow(2)
    torch.testing.assert_close(objective.betas.double(), expected, rtol=1e-5, atol=0)
    v = family(models[1, "diffusers"], v_parameterization=True)
    assert v.objective(DDPMOptions(), LossOptions()).prediction_type == "v_prediction"
    assert torch.equal(betas({"trained_betas": [0.1, 0.2]}), torch.tensor([0.1, 0.2]))
    assert betas(
        {"beta_schedule": "linear", "beta_start": 0.1, "beta_end": 0.3, "num_train_timesteps": 3}
    ).tolist() == (pytest.approx([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    "options, version, architecture, prediction",
    [
        ({}, "sd_v1", "stable-diffusion-v1", "epsilon"),
        ({"v_parameterization": True}, "sd_v1_v", "stable-diffusion-v1", "v"),
        ({"v2": True}, "sd_v2", "stable-diffusion-v2-512", "epsilon"),
        ({"v2": True, "v_parameterization": True}, "sd_v2_v", "stable-diffusion-v2-768-v", "v"),
    ],
)
def test_facts_for_the_metadata(options, version, architecture, prediction):
    facts = family("x", **options).facts()
    assert (facts.base_model_version, facts.architecture, facts.prediction_type) == (version, architecture, prediction)
    assert family("x.safetensors", vae="v").model_names() == {"sd_model": "x.safetensors", "vae": "v"}


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_save_gives_back_the_file(models, tmp_path, version):
    source = models[version, "single"]
    sd = family(source, v2=version == 2)
    unet, _, encoder = load_all(sd)
    sd.save(unet, {"clip": encoder}, tmp_path / "out.safetensors", CheckpointForm(metadata={"a": "b"}))
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    from library.weights.weight_files import open_weights

    assert open_weights(tmp_path / "out.safetensors").metadata == {"a": "b"}


def test_save_in_half_precision_and_what_sd2_keeps_of_its_source(models, tmp_path):
    tensors = load_file(models[2, "single"])
    kept = "cond_stage_model.model.text_projection"
    tensors[kept] = torch.randn(WIDTH, WIDTH)
    (tmp_path / "tokenizer").symlink_to(models[2, "single"].parent / "tokenizer")
    save_file(tensors, tmp_path / "source.safetensors")
    sd = family(tmp_path / "source.safetensors", v2=True)
    unet, _, encoder = load_all(sd)
    with torch.no_grad():
        encoder.final_layer_norm.bias.fill_(3)
    sd.save(unet, {"clip": encoder}, tmp_path / "out.safetensors", CheckpointForm(dtype=torch.float16))
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == tensors.keys() and {t.dtype for t in saved.values()} == {torch.float16}
    assert torch.equal(saved[kept], tensors[kept].half())
    assert bool((saved["cond_stage_model.model.ln_final.bias"] == 3).all())


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def fingerprints(sd):
    return {"vae": sd.vae_fingerprint(), "text": sd.text_fingerprint("clip")}


def test_fingerprints_tell_weights_and_settings(models, tmp_path):
    path = models[1, "single"]
    base = fingerprints(family(path))
    assert base == fingerprints(family(path))
    settings = ({"clip_skip": 2}, {"max_token_length": 150}, {"weighted_captions": True})
    changed = [fingerprints(family(path, **s)) for s in settings]
    assert {f["vae"] for f in changed} == {base["vae"]}
    assert len({base["text"], *(f["text"] for f in changed)}) == 4

    tensors = load_file(path)
    (tmp_path / "tokenizer").symlink_to(path.parent / "tokenizer")
    for part, name in (
        ("vae", "first_stage_model.decoder.conv_out.bias"),
        ("text", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
        (None, "model.diffusion_model.out.2.bias"),
    ):
        other = {**tensors, name: tensors[name] + 1e-3}
        save_file(other, tmp_path / "changed.safetensors")
        found = fingerprints(family(tmp_path / "changed.safetensors"))
        assert {key for key in base if base[key] != found[key]} == ({part} if part else set())


def test_the_scaling_factor_is_part_of_the_fingerprint(models, tmp_path):
    vae = tmp_path / "vae"
    shutil.copytree(models[1, "diffusers"] / "vae", vae)
    before = fingerprints(family(models[1, "diffusers"], vae=str(vae)))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    after = fingerprints(family(models[1, "diffusers"], vae=str(vae)))
    assert before["vae"] != after["vae"] and before["text"] == after["text"]


def test_a_vae_option_changes_only_its_fingerprint(models, tmp_path):
    other = make_tiny_sd(tmp_path / "other", seed=5)
    base, found = (fingerprints(family(models[1, "single"], vae=v)) for v in (None, str(other)))
    assert base["vae"] != found["vae"] and base["text"] == found["text"]


# ---- the rest of the frame ------------------------------------------------------------------------------------------


def test_registry_and_options():
    entry = FAMILIES["sd"]
    assert entry.path == "library.families.sd.model:StableDiffusion" and entry.option_groups["model"] is SDOptions
    assert issubclass(SDOptions, ModelOptions)
    (problem,) = SDOptions().problems()
    assert problem.startswith("--pretrained_model_name_or_path is missing")
    assert list(SDOptions(pretrained_model_name_or_path="m").problems()) == []


def test_the_registry_imports_no_torch():
    code = "import sys, library.families.registry, library.families.detect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tiny_models_are_reproducible(tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    first, second = (load_file(make_tiny_sd(tmp_path / n, layout="single")) for n in "ab")
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[n], second[n]) for n in first)
    scheduler = make_tiny_sd(tmp_path / "v", v_prediction=True) / "scheduler" / "scheduler_config.json"
    assert json.loads(scheduler.read_text())["prediction_type"] == "v_prediction"
