# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: every way to load, what text becomes, what the model is asked, and what is saved."""

import gzip
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.sd3.model import StableDiffusion3
from library.families.sd3.options import SD3FineTuneOptions, SD3FlowOptions, SD3Options
from library.families.sd3.parts import PUBLISHED, build_mmdit, kind, layout, mmdit_rules
from library.families.sd3.positions import choose_crop
from library.io.checkpoint import CheckpointForm
from library.key_tables import publish
from library.objectives.base import Predict
from library.objectives.options import LossOptions
from library.options import resolve
from library.trainers.options import NetworkTrainerOptions
from library.types import Batch
from library.weights.vae_names import vae_rules
from tests.families.sd3 import CLIP_WIDTHS, CONTEXT, FOLDERS, T5_LENGTH, loss, make, pipeline_of, tiny_modules
from tests.trainers.helpers import make_pictures, subset, train, write_dataset

DATA = Path(__file__).parents[1] / "data_files" / "weights" / "sd3_outputs.json.gz"
KINDS, LAYOUTS = ("medium", "5-medium"), ("diffusers", "single", "files", "transformer")
CAPTIONS = ["a photo of a cat", "red dog, blue star, photo of a girl"]
ENCODERS = ("clip_l", "clip_g", "t5xxl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(kind, layout) -> the options that name the model."""
    root = tmp_path_factory.mktemp("sd3")
    return {(k, x): make(root / f"{k}_{x}", kind=k, layout=x) for k in KINDS for x in LAYOUTS}


def family(options, **more):
    values = {name: str(value) if isinstance(value, Path) else value for name, value in {**options, **more}.items()}
    return StableDiffusion3(SD3Options(**values))


def load_encoders(sd3):
    return {name: sd3.load_text_encoder(name, None, "cpu") for name in sd3.encoders}


def load_all(sd3):
    modules = {"denoiser": sd3.load_denoiser(None, "cpu"), "vae": sd3.load_vae(None, "cpu"), **load_encoders(sd3)}
    return modules


def encode(sd3, captions=CAPTIONS):
    with torch.no_grad():
        return sd3.encode_text(sd3.tokenize(list(captions)), load_encoders(sd3))


def assert_equal_modules(found, expected):
    assert found.keys() == expected.keys()
    for name, module in found.items():
        a, b = module.state_dict(), expected[name].state_dict()
        assert a.keys() == b.keys(), name
        assert all(torch.equal(a[key], b[key]) for key in a), name


def inputs(size=8, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 16, size, size, generator=generator), torch.linspace(0.2, 0.9, count)


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_bit_equal_and_configured(models, kind, layout):
    sd3 = family(models[kind, layout])
    sd3.check()
    loaded, made = load_all(sd3), tiny_modules(kind=kind)
    assert sd3.encoders == ENCODERS
    assert_equal_modules(loaded, made)
    assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in loaded.values())
    ids = torch.randint(0, 40, (2, 77))
    x_t, t = inputs()
    context, pooled = torch.randn(2, 9, CONTEXT), torch.randn(2, sum(CLIP_WIDTHS.values()))
    with torch.no_grad():  # configuration that no weight shows is right as well
        one, other = (m["denoiser"](x_t, context, pooled, t * 1000).sample for m in (loaded, made))
        assert torch.equal(one, other)
        for name in CLIP_WIDTHS:
            assert torch.equal(loaded[name](ids).text_embeds, made[name](ids).text_embeds)
        assert torch.equal(loaded["t5xxl"](ids).last_hidden_state, made["t5xxl"](ids).last_hidden_state)
    assert loaded["vae"].config.scaling_factor == 1.5305 and loaded["vae"].config.shift_factor == 0.0609


def test_the_transformer_folder_alone_with_files(models):
    options = models["medium", "files"]
    folder = pipeline_of(options) / "transformer"
    sd3 = family({**options, "pretrained_model_name_or_path": folder, "tokenizer_cache_dir": None})
    assert_equal_modules(load_all(sd3), tiny_modules())


