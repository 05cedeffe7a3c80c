# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 and Chroma: every way to load, what texts and pictures become, what is predicted and what is saved."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.chroma.parts import CHROMA
from library.families.flux.model import pack, picture_ids, unpack
from library.families.flux.options import FluxFlowOptions, FluxOptions
from library.families.flux.parts import FLUX, PUBLISHED, denoiser_rules, rotary_axes, sizes
from library.families.registry import FAMILIES, open_family
from library.io.checkpoint import CheckpointForm
from library.key_tables import publish
from library.memory.checkpointing import Recomputation
from library.objectives.flow import resolution_shift
from library.objectives.options import LossOptions
from library.options import resolve
from library.weights.kl_vae import build_vae
from library.weights.loading import build_empty, shipped_config
from library.weights.vae_names import vae_rules
from tests.families import flux as tiny
from tests.tiny import make_tiny_sd

FACTS = Path(__file__).parents[1] / "data_files" / "weights"
CAPTIONS = ["a photo of a cat", "red dog"]
LAYOUTS = ("files", "comfy", "whole", "diffusers", "transformer", "file", "parts")
VARIANTS = ("dev", "schnell", "chroma")
LENGTH = {"t5xxl_max_token_length": 24}


def shapes_of(name):
    """Name -> shape of a published file of full size."""
    content = json.loads(gzip.decompress((FACTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in content.items()}


def family(options, **more):
    values = {**options, **more}
    given = FluxOptions(**{k: str(v) if isinstance(v, Path) else v for k, v in values.items()})
    return open_family(FAMILIES["flux"], given)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(variant, layout) -> options."""
    root = tmp_path_factory.mktemp("flux")
    made = {}

    def get(variant="dev", layout="files"):
        if (variant, layout) not in made:
            made[variant, layout] = tiny.make(root / f"{variant}_{layout}", variant=variant, layout=layout, **LENGTH)
        return made[variant, layout]

    return get


def load_all(flux, dtype=None):
    encoders = {name: flux.load_text_encoder(name, dtype, "cpu") for name in flux.encoders}
    return {"denoiser": flux.load_denoiser(dtype, "cpu"), "ae": flux.load_vae(dtype, "cpu"), **encoders}


def made_modules(variant):
    """What `tiny.make` writes, by name."""
    return {"denoiser": tiny.tiny_denoiser(variant), "ae": tiny.tiny_vae()}


def latents(count=2, height=8, width=12):
    return torch.randn(count, 16, height, width, generator=torch.Generator().manual_seed(0))


def encode(flux, captions=CAPTIONS):
    encoders = {name: flux.load_text_encoder(name, None, "cpu") for name in flux.encoders}
    with torch.no_grad():
        return flux.encode_text(flux.tokenize(list(captions)), encoders)


# ---- published names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux_dev_output", "flux_schnell_output", "chroma_input", "flux_ae_input"])
def test_names_and_shapes_at_full_size(name):
    """Ours on the meta device equal the published ones, and the configuration is read from those."""
    shapes = shapes_of(name)
    if name == "flux_ae_input":
        module, rules = build_empty(lambda: build_vae(shipped_config("flux_ae"))), vae_rules
    else:
        design = CHROMA if name == "chroma_input" else FLUX
        config = shipped_config(design.family) | {"guidance_embeds": "schnell" not in name}
        assert {**config, **sizes(shapes, PUBLISHED), **design.sizes(shapes, PUBLISHED)} == config
        module, rules = build_empty(lambda: design.build(config)), denoiser_rules
    found = publish(module.state_dict(), rules(module))
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == shapes


@pytest.mark.parametrize(("head", "axes"), [(128, [16, 56, 56]), (16, [4, 6, 6]), (64, [8, 28, 28])])
def test_rotary_axes(head, axes):
    assert rotary_axes(head) == axes
    assert sum(axes) == head


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_loads_bit_equal_and_frozen(models, variant, layout):
    flux = family(models(variant, layout))
    flux.check()
    loaded = load_all(flux)
    assert flux.variant is flux.sheet.variants[variant] and flux.name == ("chroma" if variant == "chroma" else "flux")
    assert flux.encoders == (("t5xxl",) if variant == "chroma" else ("clip_l", "t5xxl"))
    for name, made in made_modules(variant).items():
        a, b = loaded[name].state_dict(), made.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in loaded.values())


def test_text_encoders_are_the_same_from_every_layout(models):
    first, *others = (encode(family(models("dev", layout))) for layout in ("files", "whole", "diffusers"))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("layout", ["files", "comfy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_published_file_comes_out_bit_equal(models, tmp_path, variant, layout):
    options = models(variant, layout)
    flux = family(options)
    flux.save(flux.load_denoiser(None, "cpu"), {}, tmp_path / "m.safetensors", CheckpointForm(metadata={"a": "b"}))
    source, result = load_file(options["pretrained_model_name_or_path"]), load_file(tmp_path / "m.safetensors")
    prefix = "model.diffusion_model." if layout == "comfy" else ""
    assert {name.removeprefix(prefix) for name in source} == set(result)
    assert all(torch.equal(tensor, source[prefix + name]) for name, tensor in result.items())
    vae = flux.load_vae(None, "cpu")
    source, result = load_file(options["ae"]), publish(vae.state_dict(), vae_rules(vae))
    assert source.keys() == result.keys()
    assert all(torch.equal(tensor, source[name]) for name, tensor in result.items())


def test_save_casts_and_loads_again(models, tmp_path):
    options, path = models("dev", "diffusers"), tmp_path / "m.safetensors"
    flux = family(options)
    denoiser = flux.load_denoiser(None, "cpu")
    flux.save(denoiser, {}, path, CheckpointForm(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    again = family(models("dev", "files"), pretrained_model_name_or_path=path).load_denoiser(None, "cpu").state_dict()
    assert all(torch.equal(again[name], tensor.bfloat16()) for name, tensor in denoiser.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_half_and_8_bit_files(models, tmp_path, dtype):
    options = models()
    path = tmp_path / "m.safetensors"
    tensors = {n: t.to(dtype) for n, t in load_file(options["pretrained_model_name_or_path"]).items()}
    save_file(tensors, path)
    flux = family(options, pretrained_model_name_or_path=path)
    stored = torch.bfloat16 if dtype.itemsize == 1 else dtype
    assert {p.dtype for p in flux.load_denoiser(None, "cpu").parameters()} == {stored}
    wanted = flux.load_denoiser(torch.bfloat16, "cpu").get_parameter("x_embedder.weight")
    assert torch.equal(wanted, tensors["img_in.weight"].to(torch.bfloat16))
    cond, t = encode(flux), torch.tensor([0.3, 0.9])
    denoisers = [flux.load_denoiser(torch.float32, "cpu", storage=storage) for storage in ("plain", "half")]
    with torch.no_grad():
        assert torch.equal(*[flux.predict(denoiser, latents(), t, cond, None) for denoiser in denoisers])


def test_parts_with_an_index_and_all_in_one_with_its_autoencoder(models, tmp_path):
    options = models()
    names = [path.name for path in Path(models("dev", "parts")["pretrained_model_name_or_path"]).parent.glob("model-*")]
    folder = Path(models("dev", "parts")["pretrained_model_name_or_path"]).parent
    places = {key: name for name in names for key in load_file(folder / name)}
    for name in names:
        (tmp_path / name).symlink_to(folder / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    loaded = family(options, pretrained_model_name_or_path=index).load_denoiser(None, "cpu").state_dict()
    assert all(torch.equal(t, loaded[name]) for name, t in tiny.tiny_denoiser("dev").state_dict().items())
    whole = models("dev", "whole")
    tensors = load_file(whole["pretrained_model_name_or_path"])
    tensors |= {f"vae.{name}": tensor for name, tensor in load_file(whole["ae"]).items()}
    save_file(tensors, tmp_path / "all.safetensors")
    for tokenizer in Path(whole["ae"]).parent.glob("tokenizer*"):
        (tmp_path / tokenizer.name).symlink_to(tokenizer)
    flux = family({"pretrained_model_name_or_path": tmp_path / "all.safetensors"})
    flux.check()
    loaded = flux.load_vae(None, "cpu").state_dict()
    assert all(torch.equal(t, loaded[name]) for name, t in tiny.tiny_vae().state_dict().items())


def test_a_vae_is_kept_in_float32_if_asked(models):
    assert family(models(), no_half_vae=True).load_vae(torch.float16, "cpu").dtype == torch.float32
    assert family(models()).load_vae(torch.float16, "cpu").dtype == torch.float16


# ---- text -----------------------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_model(models):
    def lengths(variant, **more):
        options = {k: v for k, v in models(variant, "diffusers").items() if k not in LENGTH}
        flux = family(options, **more)
        return flux.tokenize(["cat"]).ids["t5xxl"].shape[1], flux.token_limit

    assert [lengths(variant) for variant in VARIANTS] == [(512, 511), (256, 255), (512, 511)]
    assert lengths("schnell", t5xxl_max_token_length=300) == (300, 299)


def test_only_what_t5_cuts_is_truncated(models):
    flux = family(models(), t5xxl_max_token_length=8)
    tokens = flux.tokenize(["cat " * 7, "cat " * 8])
    assert tokens.truncated == (1,)
    assert flux.count_tokens(["cat " * 8, "red dog"]) == [8, 2]
    assert family(models(), t5xxl_max_token_length=200).tokenize(["cat " * 150]).truncated == ()  # CLIP reads 75


def test_padding_stays_unless_it_is_masked(models):
    plain, masked = encode(family(models())), encode(family(models(), apply_t5_attn_mask=True))
    assert {name: tuple(tensor.shape) for name, tensor in plain.items()} == {
        "clip_l_pooled": (2, tiny.POOLED_WIDTH),
        "t5xxl": (2, 24, tiny.TEXT_WIDTH),
    }
    flux = family(models())
    lengths = [count + 1 for count in flux.count_tokens(CAPTIONS)]  # the end token
    assert masked["t5xxl_mask"].sum(1).tolist() == lengths
    assert masked["t5xxl"].shape[1] == masked["t5xxl_mask"].shape[1] == max(lengths) < 24
    assert not masked["t5xxl"][~masked["t5xxl_mask"]].any()


def test_chroma_sees_one_token_of_the_padding(models):
    flux = family(models("chroma", "diffusers"))
    words = torch.tensor(flux.tokenize(CAPTIONS).lengths["t5xxl"])
    cond = encode(flux)
    assert cond["t5xxl_mask"].sum(1).tolist() == (words + 1).tolist()
    assert encode(flux, ["cat " * 40])["t5xxl_mask"].sum(1).tolist() == [24]  # no padding there


@pytest.mark.parametrize(("variant", "masked"), [("dev", False), ("dev", True), ("chroma", False)])
def test_split_and_joined_conditions_are_the_same(models, variant, masked):
    flux = family(models(variant), apply_t5_attn_mask=masked)
    cond = encode(flux)
    parts = flux.split_cond(cond)
    if masked or variant == "chroma":
        assert len(parts[0]["t5xxl"]) > len(parts[1]["t5xxl"])
        assert all(part["t5xxl_mask"].all() and len(part["t5xxl"]) == len(part["t5xxl_mask"]) for part in parts)
    joined = flux.join_conds(parts)
    assert joined.keys() == cond.keys()
    assert all(torch.equal(joined[name], cond[name]) for name in cond)


def test_fingerprints_change_with_what_they_depend_on(models):
    base = family(models())
    others = [family(models(), apply_t5_attn_mask=True), family(models(), t5xxl_max_token_length=32)]
    assert len({flux.text_fingerprint("t5xxl") for flux in (base, *others)}) == 3
    assert len({flux.text_fingerprint("clip_l") for flux in (base, *others)}) == 1
    assert base.vae_fingerprint() == others[0].vae_fingerprint() != base.text_fingerprint("clip_l")


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "masked"), [("dev", False), ("dev", True), ("schnell", False), ("chroma", False)])
def test_predicts_as_plain_diffusers(models, variant, masked):
    """Texts of different length in one batch, oblong pictures, two times."""
    options = models(variant, "diffusers") | {"guidance_scale": 2.0, "apply_t5_attn_mask": masked}
    flux, x, t = family(options), latents(), torch.tensor([0.3, 0.9])
    folder = Path(options["pretrained_model_name_or_path"])
    texts = (tiny.chroma_texts if variant == "chroma" else tiny.flux_texts)(folder, options, CAPTIONS, {})
    denoiser = tiny.tiny_denoiser(variant)
    with torch.no_grad():
        expected = tiny.forward(denoiser, dict(denoiser.state_dict()), x, t, texts, options)
        found = flux.predict(flux.load_denoiser(None, "cpu"), x, t, encode(flux), None)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("variant", ["dev", "chroma"])
def test_a_caption_is_the_same_alone_and_beside_a_longer_one(models, variant):
    flux = family(models(variant), apply_t5_attn_mask=True)
    denoiser, x, t = flux.load_denoiser(None, "cpu"), latents(), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        both = flux.predict(denoiser, x, t, encode(flux), None)
        alone = [flux.predict(denoiser, x[i : i + 1], t[i : i + 1], encode(flux, [CAPTIONS[i]]), None) for i in (0, 1)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=2e-6)


def test_guidance_is_the_prompts_else_the_options(models):
    x, t = latents(1), torch.tensor([0.5])
    low, high = family(models(), guidance_scale=1.0), family(models(), guidance_scale=7.0)
    denoiser, cond = low.load_denoiser(None, "cpu"), encode(low, ["cat"])
    with torch.no_grad():
        told = low.predict(denoiser, x, t, cond | {"guidance": torch.tensor([7.0])}, None)
        assert torch.equal(told, high.predict(denoiser, x, t, cond, None))
        assert not torch.equal(told, low.predict(denoiser, x, t, cond, None))
        schnell = family(models("schnell"))
        answers = [
            schnell.predict(schnell.load_denoiser(None, "cpu"), x, t, cond | more, None)
            for more in ({}, {"guidance": torch.tensor([7.0])})
        ]
        assert torch.equal(*answers)  # it has none


@pytest.mark.parametrize("variant", ["dev", "chroma"])
def test_consecutive_times_differ_in_bfloat16(models, variant):
    """diffusers alone leaves 4 of 11: it rounds before it embeds."""
    flux = family(models(variant))
    embedded = []

    def keep(module, args, result):
        embedded.append(result)

    denoiser = flux.load_denoiser(torch.bfloat16, "cpu")
    plain = tiny.tiny_denoiser(variant).to(torch.bfloat16)
    cond = {k: v if v.dtype == torch.bool else v.bfloat16() for k, v in encode(flux, ["cat"]).items()}
    for module in (denoiser, plain):
        module.time_text_embed.time_proj.register_forward_hook(keep)
        embedded.clear()
        with torch.no_grad():
            for k in range(900, 911):
                flux.predict(module, latents(1).bfloat16(), torch.tensor([k / 1000]), cond, None)
        times = {tuple(result[0].float().tolist()) for result in embedded[:: 2 if variant == "dev" else 1]}
        assert len(times) == (11 if module is denoiser else 4)


@pytest.mark.parametrize("variant", ["dev", "chroma"])
def test_checkpointed_gradients_are_the_same_with_padding(models, variant):
    """diffusers' own recomputation forgets Chroma's mask in single blocks."""
    flux = family(models(variant), apply_t5_attn_mask=True)
    cond, found = encode(flux), []
    for recompute in (False, True):
        denoiser = flux.load_denoiser(None, "cpu").requires_grad_(True)
        if recompute:
            Recomputation(flux.blocks(denoiser)).set_budget(0)
        answer = flux.predict(denoiser, latents(), torch.tensor([0.3, 0.9]), cond, None)
        answer.square().sum().backward()
        found.append((answer, {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}))
    (plain, gradients), (again, recomputed) = found
    assert torch.equal(plain, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.allclose(gradients[n], recomputed[n], rtol=1e-5, atol=1e-6) for n in gradients)


def test_blocks_in_the_order_in_which_they_run(models):
    flux = family(models())
    denoiser = flux.load_denoiser(None, "cpu")
    order = []
    for block in flux.blocks(denoiser):
        block.register_forward_hook(lambda module, args, result: order.append(module))
    with torch.no_grad():
        flux.predict(denoiser, latents(1), torch.tensor([0.5]), encode(flux, ["cat"]), None)
    assert order == flux.blocks(denoiser)
    assert len(order) == tiny.DOUBLE + tiny.SINGLE


def test_tokens_of_pictures():
    x = latents()
    tokens = pack(x)
    assert tokens.shape == (2, 24, 64)
    row, column, channel = 3, 5, 7
    square = x[1, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[1, row * 6 + column, 4 * channel : 4 * channel + 4], square.flatten())
    assert torch.equal(unpack(tokens, 8, 12), x)
    assert picture_ids(4, 6, x.device)[row * 6 + column].tolist() == [0, row, column]


# ---- pictures, objective, facts -------------------------------------------------------------------------------------


def test_latents_are_shifted_and_scaled(models):
    flux, pixels = family(models()), torch.rand(1, 3, 64, 64) * 2 - 1
    vae = flux.load_vae(None, "cpu")
    found = flux.encode_image(vae, pixels, [5])
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, (posterior.mean + posterior.std * noise - 0.1159) * 0.3611)
    assert torch.equal(flux.scale_legacy(found), found)
    with torch.no_grad():
        expected = vae.decode(found / 0.3611 + 0.1159).sample.clamp(-1, 1)
    torch.testing.assert_close(flux.decode_latent(vae, found), expected)


def test_previews_are_shifted_by_size_but_for_schnell(models):
    def second(variant):
        objective = family(models(variant)).objective(FluxFlowOptions(), LossOptions())
        return float(objective.sampler("euler", 4, size=(128, 128)).timesteps[1])

    k = resolution_shift((128, 128))
    assert second("schnell") == pytest.approx(0.75)
    assert second("dev") == second("chroma") == pytest.approx(0.75 * k / (1 + (k - 1) * 0.75))


def test_facts_and_previews(models):
    def facts(variant):
        flux = family(models(variant))
        f = flux.facts()
        return f.base_model_version, f.architecture, f.implementation, f.prediction_type, flux.preview.guidance

    code = "https://github.com/black-forest-labs/flux"
    assert facts("dev") == ("flux1", "flux-1-dev", code, None, 3.5)
    assert facts("schnell") == ("flux1", "flux-1-schnell", code, None, None)
    assert facts("chroma") == ("chroma", "chroma", "https://huggingface.co/lodestones/Chroma", None, None)
    options = models()
    names = {"sd_model": "pretrained_model_name_or_path", "vae": "ae"}
    assert family(options).model_names() == {kind: str(options[name]) for kind, name in names.items()}


# ---- what is wrong is said in one line ------------------------------------------------------------------------------


def refusal(options, **more):
    with pytest.raises(UserError) as caught:
        family(options, **more).check()
    assert all("\n" not in problem for problem in caught.value.problems)
    return "; ".join(caught.value.problems)


def change(options, path, edit):
    """The denoiser's file with other tensors."""
    tensors = load_file(options["pretrained_model_name_or_path"])
    edit(tensors)
    save_file(tensors, path)
    return options | {"pretrained_model_name_or_path": path}


@pytest.mark.parametrize("layout", ["files", "diffusers"])
def test_flux_and_chroma_name_each_others_option(models, layout):
    chroma, flux = models("chroma", layout), models("dev", layout)
    assert "a Chroma checkpoint: use flux_train_network.py --model_type chroma" in refusal(
        flux | {"pretrained_model_name_or_path": chroma["pretrained_model_name_or_path"]}
    )
    assert "a FLUX.1 model: leave out --model_type chroma" in refusal(
        chroma | {"pretrained_model_name_or_path": flux["pretrained_model_name_or_path"]}
    )


def test_other_models(models, tmp_path):
    options = models()
    wrong = {
        "an SDXL checkpoint: use sdxl_train_network.py": {"label_emb.0.0.weight": torch.zeros(1)},
        "a LoRA or other adapter": {"lora_unet_x.lora_down.weight": torch.zeros(1)},
        "a VAE, not a checkpoint: it belongs to --ae": load_file(options["ae"]),
        "a text encoder": load_file(options["t5xxl"]),
        "it has no denoiser inside": {"x": torch.zeros(1)},
    }
    for answer, tensors in wrong.items():
        save_file(tensors, tmp_path / "m.safetensors")
        assert answer in refusal(options, pretrained_model_name_or_path=tmp_path / "m.safetensors")
    sd = {layout: make_tiny_sd(tmp_path / layout, layout=layout) for layout in ("single", "diffusers")}
    for path in sd.values():
        answer = refusal(options, pretrained_model_name_or_path=path)
        assert answer.endswith("a Stable Diffusion 1.x or 2.x checkpoint: use train_network.py")
    assert "does not exist" in refusal(options, pretrained_model_name_or_path=tmp_path / "none.safetensors")


def test_every_missing_part_is_named(models):
    options = {"pretrained_model_name_or_path": models()["pretrained_model_name_or_path"]}
    problems = refusal(options)
    assert all(f"{name} is missing" in problems for name in ("--clip_l", "--t5xxl", "--ae"))
    chroma = models("chroma")
    del (options := dict(chroma))["t5xxl"]
    assert refusal(options).startswith("--t5xxl is missing")


def test_incomplete_and_unusual_files(models, tmp_path):
    options, path = models(), tmp_path / "m.safetensors"
    gone = "single_blocks.1.linear1.weight"
    flux = family(change(options, path, lambda tensors: tensors.pop(gone)))
    with pytest.raises(UserError, match=gone):
        flux.load_denoiser(None, "cpu")
    changed = change(options, path, lambda tensors: tensors.pop("txt_in.weight"))
    assert "is incomplete: it lacks txt_in.weight" in refusal(changed)
    fill = change(options, path, lambda tensors: tensors.update({"img_in.weight": torch.zeros(tiny.WIDTH, 384)}))
    assert "is a FLUX.1 Fill model (384 numbers per token, not 64): add --model_type fill" in refusal(fill)
    parts = Path(models("dev", "parts")["pretrained_model_name_or_path"])
    (tmp_path / parts.name).symlink_to(parts)
    lone = refusal(options, pretrained_model_name_or_path=tmp_path / parts.name)
    assert "model-00002-of-00003.safetensors" in lone


def test_encoders_in_the_wrong_place(models):
    options = models()
    assert refusal(options, clip_l=options["t5xxl"]).startswith("--clip_l: ")
    assert refusal(options, t5xxl=options["clip_l"]).startswith("--t5xxl: ")
    assert "has no VAE inside" in refusal(options, ae=options["clip_l"])


def test_options():
    from dataclasses import dataclass, field

    @dataclass(frozen=True)
    class Method:
        model: FluxOptions = field(default_factory=FluxOptions)

    def problems(*argv):
        with pytest.raises(UserError) as caught:
            resolve(Method, {}, ["--pretrained_model_name_or_path", "x", *argv], prog="x")
        return "; ".join(caught.value.problems)

    assert "--clip_l: Chroma has no CLIP" in problems("--model_type", "chroma", "--clip_l", "x")
    for option in ("--v2", "--v_parameterization", "--weighted_captions"):
        assert f"{option} has no meaning here" in problems(option)
    assert "--ae" in problems("--vae", "x")
    argv = ["--pretrained_model_name_or_path", "x", "--clip_skip", "1", "--max_token_length", "75", "--split_mode"]
    resolved = resolve(Method, {}, argv, prog="x")
    assert {line.split(":")[0] for line in resolved.answers} == {"--split_mode", "--clip_skip", "--max_token_length"}


def test_the_tool_for_random_files(tmp_path, capsys):
    """tools/make_random_flux.py writes what loads and predicts."""
    from tools.make_random_flux import main

    main(["--tiny", "--double", "1", "--single", "2", "--t5_layers", "1", "--output", str(tmp_path)])
    paths = {Path(line).stem: line for line in capsys.readouterr().out.split()}
    flux = family({"pretrained_model_name_or_path": paths.pop("flux"), **paths})
    flux.check()
    modules = load_all(flux)
    assert {p.dtype for p in modules["denoiser"].parameters()} == {torch.bfloat16}
    with torch.no_grad():
        cond = flux.encode_text(flux.tokenize(["a cat"]), {n: modules[n].float() for n in flux.encoders})
        found = flux.predict(flux.load_denoiser(torch.float32, "cpu"), latents(1), torch.tensor([0.5]), cond, None)
    assert torch.isfinite(found).all() and found.std() > 0
