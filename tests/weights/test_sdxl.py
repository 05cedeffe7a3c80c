# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion XL: every way to load, what text becomes, what the U-Net is told, and what is saved."""

import gzip
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import UserError
from library.families.sd.parts import build_unet
from library.families.sdxl.model import StableDiffusionXL, published
from library.families.sdxl.options import SDXLFineTuneOptions, SDXLOptions, block_rates
from library.families.sdxl.parts import sdxl_layout
from library.io.checkpoint import CheckpointForm
from library.objectives.options import DDPMOptions, LossOptions
from library.options import resolve
from library.trainers.options import NetworkTrainerOptions
from library.types import Batch
from library.weights.loading import shipped_config
from tests.families.sdxl import LOGIT_SCALE, POOLED, make, single_file, tiny_modules
from tests.tiny import make_tiny_sd, write_tokenizer

DATA = Path(__file__).parents[1] / "data_files" / "weights" / "sdxl_full_output.json.gz"
LAYOUTS = ("diffusers", "single")
CAPTIONS = ["a photo of a cat", "red dog, blue star, photo of a girl"]
LONG = "cat dog red blue star " * 20  # 100 tokens
CLIP_G = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline in `pipeline`, the same model in `model.safetensors`."""
    place = tmp_path_factory.mktemp("sdxl")
    make(place, layout="single")
    return place


def place_of(folder, layout):
    return folder / ("pipeline" if layout == "diffusers" else "model.safetensors")


def family(path, **options):
    return StableDiffusionXL(SDXLOptions(pretrained_model_name_or_path=str(path), **options))


def load_all(sdxl):
    encoders = {name: sdxl.load_text_encoder(name, None, "cpu") for name in sdxl.encoders}
    return {"unet": sdxl.load_denoiser(None, "cpu"), "vae": sdxl.load_vae(None, "cpu"), **encoders}


def encode(sdxl, captions=CAPTIONS):
    with torch.no_grad():
        encoders = {name: sdxl.load_text_encoder(name, None, "cpu") for name in sdxl.encoders}
        return sdxl.encode_text(sdxl.tokenize(list(captions)), encoders)


def changed_file(folder, target, change):
    """A copy of the single file with other tensors, and the tokenizer beside it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "changed.safetensors")
    write_tokenizer(target / "tokenizer")
    return target / "changed.safetensors"


def saved(sdxl, path, encoders=None):
    sdxl.save(sdxl.load_denoiser(None, "cpu"), encoders or {}, path, CheckpointForm(metadata={"a": "b"}))
    return load_file(path)


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_bit_equal_and_configured(folder, layout):
    sdxl, expected = family(place_of(folder, layout)), tiny_modules()
    sdxl.check()
    for name, module in load_all(sdxl).items():
        own, theirs = module.state_dict(), expected[name].state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in own), name
        assert type(module) is type(expected[name]) and not module.training
    x_t, t, cond = torch.ones(1, 4, 8, 8), torch.tensor([7]), encode(sdxl, ["cat"])
    with torch.no_grad():
        found = [sdxl.predict(unet, x_t, t, cond, None) for unet in (sdxl.load_denoiser(None, "cpu"), expected["unet"])]
    assert torch.equal(*found)  # the heads of the attention, which no shape tells, are the same