def test_a_prefix_alone_and_options_before_what_is_inside(models, tmp_path):
    made = tiny_modules(seed=5)
    save_file({k: v.clone() for k, v in made["clip_l"].state_dict().items()}, tmp_path / "l.safetensors")
    sd3 = family(models["medium", "single"], clip_l=tmp_path / "l.safetensors")
    assert_equal_modules({"clip_l": sd3.load_text_encoder("clip_l", None, "cpu")}, {"clip_l": made["clip_l"]})
    tensors = load_file(models["medium", "single"]["pretrained_model_name_or_path"])
    kept = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    save_file(kept, tmp_path / "bare.safetensors")
    options = {**models["medium", "files"], "pretrained_model_name_or_path": tmp_path / "bare.safetensors"}
    assert_equal_modules(load_all(family(options)), tiny_modules())


@pytest.mark.parametrize(("layout", "prefix"), [("files", "diffusion_model."), ("transformer", "transformer.")])
def test_other_prefixes(models, tmp_path, layout, prefix):
    tensors = load_file(models["5-medium", layout]["pretrained_model_name_or_path"])
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "m.safetensors")
    options = {**models["5-medium", layout], "pretrained_model_name_or_path": tmp_path / "m.safetensors"}
    made = tiny_modules(kind="5-medium")["denoiser"]
    assert_equal_modules({"denoiser": family(options).load_denoiser(None, "cpu")}, {"denoiser": made})


def test_clip_l_without_projection_gets_the_identity(models, tmp_path):
    options = models["medium", "files"]
    tensors = load_file(options["clip_l"])
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "l.safetensors")
    (tmp_path / "tokenizer").symlink_to(Path(options["clip_l"]).parent / "tokenizer")
    encoder = family(options, clip_l=tmp_path / "l.safetensors").load_text_encoder("clip_l", None, "cpu")
    assert torch.equal(encoder.text_projection.weight, torch.eye(CLIP_WIDTHS["clip_l"]))


@pytest.mark.parametrize("name", ["medium", "5-medium", "5-large"])
def test_keys_and_shapes_of_the_published_checkpoints(name):
    """At full size on the meta device: configuration from the list, and the list from the configuration."""
    expected = {key: tuple(shape) for key, shape in published_lists()[name].items()}
    prefix = "model.diffusion_model."
    config = layout({k[len(prefix) :]: s for k, s in expected.items() if k.startswith(prefix)}, PUBLISHED)
    assert kind(config) == name
    assert config["num_layers"] == config["num_attention_heads"] == (38 if name == "5-large" else 24)
    assert config["dual_attention_layers"] == (tuple(range(13)) if name == "5-medium" else ())
    assert config["pos_embed_max_size"] == (384 if name == "5-medium" else 192)
    with torch.device("meta"):
        denoiser, vae = build_mmdit(config), full_vae()
    found = {prefix + k: s for k, s in rule_shapes(denoiser, mmdit_rules(denoiser)).items()}
    found |= {"first_stage_model." + k: s for k, s in rule_shapes(vae, vae_rules(vae)).items()}
    assert found == expected


@cache
def published_lists():
    return json.loads(gzip.decompress(DATA.read_bytes()))


def full_vae():
    from diffusers import AutoencoderKL

    from library.weights.loading import shipped_config

    return AutoencoderKL.from_config(shipped_config("sd3_vae"))


