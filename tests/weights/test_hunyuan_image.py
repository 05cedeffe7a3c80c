# SPDX-License-Identifier: Apache-2.0
"""HunyuanImage-2.1: loading from every layout, captions, prediction and saving, against diffusers and transformers."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError
from library.families.hunyuan_image import BYT5, QWEN, SHEET
from library.families.hunyuan_image.forward import use_device_masks
from library.families.hunyuan_image.glyphs import LENGTH, glyph_tokenizer, quoted
from library.families.hunyuan_image.model import HunyuanImage
from library.families.hunyuan_image.options import HunyuanImageFlowOptions, HunyuanImageOptions
from library.families.hunyuan_image.parts import build_denoiser
from library.io.checkpoint import CheckpointForm
from library.objectives.options import LossOptions
from library.options import resolve
from library.sampling.preview import Previewer, PreviewModels
from library.sampling.prompts import Prompt
from library.trainers.options import NetworkTrainerOptions
from library.weights.hunyuan_vae import build_vae
from library.weights.loading import build_empty, shipped_config
from tests.families.hunyuan_image import GLYPH_WIDTH, TEXT_WIDTH, encoded, make, t5_file, tiny_byt5, tiny_denoiser
from tests.trainers.helpers import make_pictures, subset, train, write_dataset

CAPTIONS = ["cat", 'a sign "red star", and "24 h"', "", "photo “dog”"]
LAYOUTS = ("files", "split", "comfy", "file", "diffusers", "transformer")
LIMIT = {"text_encoder_max_token_length": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Layout -> options, each of the same weights."""
    return {layout: make(tmp_path_factory.mktemp(layout), layout=layout) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    return write_dataset(folder / "data.toml", subset(make_pictures(folder / "two", 2)))


def family(options: dict[str, Any], **more: Any) -> HunyuanImage:
    opened = HunyuanImage(HunyuanImageOptions(**{k: str(v) for k, v in options.items()}, **LIMIT, **more))
    opened.check()
    return opened


def encode(own: HunyuanImage, captions: list[str] = CAPTIONS) -> dict[str, Tensor]:
    tokens = own.tokenize(captions)
    with torch.no_grad():
        return own.encode_text(tokens, {name: own.load_text_encoder(name, None, "cpu") for name in own.encoders})


def test_every_layout_gives_the_same_modules(models: dict[str, dict[str, Any]]) -> None:
    expected: dict[str, dict[str, Tensor]] = {}
    for layout in LAYOUTS:
        own = family(models[layout])
        own.check_weights()
        for name in ("denoiser", "vae", QWEN, BYT5):
            found = own.part(name).load(None, "cpu").state_dict()
            before = expected.setdefault(name, found)
            assert found.keys() == before.keys() and all(torch.equal(found[n], before[n]) for n in before), layout
    made = tiny_denoiser().state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected["denoiser"].items())
    assert len([name for name in expected[QWEN] if name.endswith("q_proj.weight")]) == 2  # of four layers
    assert not any(name.startswith("norm") for name in expected[QWEN])


def test_save_gives_back_the_file(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    before = load_file(models["files"]["pretrained_model_name_or_path"])
    for layout in ("files", "comfy", "diffusers"):
        own = family(models[layout])
        own.save(own.load_denoiser(None, "cpu"), {}, tmp_path / "out.safetensors", CheckpointForm())
        after = load_file(tmp_path / "out.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_variants(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    base, distilled = family(models["files"]), family(make(tmp_path, distilled=True))
    assert (base.preview.steps, base.preview.scale, base.preview.guidance) == (50, 3.5, None)
    assert (distilled.preview.steps, distilled.preview.scale, distilled.preview.guidance) == (8, 1.0, 3.25)
    for own, shift in ((base, 5.0), (distilled, 4.0)):
        times = own.objective(HunyuanImageFlowOptions(), LossOptions()).sampler("euler", 4, size=(2, 2)).timesteps
        s = torch.tensor([1.0, 0.75, 0.5, 0.25])
        torch.testing.assert_close(times.float().cpu(), shift * s / (1 + (shift - 1) * s))


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a cat", ""),
        ("it's a dog's bone", ""),  # apostrophes
        ('a sign "Open" and "24 h"', 'Text "Open". Text "24 h". '),
        ('‘一’ “二” "3"', 'Text "3". Text "一". Text "二". '),
        ('an inch is 1"', ""),
    ],
)
def test_quoted_text(caption: str, text: str) -> None:
    assert quoted(caption) == text