def test_layout_and_keys_of_the_published_checkpoint():
    """At full size, without memory."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    expected = json.loads(gzip.decompress(DATA.read_bytes()))
    config = shipped_config("sdxl")
    with torch.device("meta"):
        from diffusers import AutoencoderKL

        unet, vae = build_unet(config["unet"]), AutoencoderKL.from_config(config["vae"])
        clips = {
            "clip_l": CLIPTextModel(CLIPTextConfig.from_dict(shipped_config("clip_l"))),
            "clip_g": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(shipped_config("clip_g"))),
        }
    found = {name: list(t.shape) for part in published(unet, vae, clips) for name, t in part.items()}
    assert found == {name: shape for name, shape in expected.items() if name != LOGIT_SCALE}
    start = "model.diffusion_model."
    shapes = {name[len(start) :]: tuple(shape) for name, shape in expected.items() if name.startswith(start)}
    read = sdxl_layout(shapes, pooled=1280)
    assert {name: value for name, value in config["unet"].items() if name in read} == read


def test_vae_of_its_own(folder, tmp_path):
    other = tiny_modules(seed=3)["vae"]
    other.save_pretrained(tmp_path / "vae")
    found = family(folder / "model.safetensors", vae=str(tmp_path / "vae")).load_vae(None, "cpu")
    assert torch.equal(found.decoder.conv_in.weight, other.decoder.conv_in.weight)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_round_trip_is_bit_equal(folder, tmp_path):
    """Also what we do not read: marks, the scale of the logits, names of others."""
    more = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0), "denoiser.sigmas": torch.arange(3.0)}
    path = changed_file(folder, tmp_path, lambda tensors: tensors.update(more))
    sdxl = family(path)
    after, before = saved(sdxl, tmp_path / "saved.safetensors"), load_file(path)
    assert LOGIT_SCALE in after and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_outdated_tensors_are_left_out(folder, tmp_path):
    ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    more = {ids: torch.arange(77)[None], "model_ema.decay": torch.ones(())}
    path = changed_file(folder, tmp_path, lambda tensors: tensors.update(more))
    assert saved(family(path), tmp_path / "saved.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_playground_spelling(folder, tmp_path):
    """`text_projection.weight` is the weight of a Linear layer; it is saved as a bare parameter."""

    def change(tensors):
        tensors[f"{CLIP_G}text_projection.weight"] = tensors.pop(f"{CLIP_G}text_projection").T.contiguous()

    sdxl, plain = family(changed_file(folder, tmp_path, change)), load_file(folder / "model.safetensors")
    found = saved(sdxl, tmp_path / "saved.safetensors")
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


def test_from_a_folder_without_logit_scale(folder, tmp_path):
    found, plain = saved(family(folder / "pipeline"), tmp_path / "x.safetensors"), single_file(tiny_modules())
    assert found.keys() == plain.keys() - {LOGIT_SCALE}
    assert all(torch.equal(found[name], plain[name]) for name in found)


def test_what_learned_is_saved(folder, tmp_path):
    sdxl = family(folder / "model.safetensors")
    clip_g = sdxl.load_text_encoder("clip_g", None, "cpu")
    nn.init.normal_(clip_g.text_projection.weight)
    found, plain = saved(sdxl, tmp_path / "x.safetensors", {"clip_g": clip_g}), load_file(folder / "model.safetensors")
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == [f"{CLIP_G}text_projection"]
    assert torch.equal(found[f"{CLIP_G}text_projection"], clip_g.text_projection.weight.T)


@pytest.mark.parametrize("is_v", [False, True])
def test_saved_as_a_folder(folder, tmp_path, is_v):
    from diffusers import StableDiffusionXLPipeline

    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)} if is_v else {}
    sdxl = family(changed_file(folder, tmp_path, lambda tensors: tensors.update(marks)), v_parameterization=is_v)
    form = CheckpointForm("diffusers_safetensors")
    sdxl.save(sdxl.load_denoiser(None, "cpu"), {}, tmp_path / "out", form)
    again = family(tmp_path / "out", v_parameterization=is_v)
    assert (again.parts.is_v, again.parts.is_zero_snr) == (is_v, is_v)
    back = saved(again, tmp_path / "back.safetensors")
    plain = load_file(tmp_path / "changed.safetensors")
    assert back.keys() == plain.keys() - {LOGIT_SCALE} and all(torch.equal(back[name], plain[name]) for name in back)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    assert pipe.tokenizer_2.pad_token_id == 0
    assert torch.equal(pipe.text_encoder_2.text_projection.weight.T, plain[f"{CLIP_G}text_projection"])


def test_diffusers_opens_our_checkpoint(folder, tmp_path):
    """from_single_file with a local configuration denoises to the same latents."""
    from diffusers import StableDiffusionXLPipeline

    sdxl = family(folder / "model.safetensors")
    saved(sdxl, tmp_path / "x.safetensors")
    config = {"config": str(folder / "pipeline"), "local_files_only": True}
    theirs = StableDiffusionXLPipeline.from_single_file(tmp_path / "x.safetensors", **config)
    ours = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    latents = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        call = {"num_inference_steps": 2, "height": 64, "width": 64, "generator": generator, "output_type": "latent"}
        latents.append(pipe("cat, red", **call).images)
    torch.testing.assert_close(*latents, rtol=1e-5, atol=1e-5)


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_encoding_equals_the_pipeline_of_diffusers(folder, layout):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
    captions = [*CAPTIONS, "", LONG]
    states, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    cond = encode(family(place_of(folder, layout)), captions)
    assert set(cond) == {"clip_l", "clip_g", "clip_g_pooled"}
    assert torch.equal(torch.cat([cond["clip_l"], cond["clip_g"]], -1), states)
    assert torch.equal(cond["clip_g_pooled"], pooled) and pooled.shape == (4, POOLED)


@pytest.mark.parametrize("tokens", [150, 225])
def test_long_captions_come_in_chunks(folder, tokens):
    """The second encoder is padded with token 0 in every chunk, and its pooled state is that of the first chunk."""
    sdxl = family(folder / "pipeline", max_token_length=tokens)
    ids = sdxl.tokenize([LONG, "cat"]).ids
    assert ids["clip_l"].shape == ids["clip_g"].shape == (2, tokens // 75, 77)
    end = sdxl.tokenizers["clip_l"].end
    assert ids["clip_l"][1, 0, 2:].tolist() == [end] * 75
    assert ids["clip_g"][1, 0, 2:].tolist() == [end] + [0] * 74
    assert ids["clip_g"][1, 1, 1:].tolist() == [end] + [0] * 75
    cond = encode(sdxl, [LONG, "cat"])
    for name, encoder in tiny_modules().items():
        if not name.startswith("clip"):
            continue
        with torch.no_grad():
            outputs = [encoder(chunk[None], output_hidden_states=True) for chunk in ids[name][0]]
        states = [output.hidden_states[-2][0] for output in outputs]
        literal = torch.cat([states[0][:1], *(state[1:-1] for state in states), states[-1][-1:]])
        torch.testing.assert_close(cond[name][0], literal, rtol=1e-6, atol=1e-6)
        if name == "clip_g":
            torch.testing.assert_close(cond["clip_g_pooled"][0], outputs[0].text_embeds[0], rtol=1e-6, atol=1e-6)
    assert sdxl.token_limit == tokens and sdxl.count_tokens([LONG]) == [100]


def test_weighted_captions(folder):
    """Both encoders' states are multiplied, the pooled state is not."""
    plain = encode(family(folder / "pipeline"), ["cat dog red"])
    weighted = encode(family(folder / "pipeline", weighted_captions=True), ["cat (dog:1.5) red"])
    factors = torch.ones(77, 1)
    factors[2] = 1.5
    for name in ("clip_l", "clip_g"):
        torch.testing.assert_close(weighted[name], plain[name] * factors)
    assert torch.equal(weighted["clip_g_pooled"], plain["clip_g_pooled"])