def rule_shapes(module, rules):
    """What `publish` would write, as shapes."""
    return {name: tuple(tensor.shape) for name, tensor in publish(module.state_dict(), rules).items()}


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_to_ours_to_published_is_bit_equal(models, tmp_path, kind, layout):
    sd3 = family(models[kind, layout])
    path = tmp_path / "out.safetensors"
    sd3.save(
        sd3.load_denoiser(None, "cpu"), load_encoders(sd3), path, CheckpointForm(metadata={"modelspec.title": "t"})
    )
    whole = load_file(models[kind, "single"]["pretrained_model_name_or_path"])
    found = load_file(path)
    assert found.keys() == {k for k in whole if not k.startswith("text_encoders.")}
    for name in ENCODERS:
        prefix = f"text_encoders.{name}.transformer."
        beside = load_file(tmp_path / f"out_{name}.safetensors")
        assert beside.keys() == {k[len(prefix) :] for k in whole if k.startswith(prefix)}
        found |= {prefix + key: tensor for key, tensor in beside.items()}
    assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


def test_only_what_learned_is_beside_and_everything_loads_again(models, tmp_path):
    options = models["5-medium", "files"]
    sd3 = family(options)
    denoiser, clip_g = sd3.load_denoiser(None, "cpu"), sd3.load_text_encoder("clip_g", None, "cpu")
    for module in (denoiser, clip_g):
        for parameter in module.parameters():
            parameter.data.add_(0.125)
    path = tmp_path / "out.safetensors"
    sd3.save(denoiser, {"clip_g": clip_g}, path, CheckpointForm(dtype=torch.bfloat16))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "out_clip_g.safetensors"]
    again = family(
        {**options, "vae": None, "pretrained_model_name_or_path": path, "clip_g": tmp_path / "out_clip_g.safetensors"}
    )
    for module, found in (
        (denoiser, again.load_denoiser(None, "cpu")),
        (clip_g, again.load_text_encoder("clip_g", None, "cpu")),
    ):
        for key, tensor in module.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor.bfloat16()), key
    assert again.load_vae(None, "cpu").dtype == torch.bfloat16


def test_diffusers_opens_our_checkpoint(models, tmp_path):
    from diffusers import SD3Transformer2DModel

    sd3 = family(models["5-medium", "single"])
    denoiser = sd3.load_denoiser(None, "cpu")
    sd3.save(denoiser, {}, tmp_path / "out.safetensors", CheckpointForm())
    config = pipeline_of(models["5-medium", "single"]) / "transformer"
    found = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "out.safetensors"), config=str(config), local_files_only=True
    )
    assert_equal_modules({"denoiser": found}, {"denoiser": denoiser})


