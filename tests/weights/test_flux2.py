# SPDX-License-Identifier: Apache-2.0
"""FLUX.2: every way to load, what texts and pictures become, what is predicted and saved, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.flux.parts import PUBLISHED, sizes
from library.families.flux2 import SHEET, VARIANTS
from library.families.flux2.model import preview_shift
from library.families.flux2.options import Flux2FlowOptions, Flux2Options
from library.families.flux2.parts import FLUX2, build_flux2, denoiser_rules
from library.families.registry import open_family
from library.io.checkpoint import CheckpointForm
from library.key_tables import publish
from library.memory.checkpointing import Recomputation
from library.objectives.options import LossOptions
from library.options import resolve
from library.weights.flux2_vae import vae_part
from library.weights.loading import build_empty, shipped_config
from networks import lora_flux2
from tests.adapters.families import full_models
from tests.families import flux as flux1
from tests.families import flux2 as tiny
from tests.tiny_text import make_mistral, make_qwen3

CAPTIONS = ["a photo of a cat", "red dog"]
ENCODER = "text_encoder"


def family(options, **more):
    values = {**options, **more}
    return open_family(SHEET, Flux2Options(**{k: str(v) if isinstance(v, Path) else v for k, v in values.items()}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(variant, layout) -> options."""
    root = tmp_path_factory.mktemp("flux2")
    made = {}

    def get(variant="klein", layout="files"):
        if (variant, layout) not in made:
            made[variant, layout] = tiny.make(root / f"{variant}_{layout}", variant=variant, layout=layout)
        return made[variant, layout]

    return get


def encode(flux2, captions=CAPTIONS):
    with torch.no_grad():
        return flux2.encode_text(flux2.tokenize(captions), {ENCODER: flux2.load_text_encoder(ENCODER, None, "cpu")})


def latents(count=2, height=4, width=6):
    return torch.randn(count, 128, height, width, generator=torch.Generator().manual_seed(0))


# ---- full size ------------------------------------------------------------------------------------------------------

FULL = {  # variant -> parameters of the denoiser, adapted layers
    "klein-4b": (3_875_544_576, 80),
    "klein-9b": (9_078_581_248, 112),
    "dev": (32_223_281_152, 160),
}


@pytest.mark.parametrize("variant", FULL)
def test_names_and_shapes_at_full_size(variant):
    """Ours on the meta device equal the published ones, and the configuration is read from those."""
    shapes = tiny.published_shapes(*tiny.PUBLISHED[variant])
    config = {**shipped_config("flux2"), **sizes(shapes, PUBLISHED), **FLUX2.sizes(shapes, PUBLISHED)}
    module = build_empty(lambda: build_flux2(config))
    found = publish(module.state_dict(), denoiser_rules(module))
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == shapes
    _, theirs = full_models(f"flux2_{variant.replace('-', '_')}")
    assert {n: p.shape for n, p in module.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    network = lora_flux2.create_network(1.0, 16, 16, None, None, module)
    assert (sum(p.numel() for p in module.parameters()), len(network.named_layers())) == FULL[variant]
    assert {name.split("_")[2] for name in network.named_layers()} == {"double", "single"}


# ---- loading and saving ---------------------------------------------------------------------------------------------

EVERY = [("klein", n) for n in ("files", "comfy", "whole", "diffusers", "transformer", "file")]
EVERY += [("dev", n) for n in ("comfy", "whole", "diffusers")]


@pytest.mark.parametrize(("variant", "layout"), EVERY)
def test_every_layout_loads_bit_equal_and_frozen(models, variant, layout):
    flux2 = family(models(variant, layout))
    flux2.check()
    flux2.check_weights()
    assert flux2.variant is VARIANTS["klein-4b" if variant == "klein" else "dev"]
    loaded = {"denoiser": flux2.load_denoiser(None, "cpu"), "ae": flux2.load_vae(None, "cpu")}
    for name, made in {"denoiser": tiny.tiny_denoiser(variant), "ae": tiny.tiny_vae()}.items():
        ours, theirs = loaded[name].state_dict(), made.state_dict()
        assert ours.keys() == theirs.keys() and not loaded[name].training
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if "num_batches" not in key)
        assert not any(p.requires_grad for p in loaded[name].parameters())
    assert torch.equal(encode(flux2)[ENCODER], encode(family(models(variant, "diffusers")))[ENCODER])