def test_each_encoder_is_cached_for_itself(folder):
    sdxl = family(folder / "pipeline")
    cond = encode(sdxl)
    joined = sdxl.join_conds(sdxl.split_cond(cond))
    assert all(torch.equal(joined[name], value) for name, value in cond.items())
    prints = {sdxl.text_fingerprint(name) for name in sdxl.encoders}
    prints |= {family(folder / "pipeline", max_token_length=150).text_fingerprint("clip_l")}
    assert len(prints) == 3
    assert family(folder / "pipeline", max_token_length=75).text_fingerprint("clip_g") in prints


# ---- the model ------------------------------------------------------------------------------------------------------


def batch_of(*, original, corner, target):
    return Batch(
        ["a", "b"], CAPTIONS, torch.ones(2), original_sizes=torch.tensor(original), crop_top_lefts=torch.tensor(corner),
        target_sizes=torch.tensor(target),
    )  # fmt: skip


def test_predict_is_told_sizes_and_crops(folder):
    sdxl, unet = family(folder / "pipeline"), tiny_modules()["unet"]
    cond, x_t, t = encode(sdxl), torch.randn(2, 4, 8, 12), torch.tensor([10, 900])
    batch = batch_of(
        original=[[1536.0, 1001.0], [64.0, 96.0]], corner=[[0.0, 13.5], [8.0, 0.0]], target=[[64.0, 96.0]] * 2
    )
    context = torch.cat([cond["clip_l"], cond["clip_g"]], -1)
    with torch.no_grad():
        for given, rows in (
            (batch, [[1536, 1001, 0, 13.5, 64, 96], [64, 96, 8, 0, 64, 96]]),
            (None, [[64, 96, 0, 0, 64, 96]] * 2),
        ):
            added = {"text_embeds": cond["clip_g_pooled"], "time_ids": torch.tensor(rows, dtype=torch.float32)}
            expected = unet(x_t, t, context, added_cond_kwargs=added).sample
            assert torch.equal(sdxl.predict(unet, x_t, t, cond, given), expected)