# ---- text and predict -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_predict_equals_the_pipeline_of_diffusers(models):
    """The conditions as `StableDiffusion3Pipeline.encode_prompt` makes them, and its forward."""
    from diffusers import StableDiffusion3Pipeline

    options = models["5-medium", "diffusers"]
    sd3 = family(options)
    pipeline = StableDiffusion3Pipeline.from_pretrained(options["pretrained_model_name_or_path"], local_files_only=True)
    context, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
    )
    x_t, t = inputs()
    expected = pipeline.transformer(x_t, context, pooled, t * 1000).sample
    found = sd3.predict(sd3.load_denoiser(None, "cpu"), x_t, t, encode(sd3), None)
    assert torch.allclose(found, expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("missing", [["clip_l"], ["clip_g"], ["t5xxl"], ["clip_l", "clip_g"], ["clip_g", "t5xxl"]])
def test_zeros_stand_for_missing_encoders(models, tmp_path, missing):
    folder = tmp_path / "m"
    shutil.copytree(models["medium", "diffusers"]["pretrained_model_name_or_path"], folder)
    for name in missing:
        shutil.rmtree(folder / FOLDERS[name])
    sd3 = family({**models["medium", "diffusers"], "pretrained_model_name_or_path": folder})
    sd3.check()
    assert sd3.encoders == tuple(name for name in ENCODERS if name not in missing)
    whole = family(models["medium", "diffusers"])
    expected = encode(whole)
    for name in missing:
        expected |= {key: torch.zeros_like(t) for key, t in expected.items() if key.startswith(name)}
    found = encode(sd3)
    assert not any(key.startswith(name) for key in found for name in missing)
    denoiser, (x_t, t) = sd3.load_denoiser(None, "cpu"), inputs()
    assert torch.equal(sd3.predict(denoiser, x_t, t, found, None), sd3.predict(denoiser, x_t, t, expected, None))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_batch_equals_the_literal_reference(models, kind):
    options = models[kind, "single"]
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = Batch(["a", "b"], CAPTIONS, torch.ones(2), pixels=pixels, latent_seeds=[3, 4])
    expected = loss(options, batch, {}, torch.Generator().manual_seed(8))
    sd3, generator = family(options), torch.Generator().manual_seed(8)
    objective = sd3.objective(SD3FlowOptions(), LossOptions())
    latents = sd3.encode_image(sd3.load_vae(None, "cpu"), pixels, batch.latent_seeds)
    noised = objective.noise(latents, objective.sample_t(2, (8, 8), generator, "cpu"), generator)
    pred = sd3.predict(sd3.load_denoiser(None, "cpu"), noised.x_t, noised.t, encode(sd3), batch)
    found = objective.loss(Predict.of(pred), noised, batch).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_long_captions_are_counted_and_cut_where_t5_cuts(models, tmp_path):
    sd3 = family(models["medium", "single"])
    captions = ["cat " * 5, "cat " * 30]
    assert sd3.count_tokens(captions) == [5, 30]
    assert sd3.token_limit == T5_LENGTH - 1
    tokens = sd3.tokenize(captions)
    assert tokens.truncated == (1,)
    assert {name: tuple(ids.shape) for name, ids in tokens.ids.items()} == {
        "clip_l": (2, 1, 77),
        "clip_g": (2, 1, 77),
        "t5xxl": (2, T5_LENGTH),
    }
    end, padding = sd3.clip_tokenizers["clip_l"].end, tokens.ids["clip_g"][0, 0, -1]
    assert tokens.ids["clip_l"][0, 0, -1] == end and padding == 0


def test_masks_zero_the_padding_of_the_outputs(models):
    plain = encode(family(models["medium", "files"]))
    sd3 = family(models["medium", "files"], apply_lg_attn_mask=True, apply_t5_attn_mask=True)
    masked, tokens = encode(sd3), sd3.tokenize(CAPTIONS)
    for name in CLIP_WIDTHS:
        for i, row in enumerate(tokens.ids[name][:, 0].tolist()):
            end = row.index(sd3.clip_tokenizers[name].end) + 1
            assert 3 < end < 70
            assert torch.equal(masked[name][i, :end], plain[name][i, :end])
            assert not masked[name][i, end:].any() and plain[name][i, end:].any()
        assert torch.equal(masked[f"{name}_pooled"], plain[f"{name}_pooled"])
    lengths = torch.tensor(tokens.lengths["t5xxl"])
    assert masked["t5xxl"].shape[1] == lengths.max() < T5_LENGTH
    alone = encode(sd3, CAPTIONS[:1])["t5xxl"][0]  # the length of the others' captions does not change it
    assert torch.allclose(masked["t5xxl"][0, : lengths[0]], alone[: lengths[0]], atol=1e-5)
    assert not masked["t5xxl"][0, lengths[0] :].any()
    assert not torch.allclose(masked["t5xxl"][0, : lengths[0]], plain["t5xxl"][0, : lengths[0]], atol=1e-3)


@torch.no_grad()
def test_cached_outputs_are_unpadded_and_say_the_same(models):
    sd3 = family(models["medium", "files"], apply_t5_attn_mask=True)
    cond = encode(sd3)
    parts = sd3.split_cond(cond)
    assert [len(part["t5xxl"]) for part in parts] == [*sd3.tokenize(CAPTIONS).lengths["t5xxl"]]
    denoiser, (x_t, t) = sd3.load_denoiser(None, "cpu"), inputs()
    whole = sd3.predict(denoiser, x_t, t, cond, None)
    assert torch.equal(sd3.predict(denoiser, x_t, t, sd3.join_conds(parts), None), whole)
    one = sd3.predict(denoiser, x_t[:1], t[:1], sd3.join_conds(parts[:1]), None)  # predict pads to the full length
    assert torch.allclose(one, whole[:1], atol=1e-5)


def test_dropout_takes_whole_encoders_from_samples(models):
    cond = {name: torch.ones(400, 3, 4) for name in ENCODERS} | {"clip_l_pooled": torch.ones(400, 4)}
    options = models["medium", "files"]
    untouched = family(options).drop_text(cond, 3)
    assert all(torch.equal(a, b) for a, b in zip(untouched.values(), cond.values(), strict=True))
    sd3 = family(options, clip_l_dropout_rate=0.25, t5_dropout_rate=1.0)
    dropped = sd3.drop_text(cond, 3)
    assert not dropped["t5xxl"].any() and dropped["clip_g"].all()
    kept = dropped["clip_l"].flatten(1).all(1)
    assert torch.equal(kept, dropped["clip_l"].flatten(1).any(1))  # all of a sample or nothing
    assert torch.equal(kept, dropped["clip_l_pooled"].all(1))
    assert 0.15 < 1 - kept.float().mean() < 0.35
    assert cond["t5xxl"].all()
    assert torch.equal(sd3.drop_text(cond, 3)["clip_l"], dropped["clip_l"])  # whatever was drawn in between
    assert not torch.equal(sd3.drop_text(cond, 4)["clip_l"], dropped["clip_l"])


def test_gradients_reach_the_encoders(models):
    sd3 = family(models["medium", "files"], apply_lg_attn_mask=True, apply_t5_attn_mask=True)
    encoders = load_encoders(sd3)
    for encoder in encoders.values():
        encoder.requires_grad_(True)
    cond = sd3.drop_text(sd3.encode_text(sd3.tokenize(CAPTIONS), encoders), 0)
    x_t, t = inputs()
    sd3.predict(sd3.load_denoiser(None, "cpu"), x_t, t, cond, None).square().sum().backward()
    for encoder in encoders.values():
        first = next(p for name, p in encoder.named_parameters() if name.endswith(("q_proj.weight", "q.weight")))
        assert first.grad.abs().max() > 0


def test_timesteps_reach_the_sinusoids_in_float32(models):
    """bf16 has 4 distinct numbers between 900 and 910; the model must see all 11."""
    sd3 = family(models["medium", "files"])
    denoiser = sd3.load_denoiser(torch.bfloat16, "cpu")
    seen = []
    denoiser.time_text_embed.timestep_embedder.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    t = torch.arange(900, 911) / 1000
    x_t = torch.randn(11, 16, 8, 8).bfloat16()
    with torch.no_grad():
        sd3.predict(denoiser, x_t, t, {}, None)
    assert seen[0].dtype == torch.bfloat16 and len(seen[0].unique(dim=0)) == 11


# ---- positions ------------------------------------------------------------------------------------------------------


def positions(denoiser, height, width):
    return denoiser.pos_embed.cropped_pos_embed(height, width)


def test_random_crops_only_while_training(models):
    options = models["5-medium", "files"]
    plain = family(options).load_denoiser(None, "cpu")
    cropped = family(options, pos_emb_random_crop_rate=0.5).load_denoiser(None, "cpu")
    middle = positions(plain, 8, 16)
    assert torch.equal(positions(cropped, 8, 16), middle)
    table = plain.pos_embed.pos_embed.view(24, 24, -1)
    places = {(y, x): table[y : y + 4, x : x + 8].reshape(1, 32, -1) for y in range(21) for x in range(17)}
    found = []
    for seed in range(200):
        choose_crop(cropped, seed)
        seen = positions(cropped, 8, 16)
        found.append(next(place for place, part in places.items() if torch.equal(part, seen)))
    assert 70 < found.count((10, 8)) < 130  # the middle, in half of the batches
    assert {min(y for y, _ in found), max(y for y, _ in found)} == {0, 20}
    assert {min(x for _, x in found), max(x for _, x in found)} == {0, 16}
    choose_crop(cropped, 0)
    with torch.no_grad():  # the untrained model sees what the trained one does
        assert torch.equal(positions(cropped, 8, 16), places[found[0]])
    choose_crop(cropped, None)
    assert torch.equal(positions(cropped, 8, 16), middle)


def test_scaled_positions_are_the_same_at_the_same_place(models):
    options = models["5-medium", "diffusers"]  # its configuration says: 8 patches, 16 latent pixels, are the base
    plain = family(options).load_denoiser(None, "cpu")
    scaled = family(options, enable_scaled_pos_embed=True).load_denoiser(None, "cpu")
    assert torch.equal(positions(scaled, 16, 16), positions(plain, 16, 16))
    table = plain.pos_embed.pos_embed.view(24, 24, -1)
    half = positions(scaled, 8, 8).view(4, 4, -1)
    for y in range(4):  # a patch of a picture half as large lies on four of the base picture's
        for x in range(4):
            four = table[8 + 2 * y : 10 + 2 * y, 8 + 2 * x : 10 + 2 * x].mean((0, 1))
            assert torch.allclose(half[y, x], four, atol=1e-6)
    wide = positions(scaled, 8, 32).view(4, 16, -1)  # the base picture's area: no stretching, another crop
    assert torch.allclose(wide, table[10:14, 4:20], atol=1e-6)
    twice = positions(scaled, 32, 32).view(16, 16, -1)
    expected = F.interpolate(table.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear")[0].permute(1, 2, 0)
    assert torch.allclose(twice, expected[16:32, 16:32], atol=1e-6)


@pytest.mark.parametrize("more", [{"pos_emb_random_crop_rate": 1.0}, {"enable_scaled_pos_embed": True}])
def test_position_options_change_the_prediction_and_nothing_in_the_file(models, tmp_path, more):
    options = models["5-medium", "diffusers"]
    plain, other = family(options), family(options, **more)
    torch.manual_seed(0)
    x_t, t = inputs(size=12)
    batch = Batch(["a"], ["b"], torch.ones(1), seed=0)
    one, two = (f.predict(f.load_denoiser(None, "cpu"), x_t, t, {}, batch) for f in (plain, other))
    assert one.shape == two.shape and not torch.allclose(one, two, atol=1e-4)
    for f, name in ((plain, "a"), (other, "b")):
        f.save(f.load_denoiser(None, "cpu"), {}, tmp_path / f"{name}.safetensors", CheckpointForm())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pytest.raises(ValueError, match="24 x 24 patches"):
        other.predict(other.load_denoiser(None, "cpu"), torch.randn(1, 16, 64, 8), t[:1], {}, None)


# ---- pictures, objective, facts -------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled(models):
    sd3 = family(models["medium", "single"])
    vae, pixels = sd3.load_vae(None, "cpu"), torch.rand(1, 3, 64, 64) * 2 - 1
    latent = sd3.encode_image(vae, pixels, [4])
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    sample = posterior.mean + posterior.std * torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(latent, (sample - 0.0609) * 1.5305, atol=1e-6)
    assert torch.allclose(sd3.scale_legacy(sample), latent, atol=1e-6)
    assert sd3.decode_latent(vae, latent).shape == (1, 3, 64, 64)


def test_objective_facts_and_fingerprints(models):
    one, other = family(models["medium", "single"]), family(models["5-medium", "single"], apply_t5_attn_mask=True)
    objective = one.objective(SD3FlowOptions(), LossOptions())
    assert objective.preview_shift((128, 128)) == 3.0
    assert (one.facts().base_model_version, one.facts().architecture) == ("medium", "stable-diffusion-3-medium")
    assert (other.facts().base_model_version, other.facts().architecture) == ("5-medium", "stable-diffusion-3-5-medium")
    prints = [one.text_fingerprint(name) for name in ENCODERS]
    assert len(set(prints)) == 3
    masked = family(models["medium", "single"], apply_t5_attn_mask=True)
    assert [masked.text_fingerprint(n) == old for n, old in zip(ENCODERS, prints, strict=True)] == [True, True, False]
    files = family(models["medium", "files"])
    assert [files.text_fingerprint(name) for name in ENCODERS] == prints  # the same contents from other files
    assert files.vae_fingerprint() == one.vae_fingerprint()


# ---- full training --------------------------------------------------------------------------------------------------


def test_which_parts_learn(models):
    sd3 = family(models["medium", "single"])
    parts = lambda **options: sd3.learning_parts(SD3FineTuneOptions(**options))
    assert parts() == {"denoiser": None}
    assert parts(train_text_encoder=True) == {"denoiser": None, "clip_l": None, "clip_g": None}
    assert parts(train_text_encoder=True, learning_rate_te1=0.0, learning_rate_te2=1e-6) == {
        "denoiser": None,
        "clip_g": 1e-6,
    }
    assert parts(train_t5xxl=True, learning_rate_te3=1e-7) == {"denoiser": None, "t5xxl": 1e-7}


def test_last_blocks_stay_frozen(models):
    sd3 = family(models["5-medium", "single"])
    denoiser = sd3.load_denoiser(None, "cpu")
    (group,) = sd3.denoiser_groups(denoiser, SD3FineTuneOptions(num_last_block_to_freeze=2), 1e-5)
    learning = {name for name, p in denoiser.named_parameters() if any(p is q for q in group["params"])}
    frozen = {name for name, _ in denoiser.named_parameters()} - learning
    assert {name.split(".")[1] for name in frozen} == {"1", "2"}
    assert all(name.startswith("transformer_blocks.") for name in frozen)
    assert sum(name.startswith("transformer_blocks.0.") for name in learning) > 20
    assert group["lr"] == 1e-5 and "proj_out.weight" in learning
    everything = sd3.denoiser_groups(denoiser, SD3FineTuneOptions(), 1e-5)[0]["params"]
    assert len(everything) == len(list(denoiser.parameters()))
    with pytest.raises(UserError, match="the model has 3 blocks"):
        sd3.denoiser_groups(denoiser, SD3FineTuneOptions(num_last_block_to_freeze=4), 1e-5)
    assert len(sd3.blocks(denoiser)) == 3


# ---- bad input ------------------------------------------------------------------------------------------------------


def broken(models, tmp_path, change):
    """The options of a single file after `change` of its tensors."""
    tensors = load_file(models["medium", "single"]["pretrained_model_name_or_path"])
    path = tmp_path / "m.safetensors"
    save_file(change(tensors), path)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (tmp_path / name).symlink_to(models["medium", "single"]["pretrained_model_name_or_path"].parent / name)
    return {**models["medium", "single"], "pretrained_model_name_or_path": path}


def without(*starts):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(starts)}


LAST = "model.diffusion_model.joint_blocks.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("first_stage_model."), "has no VAE inside: give one with --vae"),
        (without("text_encoders."), "has no text encoders inside: give --clip_l, --clip_g and --t5xxl"),
        (without("model.diffusion_model.context_embedder"), "is incomplete: it lacks context_embedder.weight"),
        (without(f"{LAST}x_block.mlp"), r"4 weights of the MMDiT are missing .*joint_blocks.1.x_block.mlp"),
        (without("model.diffusion_model."), "is a"),
    ],
)
def test_files_with_something_missing(models, tmp_path, change, message):
    sd3 = family(broken(models, tmp_path, change))
    with pytest.raises(UserError, match=message) as error:
        sd3.check()
        sd3.load_denoiser(None, "cpu")
    assert len(error.value.problems) == 1 and str(tmp_path) in str(error.value)