def test_glyph_tokens_are_bytes() -> None:
    tokens = glyph_tokenizer()(["cat", '"é"', f'"{"x" * 200}"'], length=LENGTH, name=BYT5)
    assert tokens.lengths[BYT5] == (0, len('Text "é". '.encode()) + 1, LENGTH)
    row = tokens.ids[BYT5][1][: tokens.lengths[BYT5][1]].tolist()
    assert bytes(i - 3 for i in row[:-1]).decode() == 'Text "é". ' and row[-1] == 1
    assert not tokens.ids[BYT5][0].any() and tokens.ids[BYT5][2][-1] == 1


def test_states_are_those_of_the_pipeline(models: dict[str, dict[str, Any]]) -> None:
    own = family(models["files"])
    cond = encode(own)
    theirs = encoded(models["files"]["pretrained_model_name_or_path"].parent / "pipeline", CAPTIONS)
    for name, key in ((QWEN, "encoder_hidden_states"), (BYT5, "encoder_hidden_states_2")):
        mask = theirs[key.replace("hidden_states", "attention_mask")].bool()
        length = int(mask.sum(1).max())
        assert torch.equal(cond[f"{name}_mask"], mask[:, :length])
        torch.testing.assert_close(cond[name], theirs[key][:, :length] * mask[:, :length, None], rtol=1e-4, atol=1e-5)
    assert cond[f"{BYT5}_mask"].sum(1).tolist()[::2] == [0, 0] and cond[BYT5].isfinite().all()


def test_conds_split_and_join_again(models: dict[str, dict[str, Any]]) -> None:
    own = family(models["files"])
    cond = encode(own)
    parts = own.split_cond(cond)
    assert [len(part[QWEN]) for part in parts] == [count + 1 for count in own.count_tokens(CAPTIONS)]  # and <|im_end|>
    assert len(parts[0][BYT5]) == 0 and parts[0][BYT5].shape == (0, GLYPH_WIDTH)
    joined = own.join_conds(parts)
    assert joined.keys() == cond.keys() and all(torch.equal(joined[name], cond[name]) for name in cond)
    plain = own.join_conds([parts[0], parts[0]])
    assert plain.keys() == {QWEN, BYT5} and plain[BYT5].shape == (2, 0, GLYPH_WIDTH)


def test_a_caption_is_cut_and_its_end_stays(models: dict[str, dict[str, Any]]) -> None:
    own = family(models["files"])
    assert own.token_limit == 63
    tokens = own.tokenize(["cat" * 63, "cat" * 64])
    assert tokens.truncated == (1,) and torch.equal(*tokens.ids[QWEN])
    assert tokens.ids[QWEN][0][-1] == own.tokenizers[QWEN].tokenizer.convert_tokens_to_ids("<|im_end|>")