@pytest.mark.parametrize(("variant", "layout"), [("klein", "files"), ("dev", "comfy")])
def test_published_files_come_out_bit_equal(models, tmp_path, variant, layout):
    options = models(variant, layout)
    flux2 = family(options)
    flux2.save(flux2.load_denoiser(None, "cpu"), {}, tmp_path / "m.safetensors", CheckpointForm(metadata={"a": "b"}))
    source, result = load_file(options["pretrained_model_name_or_path"]), load_file(tmp_path / "m.safetensors")
    prefix = "model.diffusion_model." if layout == "comfy" else ""
    assert {name.removeprefix(prefix) for name in source} == set(result)
    assert all(torch.equal(tensor, source[prefix + name]) for name, tensor in result.items())
    part, source = flux2.part("vae"), load_file(options["ae"])
    result = publish(flux2.load_vae(None, "cpu").state_dict(), part.rules(part.blank()))
    assert {name for name in source if "num_batches" not in name} == set(result)
    assert all(torch.equal(tensor, source[name]) for name, tensor in result.items())
    text, source = flux2.part(ENCODER), load_file(options[ENCODER])
    result = flux2.parts.encoders[ENCODER].published(text.load(None, "cpu"))
    read = {name: tensor for name, tensor in source.items() if name.removeprefix("model.") in result}
    assert len(read) == len(result) > 200
    assert all(torch.equal(tensor, result[name.removeprefix("model.")]) for name, tensor in read.items())


def test_half_and_8_bit_files(models, tmp_path):
    options, path = models(), tmp_path / "m.safetensors"
    for dtype, loaded in ((torch.float8_e4m3fn, torch.bfloat16), (torch.float16, torch.float16)):
        tensors = {n: t.to(dtype) for n, t in load_file(options["pretrained_model_name_or_path"]).items()}
        save_file(tensors, path)
        denoiser = family(options, pretrained_model_name_or_path=path).load_denoiser(None, "cpu")
        assert {p.dtype for p in denoiser.parameters()} == {loaded}
        assert torch.equal(denoiser.x_embedder.weight, tensors["img_in.weight"].to(loaded))


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_texts_are_those_of_the_pipelines(models, variant):
    """States of padding too; what lies above the last layer that is read is not loaded."""
    options = models(variant, "diffusers")
    flux2 = family(options)
    found = encode(flux2, ["", *CAPTIONS])
    with torch.no_grad():
        expected = tiny.texts(tiny.pipeline_of(options), options, ["", *CAPTIONS])
    assert found[ENCODER].shape == (3, tiny.LENGTH[variant], 3 * tiny.TEXT_WIDTH)
    torch.testing.assert_close(found[ENCODER], expected, rtol=1e-5, atol=1e-6)
    assert len(flux2.load_text_encoder(ENCODER, None, "cpu").layers) == {"klein": 27, "dev": 30}[variant]
    joined = flux2.join_conds(flux2.split_cond(found))
    assert torch.equal(joined[ENCODER], found[ENCODER])
    assert flux2.blank_cond(3)[ENCODER].shape == found[ENCODER].shape


def test_captions_are_counted_and_cut_inside_of_the_chat(models):
    flux2 = family(models())
    most = flux2.token_limit
    assert most == tiny.LENGTH["klein"] - flux2.tokenizers[ENCODER].count([""])[0] - flux2.tokenizers[ENCODER]._frame
    tokens = flux2.tokenize(["cat" * most, "cat" * (most + 1)])
    assert tokens.truncated == (1,) and flux2.count_tokens(["cat" * (most + 1)]) == [most + 1]
    assert torch.equal(*tokens.ids[ENCODER])


def test_fingerprints_change_with_what_they_depend_on(models):
    base, other = family(models()), family(models(), text_encoder_max_token_length=64)
    assert base.text_fingerprint(ENCODER) != other.text_fingerprint(ENCODER)
    assert base.vae_fingerprint() == other.vae_fingerprint()


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_latents_are_normalised_means(models):
    flux2, pixels = family(models()), torch.rand(2, 3, 32, 64) * 2 - 1
    vae, made = flux2.load_vae(None, "cpu"), tiny.tiny_vae()
    found = flux2.encode_image(vae, pixels, [1, 2])
    with torch.no_grad():
        mean = made.encode(pixels).latent_dist.mean
    std = torch.sqrt(made.bn.running_var + 1e-4)
    for c, i, j in ((0, 0, 0), (5, 1, 0), (31, 1, 1)):
        k = 4 * c + 2 * i + j
        torch.testing.assert_close(found[:, k], (mean[:, c, i::2, j::2] - made.bn.running_mean[k]) / std[k])
    assert found.shape == (2, 128, 2, 4) and flux2.scale_legacy(found) is found
    assert torch.equal(flux2.encode_reference(vae, pixels), found)
    with torch.no_grad():
        expected = made.decode(mean).sample.clamp(-1, 1)
    torch.testing.assert_close(flux2.decode_latent(vae, found), expected, rtol=1e-4, atol=1e-5)