def test_wrong_files_and_folders(models, tmp_path):
    options = models["medium", "files"]

    def problem(**values):
        with pytest.raises(UserError) as error:
            family(options, **values).check()
        (line,) = error.value.problems
        return line

    assert "use train_network.py" in problem(pretrained_model_name_or_path=sd1(tmp_path))
    assert "LoRA" in problem(pretrained_model_name_or_path=lora(tmp_path))
    assert "--vae" in problem(pretrained_model_name_or_path=options["vae"])
    assert "text encoder" in problem(pretrained_model_name_or_path=options["t5xxl"])
    assert "does not exist" in problem(clip_l=tmp_path / "nothing.safetensors")
    assert problem(t5xxl=options["clip_l"]).startswith("--t5xxl:")
    assert problem(clip_g=options["t5xxl"]).startswith("--clip_g:")
    assert "CLIP states 80 wide" in problem(clip_g=options["clip_l"])
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no folder of SD3" in problem(pretrained_model_name_or_path=folder)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "FLUX" in problem(pretrained_model_name_or_path=folder)


def sd1(folder):
    path = folder / "sd1.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, path)
    return path


def lora(folder):
    path = folder / "lora.safetensors"
    save_file({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(4, 4)}, path)
    return path


def test_what_is_to_learn_must_be_there(models, tmp_path):
    sd3 = family(broken(models, tmp_path, without("text_encoders.t5xxl.", "text_encoders.clip_g.")))
    with pytest.raises(UserError, match="give --clip_g, or learning rate 0"):
        sd3.learning_parts(SD3FineTuneOptions(train_text_encoder=True))
    assert sd3.learning_parts(SD3FineTuneOptions(train_text_encoder=True, learning_rate_te2=0)).keys() == {
        "denoiser",
        "clip_l",
    }
    with pytest.raises(UserError, match="give --t5xxl, or"):
        sd3.learning_parts(SD3FineTuneOptions(train_t5xxl=True))