# ---- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[1:2], ["cat", "dog"]], ids=["mixed", "quoted", "no mask"])
@pytest.mark.parametrize("distilled", [False, True])
def test_predict_is_the_plain_model(models: dict[str, dict[str, Any]], distilled: bool, captions: list[str]) -> None:
    own = family(models["files"])
    own.parts.config.update(guidance_embeds=distilled, use_meanflow=distilled)  # type: ignore[attr-defined]
    plain = tiny_denoiser(distilled=distilled)
    ours: Any = copy.deepcopy(plain)
    use_device_masks(ours)
    cond, count = encode(own, captions), len(captions)
    x, t = torch.randn(count, 64, 2, 3), torch.linspace(0.1, 0.9, count)
    more: dict[str, Tensor] = {}
    if distilled:
        more = {"guidance": torch.full((count,), 3250.0), "timestep_r": t * 500}
        cond |= {"guidance": torch.full((count,), 3.25), "step_end": t / 2}
    theirs = encoded(models["files"]["pretrained_model_name_or_path"].parent / "pipeline", captions)
    ran: list[int] = []
    for i, block in enumerate(own.blocks(ours)):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))  # type: ignore[misc]
    found = own.predict(ours, x, t, cond, None)
    expected = plain(x, t * 1000, **theirs, **more, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert ran == list(range(4))
    largest = max(float(q.grad.abs().max()) for q in plain.parameters())
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if p.grad is None:  # ByT5's, where nothing is quoted
            assert name.startswith("context_embedder_2.") and not q.grad.any() and '"' not in "".join(captions)
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 * largest)
    own.parts.config.update(guidance_embeds=False, use_meanflow=False)  # type: ignore[attr-defined]


def test_previews_tell_a_mean_flow_where_each_step_ends(tmp_path: Path) -> None:
    own = family(make(tmp_path, distilled=True))
    denoiser: Any = own.load_denoiser(None, "cpu")
    seen: list[tuple[float, float, float]] = []
    denoiser.time_guidance_embed.register_forward_pre_hook(
        lambda module, args: seen.append((float(args[0]), float(args[2]), float(args[1])))
    )
    encoders = {name: own.load_text_encoder(name, None, "cpu") for name in own.encoders}
    objective = own.objective(HunyuanImageFlowOptions(), LossOptions())
    prompt = Prompt("cat", sample_steps=3, width=64, height=64)
    previewer = Previewer(own, objective, [prompt], output_dir=tmp_path, output_name="x", sampler="euler")
    models = PreviewModels(denoiser, own.load_vae(None, "cpu"), encoders)
    assert len(previewer.render(models, step=1, epoch=None, device="cpu", dtype=torch.float32)) == 1
    times, ends, guidance = zip(*seen, strict=True)
    assert times[0] == 1000 and ends == (*times[1:], 0.0) and set(guidance) == {3250.0}


def test_the_published_model_has_17_billion_weights() -> None:
    """Denoiser and autoencoder at full size, without memory for them."""
    modules = (
        build_empty(partial(build_denoiser, shipped_config("hunyuan_image"))),
        build_empty(partial(build_vae, shipped_config("hunyuan_image_vae"))),
    )
    assert [sum(p.numel() for p in module.parameters()) for module in modules] == [17_425_795_520, 405_575_491]