def test_sizes_stay_exact_in_half_precision(folder):
    batch = batch_of(original=[[1537.0, 1001.0]] * 2, corner=[[0.0, 3.0]] * 2, target=[[1025.0, 96.0]] * 2)
    ids = family(folder / "pipeline").time_ids(torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16), batch)
    assert ids.dtype == torch.float32 and ids[0].tolist() == [1537, 1001, 0, 3, 1025, 96]


def test_scale_of_latents(folder):
    sdxl = family(folder / "pipeline")
    vae = sdxl.load_vae(None, "cpu")
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(5))
    expected = (posterior.mean + posterior.std * noise) * 0.13025
    torch.testing.assert_close(sdxl.encode_image(vae, pixels, [5]), expected)
    assert sdxl.scale_legacy(torch.ones(1)).item() == pytest.approx(0.13025)


def test_a_vae_that_overflows_in_fp16(folder, tmp_path, caplog):
    def change(tensors):
        for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
            tensors[f"first_stage_model.{name}"] *= 1e7

    path, pixels = changed_file(folder, tmp_path, change), torch.ones(1, 3, 32, 32)
    half = family(path)
    vae = half.load_vae(torch.float16, "cpu")
    assert not torch.isfinite(half.encode_image(vae, pixels, [0])).all()  # the cache and the loss are checked
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(half.decode_latent(vae, torch.ones(1, 4, 4, 4))).all()
    assert "--no_half_vae" in caplog.text
    full = family(path, no_half_vae=True)
    vae = full.load_vae(torch.float16, "cpu")
    assert next(vae.parameters()).dtype == torch.float32
    assert torch.isfinite(full.encode_image(vae, pixels, [0])).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_that_say_that_they_predict_v(layout, tmp_path, caplog):
    from diffusers import DDPMScheduler

    make(tmp_path, layout=layout)
    path = place_of(tmp_path, layout)
    if layout == "single":
        save_file({**load_file(path), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, path)
    else:
        config = DDPMScheduler.load_config(path / "scheduler")
        config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        sdxl = family(path)
        sdxl.check()
        sdxl.objective(DDPMOptions(), LossOptions())
    assert "this run is without --v_parameterization" in caplog.text and "give --zero_terminal_snr" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sdxl = family(path, v_parameterization=True)
        sdxl.check()
        objective = sdxl.objective(DDPMOptions(zero_terminal_snr=True), LossOptions())
    assert caplog.text == ""
    assert objective.prediction_type == "v_prediction" and objective.alphas_cumprod[-1] == 0
    assert sdxl.facts().prediction_type == "v"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_says_that_it_predicts_the_noise(folder, layout, caplog):
    """A single file without a mark may be either."""
    with caplog.at_level(logging.WARNING):
        family(place_of(folder, layout), v_parameterization=True).check()
    assert ("with --v_parameterization" in caplog.text) == (layout == "diffusers")


# ---- full training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"denoiser": None}),
        ({"train_text_encoder": True}, {"denoiser": None, "clip_l": None, "clip_g": None}),
        ({"train_text_encoder": True, "learning_rate_te1": 0.0, "learning_rate_te2": 1e-5},
         {"denoiser": None, "clip_g": 1e-5}),
    ],
)  # fmt: skip
def test_which_parts_learn(folder, options, expected):
    assert family(folder / "pipeline").learning_parts(SDXLFineTuneOptions(**options)) == expected


