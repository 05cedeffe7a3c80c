# SPDX-License-Identifier: Apache-2.0
"""Lumina-Image 2.0: every way to load, what text and pictures become, the model's time, and what is saved."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.lumina.model import ENCODER, MASK, Lumina
from library.families.lumina.options import LuminaFlowOptions, LuminaOptions
from library.families.lumina.parts import build_denoiser, denoiser_rules, layout, rope_axes
from library.families.registry import FAMILIES
from library.io.checkpoint import CheckpointForm
from library.key_tables import publish
from library.memory.checkpointing import Recomputation, recompute_encoders
from library.objectives.base import Predict
from library.objectives.options import LossOptions
from library.options import Spec, specs
from library.rng import torch_generator
from library.types import Batch
from library.weights.loading import build_empty
from tests.families.lumina import GEMMA_LAYERS, HEAD, HEADS, KEY_HEADS, TEXT_WIDTH, loss, make, tiny_modules
from tests.tiny import make_tiny_sd

DATA = Path(__file__).parents[1] / "data_files" / "weights"
LAYOUTS = ("files", "whole", "diffusers", "transformer")
CAPTIONS = ["a photo of a cat", "red dog", ""]
SYSTEM = "a photo star"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Layout -> options that name the model."""
    root = tmp_path_factory.mktemp("lumina")
    return {name: make(root / name, layout=name) for name in LAYOUTS}


def family(options, **more):
    return Lumina(LuminaOptions(**{name: str(value) for name, value in options.items()}, **more))


def load_all(lumina, dtype=None):
    return (
        lumina.load_denoiser(dtype, "cpu"),
        lumina.load_text_encoder(ENCODER, dtype, "cpu"),
        lumina.load_vae(dtype, "cpu"),
    )