def test_time_reaches_the_model_in_float32(models: dict[str, dict[str, Any]]) -> None:
    """bfloat16 has three digits: of eleven neighbours it would leave four."""
    own = family(models["files"])
    denoiser: Any = own.load_denoiser(torch.bfloat16, "cpu")
    seen: list[Tensor] = []
    for module in (denoiser.time_guidance_embed.time_proj, denoiser.context_embedder.time_text_embed.time_proj):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t = torch.arange(900, 911) / 1000
    cond = {QWEN: torch.randn(11, 3, TEXT_WIDTH), BYT5: torch.randn(11, 2, GLYPH_WIDTH)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own.predict(denoiser, torch.randn(11, 64, 1, 1), t, cond, None)
    assert len(seen) == 2 and all(len(times.unique()) == 11 for times in seen)


# ---- files of another kind ------------------------------------------------------------------------------------------


def refused(options: dict[str, Any], **files: Any) -> str:
    with pytest.raises(UserError) as error:
        family({**options, **files})
    (line,) = error.value.problems
    return str(line)


def test_wrong_files(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    options = models["files"]
    model = options["pretrained_model_name_or_path"]
    assert refused(options, text_encoder=options["byt5"]).startswith(f"--text_encoder: {options['byt5']} is a T5 text")
    assert refused(options, byt5=options["text_encoder"]).endswith(
        "Qwen2.5-VL text encoder and has no T5 text encoder inside"
    )
    assert "is a HunyuanImage-2.1 checkpoint and has no" in refused(options, text_encoder=model)
    assert refused(options, vae=options["byt5"]) == (
        f"--vae: {options['byt5']} has no VAE inside; the VAE of HunyuanImage-2.1 is needed"
    )
    assert refused(options, vae=model).startswith(f"--vae: {model} has no VAE inside")
    without = {name: path for name, path in options.items() if name != "byt5"}
    assert refused(without) == f"--byt5 is missing: {model} has none inside"
    tensors = load_file(model)
    tensors["img_in.proj.weight"] = tensors["img_in.proj.weight"][:, :, None]
    save_file(tensors, tmp_path / "video.safetensors")
    assert "video.safetensors is another model of this design" in refused(
        options, pretrained_model_name_or_path=tmp_path / "video.safetensors"
    )
    plain: Any = tiny_byt5()
    plain.shared = plain.encoder.embed_tokens = torch.nn.Embedding(384, GLYPH_WIDTH)
    save_file({n: t.clone() for n, t in t5_file(plain).items()}, tmp_path / "byt5.safetensors")
    assert "is ByT5 as Google published it" in refused(options, byt5=tmp_path / "byt5.safetensors")
    (tmp_path / "narrow").mkdir()
    narrow = make(tmp_path / "narrow", seed=1)
    tensors = load_file(narrow["text_encoder"])
    wide = {n: torch.cat([t, t], -1) if t.ndim == 2 and "embed" in n else t for n, t in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    assert "gives states 64 wide" in refused(options, text_encoder=tmp_path / "wide.safetensors")


# ---- options --------------------------------------------------------------------------------------------------------


def resolved(*words: str) -> Any:
    given = ["--pretrained_model_name_or_path", "x", "--output_dir", "x", "--output_name", "x", *words]
    return resolve(NetworkTrainerOptions, SHEET.option_groups, given, prog="test")


def test_fp8_options_of_sd_scripts() -> None:
    assert not resolved().options.memory.fp8_base_unet
    found = resolved("--fp8_scaled")
    assert found.options.memory.fp8_base_unet and not found.options.memory.fp8_base
    assert found.answers == ("--fp8_base_unet is chosen: it is what --fp8_scaled asks for",)
    assert resolved("--fp8_scaled", "--fp8_vl").options.memory.fp8_base
    wrong = ((["--fp8_vl"], "has no effect without --fp8_scaled"), (["--attn_mode", "sageattn"], "no backward pass"))
    for words, line in wrong:
        with pytest.raises(UserError, match=line):
            resolved(*words)


def test_what_text_encoders_cannot_do(models: dict[str, dict[str, Any]], dataset: Path, tmp_path: Path) -> None:
    """Their layers have no names in adapter files: they learn in no run, and a LoRA may be merged below them."""
    values = {**models["files"], **LIMIT, "family": "hunyuan_image", "network_module": None, "max_train_steps": 1}
    with pytest.raises(UserError, match="--network_train_text_encoder_only: the text encoder of this model is never"):
        train(None, dataset, tmp_path, **values, network_train_text_encoder_only=True)
    first = train(None, dataset, tmp_path / "first", **values)
    assert all(name.startswith("lora_unet_") for name in first.weights)
    again = train(None, dataset, tmp_path / "again", **values, base_weights=[str(first.file)])
    assert again.losses[0] < first.losses[0]
    wide = {n: torch.cat([t, t], -1) if "down" in n else t for n, t in first.weights.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"--network_weights .*wide\.safetensors: "):
        train(None, dataset, tmp_path / "wide", **values, network_weights=str(tmp_path / "wide.safetensors"))