def test_statistics_stay_exact_in_half_precision(models):
    flux2 = family(models())
    vae = flux2.load_vae(torch.bfloat16, "cpu")
    assert vae.decoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(vae.bn.running_var, tiny.tiny_vae().bn.running_var)
    assert {p.dtype for p in family(models(), no_half_vae=True).load_vae(torch.bfloat16, "cpu").parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize("published", [True, False])
def test_a_smaller_decoder_for_the_same_latents(tmp_path, published):
    from diffusers import AutoencoderKLFlux2

    sizes = {"block_out_channels": (32, 32, 64, 64), "decoder_block_out_channels": (32, 32, 32, 64)}
    made = AutoencoderKLFlux2(layers_per_block=1, latent_channels=32, **sizes)
    tensors = tiny.published_vae(made) if published else made.state_dict()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    loaded = vae_part(tmp_path / "vae.safetensors", option="--ae").load(None, "cpu").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in made.state_dict().items() if "num_" not in name)


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_predicts_as_plain_diffusers(models, variant):
    """Oblong pictures, two times; a sample is the same alone."""
    options = models(variant, "diffusers")
    flux2, x, t = family(options, guidance_scale=2.0), latents(), torch.tensor([0.3, 0.9])
    made, cond = tiny.tiny_denoiser(variant), encode(flux2)
    denoiser = flux2.load_denoiser(None, "cpu")
    with torch.no_grad():
        expected = tiny.forward(made, dict(made.state_dict()), x, t, cond[ENCODER], 2.0)
        found = flux2.predict(denoiser, x, t, cond, None)
        alone = flux2.predict(denoiser, x[1:], t[1:], {ENCODER: cond[ENCODER][1:]}, None)
        told = flux2.predict(denoiser, x, t, {**cond, "guidance": torch.tensor([7.0, 7.0])}, None)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(alone, found[1:], rtol=1e-5, atol=2e-6)
    assert torch.equal(told, found) == (variant == "klein")


@pytest.mark.parametrize("variant", ["klein", "dev"])
def test_consecutive_times_differ_in_bfloat16(models, variant):
    """diffusers alone leaves 4 of 11: it rounds before it embeds."""
    flux2, embedded = family(models(variant, "diffusers")), []
    denoiser, plain = flux2.load_denoiser(torch.bfloat16, "cpu"), tiny.tiny_denoiser(variant).to(torch.bfloat16)
    cond = {ENCODER: torch.randn(11, 3, 3 * tiny.TEXT_WIDTH)}
    for module, different in ((denoiser, 11), (plain, 4)):
        embedded.clear()
        module.time_guidance_embed.timestep_embedder.register_forward_pre_hook(lambda m, args: embedded.append(args[0]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            flux2.predict(module, latents(11).bfloat16(), torch.arange(900, 911) / 1000, cond, None)
        assert len(embedded[0].unique(dim=0)) == different


def test_recomputed_gradients_are_the_same(models):
    flux2 = family(models())
    cond, found, ran = encode(flux2), [], []
    for recompute in (False, True):
        denoiser = flux2.load_denoiser(None, "cpu").requires_grad_(True)
        for block in flux2.blocks(denoiser):
            block.register_forward_hook(lambda module, *_: ran.append(module))
        if recompute:
            Recomputation(flux2.blocks(denoiser)).set_budget(0)
        answer = flux2.predict(denoiser, latents(), torch.tensor([0.3, 0.9]), cond, None)
        assert ran[-4:] == flux2.blocks(denoiser)
        answer.square().sum().backward()
        found.append({name: p.grad for name, p in denoiser.named_parameters()})
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(*(f.values() for f in found), strict=True))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (80, 64)])
@pytest.mark.parametrize("steps", [4, 50])
def test_previews_are_shifted_as_in_the_pipeline(models, size, steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    mu = compute_empirical_mu(size[0] * size[1], steps)
    assert preview_shift(size, steps) == pytest.approx(torch.tensor(mu).exp().item(), rel=1e-5)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    objective = family(models()).objective(Flux2FlowOptions(), LossOptions())
    found = objective.sampler("euler", steps, size=size).timesteps
    torch.testing.assert_close(found.float() * 1000, scheduler.timesteps, rtol=1e-4, atol=1e-2)
    plain = objective.sampler("euler", steps, size=size, shift=1.0).timesteps
    torch.testing.assert_close(plain.float(), torch.linspace(1, 1 / steps, steps))


def test_facts_and_previews(models):
    klein, dev = family(models()), family(models("dev", "diffusers"))
    assert (klein.facts().architecture, dev.facts().architecture) == ("flux-2-klein-4b", "flux-2-dev")
    assert (klein.preview.scale, klein.preview.guidance) == (4.0, None)
    assert (dev.preview.scale, dev.preview.guidance) == (1.0, 4.0)
    options = models()
    names = {"sd_model": "pretrained_model_name_or_path", "vae": "ae"}
    assert klein.model_names() == {kind: str(options[name]) for kind, name in names.items()}


# ---- what is wrong is said in one line ------------------------------------------------------------------------------


def refusal(options, **more):
    with pytest.raises(UserError) as caught:
        family(options, **more).check()
    assert all("\n" not in problem for problem in caught.value.problems)
    return "; ".join(caught.value.problems)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("flux-2-klein-4b.safetensors", True),
        ("FLUX.2-klein-9B", True),
        ("flux2_klein_4b_fp8.safetensors", True),
        ("flux-2-klein-base-4b.safetensors", False),
        ("FLUX.2-klein-base-9B", False),
        ("my_klein.safetensors", False),
    ],
)
def test_distilled_models_are_known_by_their_published_names(models, tmp_path, name, refused):
    options = models("klein", "files" if "." in name[7:] else "transformer")
    (tmp_path / name).symlink_to(options["pretrained_model_name_or_path"])
    if not refused:
        family(options, pretrained_model_name_or_path=tmp_path / name).check()
        return
    problem = refusal(options, pretrained_model_name_or_path=tmp_path / name)
    assert problem.startswith(f"{tmp_path / name} is FLUX.2 klein 4B, which is distilled")
    assert "black-forest-labs/FLUX.2-klein-base-4B" in problem