def options_of(*argv):
    groups = {"model": SD3Options, "objective": SD3FlowOptions}
    given = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--dataset_config", "d.toml", *argv]
    return resolve(NetworkTrainerOptions, groups, given, prog="test")


def test_options_are_honoured_answered_or_refused():
    found = options_of("--clip_skip", "2", "--save_clip", "--t5xxl_device", "cuda", "--max_token_length", "150")
    flags = {answer.split(":")[0] for answer in found.answers}
    assert flags == {"--clip_skip", "--save_clip", "--t5xxl_device", "--max_token_length"}
    for argv, message in (
        (["--v2"], "this is no Stable Diffusion 2.x"),
        (["--v_parameterization"], "flow matching"),
        (["--weighted_captions"], "brackets are ordinary text"),
        (["--clip_l_dropout_rate", "1.5"], "between 0 and 1"),
        (["--pos_emb_random_crop_rate", "0.5", "--enable_scaled_pos_embed"], "exclude each other"),
    ):
        with pytest.raises(UserError, match=message):
            options_of(*argv)


def test_the_untrained_model_sees_what_the_trained_one_does(tmp_path):
    """Text dropout and position crops are drawn once for both predictions: a network without effect has loss 0."""
    keep = {"custom_attributes": {"diff_output_preservation": True}}
    data = write_dataset(tmp_path / "d.toml", subset(make_pictures(tmp_path / "p", 4), **keep))
    drops = {f"{name}_dropout_rate": 0.5 for name in ("clip_l", "clip_g", "t5")}
    run = train(
        None, data, tmp_path / "run", family="sd3", network_module=None, network_dropout=0.3, max_train_steps=6,
        pos_emb_random_crop_rate=1.0, **drops, **make(tmp_path / "model"),
    )  # fmt: skip
    assert run.losses == [0.0] * 6