def assert_equal_modules(found, expected):
    for a, b in zip(found, expected, strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def line(action):
    with pytest.raises(UserError) as caught:
        action()
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def encode(lumina, captions=CAPTIONS, encoder=None):
    encoder = encoder or lumina.load_text_encoder(ENCODER, None, "cpu")
    with torch.no_grad():
        return lumina.encode_text(lumina.tokenize(list(captions)), {ENCODER: encoder})


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_loads_bit_equal_frozen_and_configured(models, kind):
    lumina = family(models[kind])
    lumina.check()
    loaded, made = load_all(lumina), tiny_modules()
    assert_equal_modules(loaded, made)
    assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in loaded)
    x, t, text = torch.randn(2, 16, 4, 8), torch.tensor([0.1, 0.8]), torch.randn(2, 5, TEXT_WIDTH)
    mask, ids, pixels = torch.ones(2, 5).bool(), torch.randint(0, 200, (2, 7)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():  # configuration that no weight shows (heads, positions, scales) is right as well
        assert torch.equal(loaded[0](x, t, text, None), made[0](x, t, text, mask).sample)
        assert torch.equal(loaded[1](ids).last_hidden_state, made[1](ids).last_hidden_state)
        assert torch.equal(loaded[2].encode(pixels).latent_dist.mean, made[2].encode(pixels).latent_dist.mean)
    assert (loaded[2].config.scaling_factor, loaded[2].config.shift_factor) == (0.3611, 0.1159)


@pytest.mark.parametrize("kind", ["prefix", "diffusers file", "half"])
def test_other_files_of_the_denoiser(models, tmp_path, kind):
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    if kind == "diffusers file":
        tensors = tiny_modules()[0].state_dict()
    elif kind == "half":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    else:
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    shutil.copytree(models["files"]["pretrained_model_name_or_path"].parent / "tokenizer", tmp_path / "tokenizer")
    lumina = family(models["files"] | {"pretrained_model_name_or_path": tmp_path / "m.safetensors"})
    lumina.check()
    denoiser, made = lumina.load_denoiser(None, "cpu"), tiny_modules()[0]
    assert_equal_modules([denoiser], [made.bfloat16() if kind == "half" else made])
    assert {p.dtype for p in lumina.load_denoiser(torch.float16, "cpu").parameters()} == {torch.float16}


def test_gemma_and_autoencoder_beside_a_model_that_has_them(models, tmp_path):
    other = make(tmp_path / "other", seed=5)
    for kind in ("whole", "diffusers"):
        lumina = family(models[kind] | {"gemma2": other["gemma2"], "ae": tmp_path / "other" / "pipeline"})
        made, own = tiny_modules(5), tiny_modules()
        assert_equal_modules(load_all(lumina), (own[0], *made[1:]))


def test_a_hub_id_in_the_hubs_cache(models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository, revision = tmp_path / "models--some--model", "0123456789012345678901234567890123456789"
    shutil.copytree(models["diffusers"]["pretrained_model_name_or_path"], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    lumina = family({"pretrained_model_name_or_path": "some/model"})
    lumina.check()
    assert_equal_modules(load_all(lumina), tiny_modules())


def test_sizes_of_the_real_model_and_its_keys():
    """At full size, without memory: what is read from the published shapes gives the published shapes again."""
    with gzip.open(DATA / "lumina2_output.json.gz") as file:
        keys = {name: tuple(shape) for name, shape in json.load(file).items()}
    config = layout(keys)
    real = build_empty(lambda: build_denoiser(config))
    from diffusers import Lumina2Transformer2DModel

    plain = build_empty(lambda: Lumina2Transformer2DModel(cap_feat_dim=2304))
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in real.state_dict().items()} == shapes
    for name in ("num_attention_heads", "num_kv_heads", "num_layers", "num_refiner_layers", "in_channels", "norm_eps"):
        assert real.config[name] == plain.config[name]
    assert list(real.config.axes_dim_rope) == list(plain.config.axes_dim_rope) == [32, 32, 32]
    assert list(real.config.axes_lens) == list(plain.config.axes_lens)
    published = publish(real.state_dict(), denoiser_rules(real))
    found = {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert found | {"norm_final.weight": (2304,)} == keys and len(keys) == 400


@pytest.mark.parametrize("head, axes", [(96, [32, 32, 32]), (8, [4, 2, 2]), (16, [8, 4, 4]), (128, [44, 42, 42])])
def test_axes_of_the_position_embedding(head, axes):
    assert rope_axes(head) == axes


def test_longer_texts_than_the_table_of_positions(models):
    """diffusers' table ends at 300. Text position 400 turns as a longer table has it."""
    from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed

    from library.families.lumina.forward import _turns

    seen, latents = torch.ones(1, 400).bool(), torch.randn(1, 16, 4, 6)
    expected = Lumina2RotaryPosEmbed(10000, [4, 2, 2], [401, 512, 512])(latents, seen)[3]
    assert torch.equal(_turns([4, 2, 2], 10000, seen, 2, 3), expected)
    lumina = family(models["files"], gemma2_max_token_length=400)
    with torch.no_grad():
        cond = {ENCODER: torch.randn(1, 400, TEXT_WIDTH)}
        out = lumina.predict(lumina.load_denoiser(None, "cpu"), latents, torch.tensor([0.5]), cond, None)
    assert bool(out.isfinite().all())


def test_half_precision_weights_that_compute_in_float32(tmp_path):
    """storage "half": half the memory, the same numbers."""
    options = make(tmp_path)
    for path in options.values():
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    lumina, x, t = family(options), torch.randn(3, 16, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    found = []
    for storage in ("plain", "half"):
        denoiser = lumina.load_denoiser(torch.float32, "cpu", storage=storage)
        encoder = lumina.load_text_encoder(ENCODER, torch.float32, "cpu", storage=storage)
        assert (denoiser.layers[0].attn.to_q.weight.dtype == torch.bfloat16) == (storage == "half")
        with torch.no_grad():
            found.append(lumina.predict(denoiser, x, t, encode(lumina, encoder=encoder), None))
    assert torch.equal(*found)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_parts_that_are_missing_are_all_named(models):
    model = models["files"]["pretrained_model_name_or_path"]
    with pytest.raises(UserError) as caught:
        family({"pretrained_model_name_or_path": model}).check()
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--gemma2 is missing", "--ae is missing"]


def test_wrong_files(models, tmp_path):
    files = models["files"]
    wrong = make_tiny_sd(tmp_path / "sd", layout="single")
    assert "is a Stable Diffusion 1.x or 2.x checkpoint: use train_network.py" in line(
        family(files | {"pretrained_model_name_or_path": wrong}).check
    )
    assert "is a VAE" in line(family(files | {"pretrained_model_name_or_path": files["ae"]}).check)
    assert "is a text encoder" in line(family(files | {"pretrained_model_name_or_path": files["gemma2"]}).check)
    assert line(family(files | {"gemma2": files["ae"]}).check).startswith("--gemma2: ")
    assert "--ae needs one that has" in line(family(files | {"ae": files["gemma2"]}).check)
    assert "latents of 4 channels, not 16" in line(family(files | {"ae": wrong}).check)
    assert "use train_network.py" in line(
        family(files | {"pretrained_model_name_or_path": make_tiny_sd(tmp_path / "folder")}).check
    )
    assert "is no Lumina-Image 2.0 folder" in line(family(files | {"pretrained_model_name_or_path": tmp_path}).check)
    vae = models["diffusers"]["pretrained_model_name_or_path"] / "vae"
    assert "holds a AutoencoderKL" in line(family(files | {"pretrained_model_name_or_path": vae}).check)


def test_incomplete_files(models, tmp_path):
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    path = tmp_path / "m.safetensors"
    lumina = family(models["files"] | {"pretrained_model_name_or_path": path})
    save_file({n: t for n, t in tensors.items() if n != "layers.0.attention.q_norm.weight"}, path)
    assert "is incomplete: it lacks layers.0.attention.q_norm.weight" in line(lumina.check)
    save_file({n: t for n, t in tensors.items() if n != "layers.1.attention.out.weight"}, path)
    assert "layers.1.attention.out.weight" in line(
        lambda: family(models["files"] | {"pretrained_model_name_or_path": path}).load_denoiser(None, "cpu")
    )


def test_a_text_encoder_of_another_size(models, tmp_path):
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    tensors["cap_embedder.0.weight"] = torch.ones(TEXT_WIDTH + 1)
    save_file(tensors, tmp_path / "m.safetensors")
    lumina = family(models["files"] | {"pretrained_model_name_or_path": tmp_path / "m.safetensors"})
    assert "Lumina-Image 2.0 needs Gemma 2 2B" in line(lumina.check)


def test_a_system_prompt_that_leaves_nothing(models):
    lumina = family(models["files"], system_prompt="cat " * 20, gemma2_max_token_length=16)
    assert line(lumina.check).startswith("--system_prompt fills all 16 tokens")


def option(name) -> Spec:
    return specs(FAMILIES["lumina"].option_groups)[name]


@pytest.mark.parametrize("name", ["vae", "v2", "v_parameterization", "weighted_captions", "use_sage_attn"])
def test_options_that_make_no_sense(name):
    with pytest.raises(ValueError, match="has no meaning here"):
        option(name).read("true" if name != "vae" else "vae.safetensors")
    if name != "vae":
        assert option(name).read("false") is False


@pytest.mark.parametrize(
    "name", ["clip_skip", "max_token_length", "use_flash_attn", "sample_batch_size", "disable_mmap_load_safetensors"]
)
def test_options_that_are_answered(name):
    assert option(name).info.answer
    assert option(name).read("1") in (1, True)


# ---- text -----------------------------------------------------------------------------------------------------------


def test_states_before_the_last_layer_cut_to_the_longest(models):
    lumina = family(models["files"])
    encoder = lumina.load_text_encoder(ENCODER, None, "cpu")
    tokens = lumina.tokenize(CAPTIONS)
    assert tokens.ids[ENCODER].shape == (3, 256) and tokens.truncated == ()
    assert tokens.lengths[ENCODER] == tuple(n + 1 for n in lumina.count_tokens(CAPTIONS))
    assert tokens.ids[ENCODER][:, 0].tolist() == [2, 2, 2]  # <bos>, also of the empty caption
    cond = encode(lumina, encoder=encoder)
    longest = max(tokens.lengths[ENCODER])
    assert cond[ENCODER].shape == (3, longest, TEXT_WIDTH) and cond[MASK].shape == (3, longest)
    for i, length in enumerate(tokens.lengths[ENCODER]):
        with torch.no_grad():
            states = encoder(tokens.ids[ENCODER][i : i + 1, :length], output_hidden_states=True).hidden_states
        assert len(states) == GEMMA_LAYERS + 1
        torch.testing.assert_close(cond[ENCODER][i, :length], states[-2][0], rtol=1e-5, atol=1e-6)
        assert not cond[ENCODER][i, length:].any()
        assert cond[MASK][i].tolist() == [True] * length + [False] * (longest - length)


def test_conds_split_and_join_again(models):
    lumina = family(models["files"])
    cond = encode(lumina)
    parts = lumina.split_cond(cond)
    assert [len(part[ENCODER]) for part in parts] == [n + 1 for n in lumina.count_tokens(CAPTIONS)]
    assert all(bool(part[MASK].all()) for part in parts)
    joined = lumina.join_conds(parts)
    assert joined.keys() == cond.keys() and all(torch.equal(joined[name], cond[name]) for name in cond)


def test_system_prompt(models):
    plain, system = family(models["files"]), family(models["files"], system_prompt=SYSTEM)
    texts = [f"{SYSTEM} <Prompt Start> {caption}" for caption in CAPTIONS]  # the empty caption's too
    assert torch.equal(system.tokenize(CAPTIONS).ids[ENCODER], plain.tokenize(texts).ids[ENCODER])
    assert system.count_tokens(CAPTIONS) == plain.count_tokens(CAPTIONS)
    taken = plain.count_tokens([texts[2]])[0]
    assert plain.token_limit == 255 and system.token_limit == 255 - taken
    assert plain.text_fingerprint(ENCODER) != system.text_fingerprint(ENCODER)
    assert plain.vae_fingerprint() == system.vae_fingerprint()


def test_a_caption_is_cut_at_the_limit(models):
    lumina = family(models["files"], system_prompt=SYSTEM, gemma2_max_token_length=64)
    caption = "cat" * lumina.token_limit
    (count,) = lumina.count_tokens([caption])
    assert count == lumina.token_limit
    tokens = lumina.tokenize([caption, caption + "cat"])
    assert tokens.truncated == (1,)
    assert torch.equal(*tokens.ids[ENCODER]) and len(set(tokens.lengths[ENCODER])) == 1
    assert tokens.ids[ENCODER].shape == (2, 64)


def test_gradient_flows_into_an_encoder_that_learns(models):
    lumina = family(models["files"])
    encoder = lumina.load_text_encoder(ENCODER, None, "cpu").requires_grad_(True)
    lumina.encode_text(lumina.tokenize(["cat"]), {ENCODER: encoder})[ENCODER].pow(2).mean().backward()
    assert encoder.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert encoder.layers[-1].mlp.up_proj.weight.grad is None  # above the layer that is read


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled(models):
    lumina = family(models["whole"])
    vae, pixels = lumina.load_vae(None, "cpu"), torch.rand(2, 3, 32, 64) * 2 - 1
    latents = lumina.encode_image(vae, pixels, [11, 12])
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    for i, seed in enumerate((11, 12)):
        noise = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(seed))
        expected = (posterior.mean[i] + posterior.std[i] * noise - 0.1159) * 0.3611
        torch.testing.assert_close(latents[i], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        expected = vae.decode(latents / 0.3611 + 0.1159).sample.clamp(-1, 1)
    torch.testing.assert_close(lumina.decode_latent(vae, latents), expected)
    assert lumina.scale_legacy(latents) is latents
    half = family(models["whole"], no_half_vae=True).load_vae(torch.bfloat16, "cpu")
    assert {p.dtype for p in half.parameters()} == {torch.float32}


# ---- training -------------------------------------------------------------------------------------------------------


def batch_of_conds(lumina):
    return torch.randn(3, 16, 4, 8), torch.tensor([0.2, 0.5, 0.9]), encode(lumina)


@pytest.mark.parametrize("rows", [3, 1], ids=["padded texts", "one text"])
def test_predict_is_the_plain_model_with_time_and_sign_turned(models, rows):
    """Answer and gradients, to the last bit."""
    lumina, made = family(models["files"]), tiny_modules()[0]
    denoiser = build_denoiser(made.config)
    denoiser.load_state_dict(made.state_dict())  # aligned as those of `made`, not as they lie in the file
    x, t, cond = batch_of_conds(lumina)
    x, t, cond = x[:rows], t[:rows], lumina.join_conds(lumina.split_cond(cond)[:rows])
    assert (MASK in cond) == (rows > 1)
    mask = cond.get(MASK, torch.ones(cond[ENCODER].shape[:2], dtype=torch.bool))
    ran = []
    for i, block in enumerate(lumina.blocks(denoiser)):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    found, expected = lumina.predict(denoiser, x, t, cond, None), made(x, 1 - t, cond[ENCODER], mask).sample
    assert torch.equal(found, -expected)
    assert found.shape == x.shape and ran == list(range(6))
    found.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(denoiser.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_equal_lengths_need_no_mask(models):
    lumina = family(models["files"])
    denoiser = lumina.load_denoiser(None, "cpu")
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([0.2, 0.5])
    states = torch.randn(2, 7, TEXT_WIDTH)
    without = lumina.predict(denoiser, x, t, {ENCODER: states}, None)
    masked = lumina.predict(denoiser, x, t, {ENCODER: states, MASK: torch.ones(2, 7).bool()}, None)
    torch.testing.assert_close(without, masked)
    parts = lumina.split_cond({ENCODER: states})
    assert all(part[MASK].tolist() == [True] * 7 for part in parts)
    assert lumina.join_conds(parts).keys() == {ENCODER}


def test_predict_on_tensors_without_contents_and_compiled(models):
    from torch._subclasses import FakeTensorMode

    lumina = family(models["files"])
    x, t, cond = batch_of_conds(lumina)
    denoiser = lumina.load_denoiser(None, "cpu")
    with torch.no_grad():
        expected = lumina.predict(denoiser, x, t, cond, None)
        compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
        assert torch.equal(lumina.predict(compiled, x, t, cond, None), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in cond.items()}
        found = lumina.predict(denoiser, mode.from_tensor(x), mode.from_tensor(t), fake, None)
    assert found.shape == expected.shape


def test_padding_never_reaches_the_model(models):
    lumina = family(models["files"])
    denoiser = lumina.load_denoiser(None, "cpu")
    x, t, cond = batch_of_conds(lumina)
    together = lumina.predict(denoiser, x, t, cond, None)
    more = {ENCODER: torch.nn.functional.pad(cond[ENCODER], (0, 0, 0, 9), value=7.0),
            MASK: torch.nn.functional.pad(cond[MASK], (0, 9))}  # fmt: skip
    torch.testing.assert_close(lumina.predict(denoiser, x, t, more, None), together, rtol=1e-4, atol=1e-5)
    for i, part in enumerate(lumina.split_cond(cond)):
        alone = lumina.predict(denoiser, x[i : i + 1], t[i : i + 1], lumina.join_conds([part]), None)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_time_reaches_the_model_in_float32(models):
    """bfloat16 has three digits: of eleven neighbours it would leave four."""
    lumina = family(models["files"])
    denoiser = lumina.load_denoiser(torch.bfloat16, "cpu")
    seen = []
    denoiser.time_caption_embed.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t = torch.arange(900, 911) / 1000
    cond = {ENCODER: torch.randn(11, 3, TEXT_WIDTH), MASK: torch.ones(11, 3).bool()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lumina.predict(denoiser, torch.randn(11, 16, 2, 2), t, cond, None)
    assert seen[0].dtype == torch.float32 and len(seen[0].unique()) == 11
    torch.testing.assert_close(seen[0], 1 - t, rtol=0, atol=0)


def test_checkpointing_changes_no_gradient(models):
    lumina = family(models["files"])
    x, t = torch.randn(3, 16, 4, 4), torch.tensor([0.2, 0.5, 0.9])

    def gradients(checkpointing):
        denoiser, encoder, _ = load_all(lumina)
        denoiser.requires_grad_(True), encoder.requires_grad_(True)
        calls = []
        denoiser.layers[0].feed_forward.register_forward_pre_hook(lambda *_: calls.append("image"))
        encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("text"))
        if checkpointing:
            Recomputation(lumina.blocks(denoiser)).set_budget(0)
            recompute_encoders([encoder])
        cond = lumina.encode_text(lumina.tokenize(CAPTIONS), {ENCODER: encoder})
        lumina.predict(denoiser, x, t, cond, None).pow(2).mean().backward()
        return calls, {f"{i}.{n}": p.grad for i, m in enumerate((denoiser, encoder)) for n, p in m.named_parameters()}

    (calls, plain), (again, recomputed) = gradients(False), gradients(True)
    assert sorted(calls) == ["image", "text"] and sorted(again) == ["image", "image", "text", "text"]
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_one_step_loss_equals_the_literal_reference(models, system):
    options = models["files"] | ({"system_prompt": system} if system else {})
    lumina = family(options)
    denoiser, encoder, vae = load_all(lumina)
    objective = lumina.objective(LuminaFlowOptions(), LossOptions())
    pixels = torch.rand(3, 3, 32, 64) * 2 - 1
    batch = Batch(
        names=["a", "b", "c"], captions=CAPTIONS, loss_weights=torch.ones(3), pixels=pixels, latent_seeds=[5, 6, 7]
    )
    generator = torch_generator("test")
    latents = lumina.encode_image(vae, pixels, batch.latent_seeds)
    t = objective.sample_t(3, (4, 8), generator, "cpu")
    noised = objective.noise(latents, t, generator)
    with torch.no_grad():
        pred = lumina.predict(denoiser, noised.x_t, noised.t, encode(lumina, encoder=encoder), batch)
        expected = loss(options, batch, {}, torch_generator("test"))
    torch.testing.assert_close(objective.loss(Predict.of(pred), noised, batch).mean(), expected, rtol=1e-5, atol=1e-6)


def test_objective_and_the_noise_levels_of_previews(models):
    objective = family(models["files"]).objective(LuminaFlowOptions(), LossOptions())
    t = objective.sampler("euler", 4, size=(32, 48)).timesteps
    s = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(t.float().cpu(), 6 * s / (1 + 5 * s))
    t = objective.sampler("euler", 4, size=(32, 48), shift=1.0).timesteps
    torch.testing.assert_close(t.float().cpu(), s)


# ---- saving ---------------------------------------------------------------------------------------------------------


def test_save_gives_back_the_file(models, tmp_path):
    source = models["files"]["pretrained_model_name_or_path"]
    lumina = family(models["files"])
    lumina.save(
        lumina.load_denoiser(None, "cpu"), {}, tmp_path / "out.safetensors", CheckpointForm(metadata={"a": "b"})
    )
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    from library.weights.weight_files import open_weights

    assert open_weights(tmp_path / "out.safetensors").metadata == {"a": "b"}


def test_save_from_a_pipeline_in_half_precision(models, tmp_path):
    lumina = family(models["diffusers"])
    lumina.save(
        lumina.load_denoiser(None, "cpu"), {}, tmp_path / "out.safetensors", CheckpointForm(dtype=torch.bfloat16)
    )
    expected, saved = (
        load_file(models["files"]["pretrained_model_name_or_path"]),
        load_file(tmp_path / "out.safetensors"),
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[n], expected[n].bfloat16()) for n in expected)


def test_facts_and_names_for_the_metadata(models):
    facts = family({"pretrained_model_name_or_path": "x"}).facts()
    assert (facts.base_model_version, facts.architecture) == ("lumina2", "lumina-2")
    assert facts.implementation == "https://github.com/Alpha-VLLM/Lumina-Image-2.0"
    names = family({"pretrained_model_name_or_path": "x.safetensors", "ae": "ae.safetensors"}).model_names()
    assert names == {"sd_model": "x.safetensors", "vae": "ae.safetensors"}


def test_fused_rows(models):
    """q, k and v of different height (fewer key heads) are one tensor of the file."""
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    attention = tiny_modules()[0].layers[1].attn
    q, k, v = (getattr(attention, f"to_{n}").weight for n in "qkv")
    assert (len(q), len(k), len(v)) == (HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD)
    assert torch.equal(tensors["layers.1.attention.qkv.weight"], torch.cat([q, k, v]))