def test_distilled_models_are_known_by_their_pipeline(models, tmp_path):
    pipeline = tiny.pipeline_of(models("klein", "diffusers"))
    for path in pipeline.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "model_index.json").unlink()
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "which is distilled" in refusal({"pretrained_model_name_or_path": tmp_path})
    assert "which is distilled" in refusal(
        {**models("klein", "transformer"), "pretrained_model_name_or_path": tmp_path / "transformer"}
    )


def test_parts_that_are_missing_or_of_other_models(models, tmp_path):
    options, other = models(), flux1.make(tmp_path / "flux1")
    (tmp_path / "wide").mkdir()
    wide, mistral = make_qwen3(tmp_path / "wide", width=48, layers=29), make_mistral(tmp_path, layers=31)
    assert "--text_encoder is missing" in refusal({k: v for k, v in options.items() if k != ENCODER})
    assert "--ae is missing" in refusal({k: v for k, v in options.items() if k != "ae"})
    assert "a FLUX.1 checkpoint: use flux_train_network.py" in refusal(
        options, pretrained_model_name_or_path=other["pretrained_model_name_or_path"]
    )
    assert refusal(options, ae=other["ae"]) == (
        f"--ae: {other['ae']} makes latents of 16 channels, not 32: the VAE of FLUX.2 (flux2-vae.safetensors) is needed"
    )
    assert "--ae: " in (line := refusal(options, ae=options[ENCODER])) and "has no VAE inside" in line
    line = refusal(options, text_encoder=wide.path)
    assert line.startswith(f"--text_encoder: {wide.path} gives states 48 wide") and line.endswith(
        "reads 32: FLUX.2 klein 4B needs Qwen3 4B"
    )
    line = refusal(options, text_encoder=mistral.path)
    assert line == f"--text_encoder: {mistral.path} is a Mistral text encoder and has no Qwen3 text encoder inside"
    line = refusal(options, text_encoder=make_qwen3(tmp_path, name="short", layers=20).path)
    assert line.endswith("has 20 layers, and the states of layer 27 are needed")
    line = refusal(models("dev", "diffusers"), text_encoder_max_token_length=40)
    assert line.startswith("--text_encoder_max_token_length 40: the chat around a caption takes ")
    with pytest.raises(UserError, match="holds a AutoencoderKL, not an AutoencoderKLFlux2"):
        vae_part(tmp_path / "flux1" / "pipeline", option="--ae")