def test_rates_of_blocks(folder):
    """0: embeddings, 1-9: input blocks, 10-12: the middle, 13-21: output blocks, 22: the last layers."""
    sdxl = family(folder / "pipeline")
    unet = sdxl.load_denoiser(None, "cpu")
    rates = [0.0 if i == 4 else (i + 1) * 1e-5 for i in range(23)]
    options = SDXLFineTuneOptions(block_lr=tuple(rates))
    groups = {group["name"]: group for group in sdxl.denoiser_groups(unet, options, 1.0)}
    assert [*groups] == [f"unet_block{i}" for i in range(23) if i != 4]
    index = {id(p): name for name, group in groups.items() for p in group["params"]}
    for path, block in (
        ("time_embedding.linear_1", 0), ("add_embedding.linear_2", 0), ("conv_in", 1),
        ("down_blocks.0.resnets.1.conv1", 3), ("down_blocks.1.resnets.0.conv1", 5),
        ("down_blocks.2.attentions.1.transformer_blocks.1.attn1.to_q", 9), ("mid_block.resnets.0.conv1", 10),
        ("mid_block.attentions.0.proj_in", 11), ("mid_block.resnets.1.conv2", 12), ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.1.upsamplers.0.conv", 18), ("up_blocks.2.resnets.2.conv1", 21), ("conv_out", 22),
        ("conv_norm_out", 22),
    ):  # fmt: skip
        assert index[id(unet.get_submodule(path).weight)] == f"unet_block{block}", path
        assert groups[f"unet_block{block}"]["lr"] == rates[block]
    left = {id(p) for p in unet.down_blocks[0].downsamplers.parameters()}  # input block 3, the rate of which is 0
    assert {id(p) for p in unet.parameters()} - index.keys() == left
    [whole] = sdxl.denoiser_groups(unet, SDXLFineTuneOptions(), 1e-4)
    assert len(whole["params"]) == len([*unet.parameters()]) and whole["lr"] == 1e-4


# ---- mistakes -------------------------------------------------------------------------------------------------------


def problem(path, **options):
    with pytest.raises(UserError) as error:
        family(path, **options).check()
    assert all("\n" not in line for line in error.value.problems)
    return " ".join(error.value.problems)


def test_models_of_other_kinds(folder, tmp_path):
    assert "use train_network.py" in problem(make_tiny_sd(tmp_path / "one", layout="single"))
    assert "use train_network.py" in problem(make_tiny_sd(tmp_path / "two"))
    shutil.copytree(folder / "pipeline", tmp_path / "three")
    shutil.rmtree(tmp_path / "three" / "text_encoder_2")
    assert "text_encoder_2 missing there" in problem(tmp_path / "three")


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("conditioner.embedders.0.", "no first text encoder inside"),
        (CLIP_G, "no second text encoder inside"),
        ("first_stage_model.", "has no VAE inside; give one with --vae"),
        ("model.diffusion_model.", "is a VAE"),
        (f"{CLIP_G}token_embedding", "is incomplete: it lacks token_embedding.weight"),
    ],
)
def test_incomplete_files(folder, tmp_path, start, expected):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]

    assert expected in problem(changed_file(folder, tmp_path, change))


def test_inpainting_models_and_mixed_parts(folder, tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    change = lambda tensors: tensors.update({name: torch.ones(32, 9, 3, 3)})
    assert "inpainting" in problem(changed_file(folder, tmp_path, change))
    shutil.copytree(folder / "pipeline", tmp_path / "mixed")
    config = tmp_path / "mixed" / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 80', '"cross_attention_dim": 96'))
    assert "its text encoders make 80" in problem(tmp_path / "mixed")


def test_options_are_honoured_answered_or_refused(folder):
    def read(*argv):
        groups = {"model": SDXLOptions}
        path = str(folder / "pipeline")
        required = ["--pretrained_model_name_or_path", path, "--output_dir", "x", "--train_data_dir", "y"]
        return resolve(NetworkTrainerOptions, groups, [*required, *argv], prog="test")

    found = read("--clip_skip", "2", "--disable_mmap_load_safetensors", "--max_token_length", "225")
    assert found.options.model.max_token_length == 225
    assert sum("--clip_skip" in line or "--disable_mmap" in line for line in found.answers) == 2
    with pytest.raises(UserError, match=r"SDXL is no Stable Diffusion 2\.x"):
        read("--v2")


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1e-5,0", "needs 23 values"), (",".join(["x"] * 23), "expects numbers"), (",".join(["-1"] * 23), "at least 0")],
)
def test_mistakes_in_block_lr(value, expected):
    with pytest.raises(ValueError, match=expected):
        block_rates(value)


def test_rates_of_encoders_that_do_not_learn():
    assert [*SDXLFineTuneOptions(learning_rate_te1=1e-5).problems()]
    assert not [*SDXLFineTuneOptions(train_text_encoder=True, learning_rate_te1=1e-5).problems()]