def test_options_of_other_models_are_answered():
    def problems(*words):
        groups = {"model": Flux2Options, "objective": Flux2FlowOptions}
        from library.trainers.options import NetworkTrainerOptions

        known = ["--pretrained_model_name_or_path", "x", "--output_dir", "o", "--train_data_dir", "d", *words]
        with pytest.raises(UserError) as caught:
            resolve(NetworkTrainerOptions, groups, known, prog="x")
        return caught.value.problems

    assert any("given with --ae" in line for line in problems("--vae", "x"))
    assert any("--timestep_sampling" in line for line in problems("--timestep_sampling", "flux_shift"))


SIZES = {"klein-4b": (3072, 3), "klein-9b": (4096, 3), "dev": (6144, 3), "FLUX.1": (3072, 4)}


def adapter(width, ratio):
    """Down matrices of layers that every model has."""
    inputs = {"double_blocks_0_img_attn_qkv": width, "double_blocks_0_txt_mlp_0": width,
              "single_blocks_1_linear1": width,
              "double_blocks_0_img_mlp_2": ratio * width, "single_blocks_1_linear2": (1 + ratio) * width}  # fmt: skip
    return {f"lora_unet_{name}.lora_down.weight": torch.empty(4, size, device="meta") for name, size in inputs.items()}


@pytest.mark.parametrize("given", SIZES)
@pytest.mark.parametrize("own", ["klein-4b", "klein-9b", "dev"])
def test_adapters_of_another_size_are_named(models, own, given):
    flux2 = family(models())
    width, variant = SIZES[own][0], VARIANTS[own]
    config = {"num_attention_heads": width // 128, "attention_head_dim": 128, "mlp_ratio": 3.0,
              "guidance_embeds": own == "dev"}  # fmt: skip
    flux2.__dict__["parts"] = type("Parts", (), {"config": config})
    problem = flux2.adapter_problem(adapter(*SIZES[given]))
    title = f"FLUX.2 {VARIANTS[given].title}" if given in VARIANTS else given
    assert problem == (None if own == given else f"is for {title}, and this model is FLUX.2 {variant.title}")


def test_options_of_a_text_encoder_that_never_learns(models, tmp_path, caplog):
    from tests.trainers.helpers import make_pictures, subset, train, write_dataset

    data = write_dataset(tmp_path / "data.toml", subset(make_pictures(tmp_path / "pictures", 2)))
    options = {"family": "flux2", "network_module": None, "max_train_steps": 1, **models("klein", "diffusers")}
    with pytest.raises(UserError, match="--network_train_text_encoder_only: the text encoder of this model is never"):
        train(None, data, tmp_path / "a", network_train_text_encoder_only=True, **options)
    with caplog.at_level("WARNING", logger="trainyard"):
        run = train(None, data, tmp_path / "b", text_encoder_lr=["1e-3"], **options)
    assert not any(name.startswith("lora_te") for name in run.weights)
    assert "--text_encoder_lr: no effect" in caplog.text


def test_an_adapter_of_another_size_ends_a_run_before_it_loads(models, tmp_path):
    from tests.trainers.helpers import make_pictures, subset, train, write_dataset

    tensors = adapter(512, 3)
    tensors |= {k.replace("lora_down", "lora_up"): torch.zeros(8, 4) for k in tensors}
    save_file({k: torch.zeros(v.shape) for k, v in tensors.items()}, tmp_path / "lora.safetensors")
    data = write_dataset(tmp_path / "data.toml", subset(make_pictures(tmp_path / "pictures", 2)))
    options = {"family": "flux2", "network_module": None, **models("klein", "diffusers")}
    for name in ("network_weights", "base_weights"):
        given = tmp_path / "lora.safetensors"
        with pytest.raises(UserError) as caught:
            train(None, data, tmp_path / name, **options, **{name: [given] if name == "base_weights" else given})
        assert caught.value.problems == [
            f"--{name} {given} is for a model of another size, and this model is FLUX.2 klein 4B"
        ]


def test_files_of_a_run_are_those_of_its_own_model(models):
    """Layers of which FLUX.1 has all names too, in a format that diffusers refuses with alphas for FLUX.2 only."""
    from types import SimpleNamespace

    from library.trainers.methods.network_files import NetworkFile

    network = lora_flux2.create_network(1.0, 4, 2, None, None, tiny.tiny_denoiser("klein"), train_blocks="double")
    options = SimpleNamespace(
        network=SimpleNamespace(lora_format="comfy"), save=SimpleNamespace(save_precision=None, save_model_as=None)
    )
    tensors, entries = NetworkFile(network, options, "flux2", "kohya", conditioned=False).formatted(
        network.state(None), "comfy"
    )
    assert tensors and not any(name.endswith(".alpha") for name in tensors) and entries
