# SPDX-License-Identifier: Apache-2.0
"""Text encoders from every kind of source equal the modules that transformers itself reads, and bad files say why."""

from __future__ import annotations

import gc
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.weights.language_models import KINDS as LANGUAGE_KINDS
from library.weights.language_models import (
    _build,
    gemma2_encoder,
    language_encoder,
    language_layout,
    language_states,
)
from library.weights.loading import build_empty, shipped_config
from library.weights.text_encoders import EncoderPart, clip_encoder, t5_encoder
from library.weights.weight_check import part_problems
from tests.tiny_text import (
    Made,
    make_clip_g,
    make_clip_l,
    make_gemma2,
    make_mistral,
    make_qwen3,
    make_qwen25_vl,
    make_t5,
)

IDS = torch.tensor([[5, 9, 20, 33, 1, 0, 0], [40, 7, 7, 12, 30, 21, 1]])
CLIP_IDS = torch.tensor([[533, 20, 33, 534, 534, 534], [533, 7, 12, 30, 21, 534]])
PADDED_IDS = torch.tensor([[533, 20, 33, 534, 0, 0], [533, 7, 12, 30, 21, 534]])

# kind -> maker, opener, its settings, ids, keys of the output that are compared, class in transformers
KINDS: dict[str, tuple[Any, Any, dict[str, Any], Tensor, tuple[str, ...], str]] = {
    "clip_l": (make_clip_l, clip_encoder, {"projection": False}, CLIP_IDS, ("pooler_output",), "CLIPTextModel"),
    "clip_g": (
        make_clip_g,
        clip_encoder,
        {"projection": True, "config": "clip_g"},
        PADDED_IDS,
        ("text_embeds",),
        "CLIPTextModelWithProjection",
    ),
    "t5xxl": (make_t5, t5_encoder, {}, IDS, (), "T5EncoderModel"),
    "gemma2": (make_gemma2, gemma2_encoder, {}, IDS, (), "Gemma2Model"),
    "qwen3": (make_qwen3, partial(language_encoder, "qwen3"), {}, IDS, (), "Qwen3Model"),
    "qwen2.5_vl": (make_qwen25_vl, partial(language_encoder, "qwen2.5_vl"), {}, IDS, (), "Qwen2_5_VLTextModel"),
    "mistral": (make_mistral, partial(language_encoder, "mistral"), {}, IDS, (), "MistralModel"),
}
LEVELS = {
    "clip_l": "text_model.",
    "clip_g": "text_model.",
    "gemma2": "model.",
    "qwen3": "model.",
    "qwen2.5_vl": "model.language_model.",
    "mistral": "language_model.model.",
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(kind: str, folder: Path, **settings: Any) -> Made:
    return KINDS[kind][0](folder, **settings)


def encoder(kind: str, path: Path, **settings: Any) -> EncoderPart:
    _, opener, own, *_ = KINDS[kind]
    return opener(path, option=f"--{kind}", **{**own, **settings})


def outputs(kind: str, module: nn.Module) -> list[Tensor]:
    """The states of every layer, and what else is read of this encoder."""
    ids, keys = KINDS[kind][3:5]
    with torch.no_grad():
        out = module(ids, output_hidden_states=True)
    return [out.last_hidden_state, *out.hidden_states, *(out[key] for key in keys)]


def reference(kind: str, made: Made, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What transformers' own `from_pretrained` gives of the same weights in a folder."""
    import transformers

    folder = made.path.parent / "reference"
    made.module.to(dtype).save_pretrained(folder)  # type: ignore[operator]
    module = getattr(transformers, KINDS[kind][5]).from_pretrained(folder, dtype=dtype)
    return outputs(kind, module.eval().requires_grad_(False))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected))
    assert all(bool(a.isfinite().all()) and a.float().std() > 1e-3 for a in found)


def rewrite(made: Made, change: Any) -> Path:
    """The file with changed tensors, beside it."""
    path = made.path.with_name(f"changed_{made.path.name}")
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(made.path)).items()}, path)
    return path


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_files_and_folders_equal_transformers(kind: str, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = make(kind, tmp_path, layout=layout, dtype=dtype)
    found = encoder(kind, made.path)
    module = found.part.load(None, "cpu")
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert_equal(outputs(kind, module), reference(kind, made, dtype))
    embedding = module.get_input_embeddings().weight
    assert tuple(embedding.shape) == (found.vocabulary, found.width)
    assert found.layers == len(outputs(kind, module)) - 2 - len(KINDS[kind][4])


@pytest.mark.parametrize("indexed", [True, False])
def test_split_folders(kind: str, indexed: bool, tmp_path: Path) -> None:
    made = make(kind, tmp_path, layout="folder")
    shutil.rmtree(made.path)
    made.module.save_pretrained(made.path, max_shard_size="40KB")  # type: ignore[operator]
    if not indexed:
        (made.path / "model.safetensors.index.json").unlink()
    assert len([*made.path.glob("*.safetensors")]) > 1
    assert_equal(outputs(kind, encoder(kind, made.path).part.load(None, "cpu")), reference(kind, made))


@pytest.mark.parametrize("leveled", [True, False])
@pytest.mark.parametrize("name", LEVELS)
def test_with_and_without_the_level_of_names(name: str, leveled: bool, tmp_path: Path) -> None:
    made, level = make(name, tmp_path), LEVELS[name]

    def rename(key: str) -> str:
        bare = key.removeprefix(level)
        return level + bare if leveled and not bare.startswith("text_projection") else bare

    path = rewrite(made, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    assert any(key.startswith(level) for key in load_file(path)) == leveled
    assert_equal(outputs(name, encoder(name, path).part.load(torch.float32, "cpu")), reference(name, made))


def test_all_in_one_files(kind: str, tmp_path: Path) -> None:
    """Below its prefix, beside another encoder of the same class and a denoiser."""
    made, prefix = make(kind, tmp_path), f"text_encoders.{kind}.transformer."
    other = load_file(make(kind, tmp_path, name="other", seed=9, prefix="text_encoders.other.").path)
    rest = other | {"model.diffusion_model.x": torch.zeros(2)}
    path = rewrite(made, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()} | rest)
    part = encoder(kind, path, prefixes=(prefix, "")).part
    assert_equal(outputs(kind, part.load(None, "cpu")), reference(kind, made))


def test_extra_names_are_ignored(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path)
    extra = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "logit_scale": torch.ones(()),
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
        "lm_head.weight": torch.zeros(4, 4),
    }
    path = rewrite(made, lambda tensors: tensors | extra)
    assert_equal(outputs(kind, encoder(kind, path).part.load(None, "cpu")), reference(kind, made))


def test_fp8_files(kind: str, tmp_path: Path) -> None:
    """Every tensor in 8 bits. Without a dtype nothing could be computed, so it is bfloat16 then, which is exact."""
    made = make(kind, tmp_path, dtype=torch.float8_e4m3fn)
    part = encoder(kind, made.path).part
    for parameter in made.module.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    expected = reference(kind, made)
    assert_equal(outputs(kind, part.load(torch.float32, "cpu")), expected)
    assert {p.dtype for p in part.load(None, "cpu").parameters()} == {torch.bfloat16}
    small = part.load(torch.float32, "cpu", storage="half")
    assert torch.float8_e4m3fn in {p.dtype for p in small.parameters()}
    assert_equal(outputs(kind, small), expected)


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_fp8_files(kind: str, names: tuple[str, str], tmp_path: Path) -> None:
    made = make(kind, tmp_path)
    state = made.module.state_dict()

    def scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = dict(tensors)
        for name, tensor in tensors.items():
            own = name.removeprefix("text_model.") if name.removeprefix("text_model.") in state else name
            if tensor.ndim == 2 and "embed" not in name and "shared" not in name and "bias" not in name:
                module = name.removesuffix(".weight")
                scale = tensor.abs().max() / 448
                result[name] = (tensor / scale).to(torch.float8_e4m3fn)
                result[f"{module}.{names[0]}"], result[f"{module}.{names[1]}"] = scale, torch.ones(())
                state[own].copy_(result[name].float() * scale)
        marker = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
        return result | (marker if names[0] == "scale_weight" else {})

    part = encoder(kind, rewrite(made, scaled)).part
    expected = reference(kind, made)
    assert_equal(outputs(kind, part.load(torch.float32, "cpu")), expected)
    assert_equal(outputs(kind, part.load(torch.float32, "cpu", storage="half")), expected)
    assert {p.dtype for p in part.load(None, "cpu").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_kept_in_a_float32_run_is_exact(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    part = encoder(kind, make(kind, tmp_path, dtype=dtype).path).part
    kept, plain = part.load(torch.float32, "cpu", storage="half"), part.load(torch.float32, "cpu")
    assert dtype in {p.dtype for p in kept.parameters()}
    assert_equal(outputs(kind, kept), outputs(kind, plain))


def test_weights_are_the_mapped_file(kind: str, tmp_path: Path) -> None:
    """No copy: each parameter is a part of one mapping of the file, and goes with the module."""
    made = make(kind, tmp_path, dtype=torch.bfloat16)
    size = made.path.stat().st_size

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(made.path))

    module = encoder(kind, made.path).part.load(torch.bfloat16, "cpu")
    starts = [p.data_ptr() for p in module.parameters()]
    assert mappings() == 1 and max(starts) - min(starts) < size
    del module
    gc.collect()  # as the trainer does: layers that cast refer to themselves
    assert mappings() == 0


# ---- what a file has and does not have ------------------------------------------------------------------------------


def test_published_round_trip(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path, dtype=torch.bfloat16)
    found = encoder(kind, made.path)
    tensors = found.published(found.part.load(None, "cpu"))
    source = load_file(made.path)
    assert tensors.keys() == source.keys()
    assert all(torch.equal(tensors[name], source[name]) for name in source)
    save_file(tensors, tmp_path / "again.safetensors")  # safetensors refuses tensors that share memory


def test_a_clip_without_projection_keeps_its_pooled_states(tmp_path: Path) -> None:
    made = make_clip_l(tmp_path)
    part = clip_encoder(made.path, option="--clip_l", projection=True).part
    module = part.load(torch.float32, "cpu")
    with torch.no_grad():
        assert torch.equal(module(CLIP_IDS).text_embeds, made.module(CLIP_IDS).pooler_output)
    other = clip_encoder(made.path, option="--clip_l", projection=False).part
    assert part.fingerprint() != other.fingerprint()


def test_the_activation_is_that_of_the_kind(tmp_path: Path) -> None:
    """No shape tells quick GELU from GELU."""
    made = make_clip_g(tmp_path)
    as_l = clip_encoder(made.path, option="--clip_g", projection=True).part.load(None, "cpu")
    assert not torch.equal(as_l(PADDED_IDS).text_embeds, made.module(PADDED_IDS).text_embeds)


@pytest.mark.parametrize("ids", [CLIP_IDS, PADDED_IDS])
def test_pooled_states_are_those_of_the_first_end_token(ids: Tensor, tmp_path: Path) -> None:
    """Old config.json files say eos_token_id 2, which transformers takes as "the highest id"."""
    made = make_clip_l(tmp_path, layout="folder")
    config = made.path / "config.json"
    for eos in (534, 2):
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": eos}))
        module = clip_encoder(made.path, option="--clip_l", projection=False).part.load(None, "cpu")
        out = module(ids)
        ends = torch.tensor([3, 5])
        assert torch.equal(out.pooler_output, out.last_hidden_state[torch.arange(2), ends])


def test_folders_of_whole_clip_models(tmp_path: Path) -> None:
    """openai/clip-vit-large-patch14 has a vision tower, and its text config one level down."""
    made = make_clip_l(tmp_path, layout="folder")
    config = made.path / "config.json"
    config.write_text(json.dumps({"model_type": "clip", "text_config": json.loads(config.read_text())}))
    weights = made.path / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights).items()}
    save_file(tensors | {"vision_model.x": torch.zeros(1)}, weights)
    assert_equal(outputs("clip_l", encoder("clip_l", made.path).part.load(None, "cpu")), reference("clip_l", made))


def test_t5_with_either_name_of_its_embedding(tmp_path: Path) -> None:
    made = make_t5(tmp_path)
    expected = reference("t5xxl", made)
    for lost in ("shared.weight", "encoder.embed_tokens.weight"):
        path = rewrite(made, lambda tensors, lost=lost: {n: t for n, t in tensors.items() if n != lost})
        module: Any = t5_encoder(path, option="--t5xxl").part.load(None, "cpu")
        assert_equal(outputs("t5xxl", module), expected)
        assert module.shared.weight is module.encoder.embed_tokens.weight


# ---- T5 in float16 --------------------------------------------------------------------------------------------------


def large_t5(folder: Path) -> Made:
    """A T5 whose feed-forward layers exceed float16, as the real one's do."""
    made = make_t5(folder)
    for name, factor in (("wi_1", 30), ("wo", 5e4)):
        made.module.get_submodule(f"encoder.block.0.layer.1.DenseReluDense.{name}").weight.data *= factor
    assert outputs("t5xxl", made.module)[2].abs().max() > 2 * 65504
    save_file({n: t.half().clone() for n, t in made.module.state_dict().items()}, made.path)
    return made


def test_t5_in_float16_does_not_overflow(tmp_path: Path) -> None:
    made = large_t5(tmp_path)
    exact = outputs("t5xxl", made.module)[0]
    part = t5_encoder(made.path, option="--t5xxl").part
    for dtype, options in ((torch.float16, {}), (None, {}), (torch.float32, {"storage": "half"})):
        found = outputs("t5xxl", part.load(dtype, "cpu", **options))[0]
        torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
    assert_equal(outputs("t5xxl", part.load(torch.float16, "cpu")), reference("t5xxl", made, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_t5_under_float16_autocast_does_not_overflow(dtype: torch.dtype, tmp_path: Path) -> None:
    made = large_t5(tmp_path)
    exact = outputs("t5xxl", made.module)[0]
    module = t5_encoder(made.path, option="--t5xxl").part.load(dtype, "cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        found = outputs("t5xxl", module)[0]
        theirs = outputs("t5xxl", made.module)[0]
        assert not torch.allclose(theirs.float(), exact, rtol=0.1, atol=0.1)  # transformers' own is wrong there
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_t5_learns_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Full training of T5: every weight gets a gradient, the same as transformers' own within rounding."""
    made = make_t5(tmp_path)
    module = t5_encoder(made.path, option="--t5xxl").part.load(dtype, "cpu").requires_grad_(True)
    module(IDS).last_hidden_state.float().square().sum().backward()
    made.module.requires_grad_(True)(IDS).last_hidden_state.square().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), made.module.parameters(), strict=True):
        error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.2), name


# ---- bad files ------------------------------------------------------------------------------------------------------


def line(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


WHAT = {"clip_l": "CLIP", "clip_g": "CLIP", "t5xxl": "T5", "gemma2": "Gemma 2", "qwen3": "Qwen3",
        "qwen2.5_vl": "Qwen2.5-VL", "mistral": "Mistral"}  # fmt: skip


@pytest.mark.parametrize("given", ["clip_l", "t5xxl", *LANGUAGE_KINDS])
def test_an_encoder_of_another_kind(kind: str, given: str, tmp_path: Path) -> None:
    if WHAT[kind] == WHAT[given]:
        return
    made = make(given, tmp_path)
    problem = line(lambda: encoder(kind, made.path))
    assert problem.startswith(f"--{kind}: {made.path} is a {WHAT[given]} text encoder")
    assert problem.endswith(f"has no {WHAT[kind]} text encoder inside")


@pytest.mark.parametrize(
    "name, words",
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "is a FLUX.1 checkpoint"),
        ("transformer.resblocks.0.attn.in_proj_weight", "OpenCLIP"),
        ("lora_te1_x.lora_down.weight", "no weights of such a name"),
    ],
)
def test_files_of_other_things(kind: str, name: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(1)}, path)
    problem = line(lambda: encoder(kind, path))
    assert problem.startswith(f"--{kind}: {path} is ") and words in problem


def test_files_that_lack_something(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path)
    norm = next(n for n in load_file(made.path) if "layer_norm" in n or "layernorm" in n)
    path = rewrite(made, lambda tensors: {n: t for n, t in tensors.items() if n != norm})
    part = encoder(kind, path).part
    problem = line(lambda: part.load(None, "cpu"))
    assert f"1 weights of the {WHAT[kind]} text encoder are missing" in problem and norm in problem


def test_files_that_lack_what_tells_a_size(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path)
    lost = {"t5xxl": ".wo.weight", "clip_l": "fc1.weight", "clip_g": "fc1.weight"}.get(kind, "gate_proj.weight")
    path = rewrite(made, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(lost)})
    problem = line(lambda: encoder(kind, path))
    assert problem.startswith(f"--{kind}: {path} is incomplete: it lacks") and lost in problem


def test_truncated_files_and_missing_ones(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path)
    made.path.write_bytes(made.path.read_bytes()[:-100])
    assert "cut short" in line(lambda: encoder(kind, made.path))
    assert "does not exist" in line(lambda: encoder(kind, tmp_path / "nothing.safetensors"))
    assert "has no weights" in line(lambda: encoder(kind, tmp_path))


@pytest.mark.parametrize("given, wanted, width", [("clip_g", "clip_l", 1280), ("clip_l", "clip_g", 768)])
def test_the_other_clip_is_named(given: str, wanted: str, width: int, tmp_path: Path) -> None:
    made = make(given, tmp_path, width=width, layers=1)
    problem = line(lambda: encoder(wanted, made.path))
    names = {"clip_l": "CLIP-L", "clip_g": "CLIP-G"}
    assert problem.startswith(f"--{wanted}: {made.path} is {names[given]} (width {width}); {names[wanted]} has")
    assert encoder(given, made.path).width == width


def test_a_umt5_is_named(tmp_path: Path) -> None:
    made = make_t5(tmp_path)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    path = rewrite(made, lambda t: t | {bias.format(1): t[bias.format(0)].clone()})
    assert "is a UMT5 text encoder" in line(lambda: t5_encoder(path, option="--t5xxl"))


# ---- language models ------------------------------------------------------------------------------------------------

MAKERS = {"qwen3": make_qwen3, "qwen2.5_vl": make_qwen25_vl, "mistral": make_mistral}
ALL_LEVELS = ("", "model.", "model.language_model.", "language_model.model.", "language_model.")


@pytest.fixture(params=MAKERS)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_cut_model_gives_the_raw_states_of_the_whole_one(language: str, layout: str, tmp_path: Path) -> None:
    """Also in a folder whose configuration lists its layers, and of a file that ends where the model is cut."""
    made = MAKERS[language](tmp_path, layout=layout)
    with torch.no_grad():
        expected = made.module(IDS, output_hidden_states=True).hidden_states
    found = language_encoder(language, made.path, option="--x", layers=3)
    module, words = found.part.load(None, "cpu"), torch.ones_like(IDS).bool()
    assert found.layers == len(module.layers) == 3 and not any(n == "norm.weight" for n in module.state_dict())
    assert [*part_problems(found.part)] == []
    with torch.no_grad():
        assert_equal(language_states(module, IDS, words, (1, 2, 3)), [*expected[1:4]])
    if layout == "file":
        short = rewrite(made, lambda t: {n: x for n, x in t.items() if n != "norm.weight" and ".3." not in n})
        part = language_encoder(language, short, option="--x", layers=3).part
        assert [*part_problems(part)] == []
        assert_equal(language_states(part.load(None, "cpu"), IDS, words, (3,)), [expected[3]])
        problem = line(lambda: language_encoder(language, short, option="--x", layers=4))
        assert problem == f"--x: {short} has 3 layers, and the states of layer 4 are needed"


def test_tensors_that_have_no_place_in_a_cut_model(tmp_path: Path) -> None:
    made = make_qwen3(tmp_path)
    path = rewrite(made, lambda t: t | {"layers.2.self_attn.extra.weight": torch.zeros(1)})
    (problem,) = part_problems(language_encoder("qwen3", path, option="--x", layers=3).part)
    assert "1 tensors have no place" in problem and "layers.2.self_attn.extra" in problem


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_with_padding_equal_transformers(language: str, side: str, tmp_path: Path) -> None:
    """Also those of the padding itself, which some models look at."""
    made = MAKERS[language](tmp_path)
    words = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    words = words.flip(1) if side == "left" else words
    with torch.no_grad():
        found = language_states(made.module, IDS, words, (1, 4))
        expected = made.module(IDS, attention_mask=words.long(), output_hidden_states=True).hidden_states
        alone = made.module(IDS[:1][words[:1]][None], output_hidden_states=True).hidden_states[4]
    assert_equal(found, [expected[1], expected[4]])
    torch.testing.assert_close(found[1][:1][words[:1]][None], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_every_level_of_names(language: str, level: str, tmp_path: Path) -> None:
    """With the vision tower, the output layer and the tokenizer that such files have."""
    made = MAKERS[language](tmp_path)
    vision = {"visual": "visual.", "mistral": "vision_tower."}.get(language, "x." if language == "qwen3" else "visual.")
    vision = level.removesuffix("language_model.") + vision if language != "qwen3" else "lm_head.bias."
    more = {
        f"{vision}blocks.0.w": torch.zeros(2),
        "lm_head.weight": torch.zeros(2),
        "tekken_model": torch.zeros(9).byte(),
    }
    path = rewrite(made, lambda tensors: {level + name: x for name, x in tensors.items()} | more)
    part = language_encoder(language, path, option="--x").part
    assert part.prefix == level and [*part_problems(part)] == []
    assert_equal(outputs(language, part.load(None, "cpu")), outputs(language, made.module))


def test_rotations_of_config_files_of_older_versions(language: str, tmp_path: Path) -> None:
    """transformers 4 wrote `rope_theta` and `rope_scaling`, and models that see have them below `text_config`."""
    made = MAKERS[language](tmp_path, layout="folder")
    config = json.loads((made.path / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"] * 2
    if language == "qwen2.5_vl":
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    (made.path / "config.json").write_text(json.dumps({"text_config": config, "vision_config": {"depth": 1}}))
    other = language_encoder(language, made.path, option="--x").part
    module: Any = other.load(None, "cpu")
    assert module.config.rope_parameters["rope_theta"] == config["rope_theta"]
    assert not torch.equal(module(IDS).last_hidden_state, made.module(IDS).last_hidden_state)
    file = MAKERS[language](tmp_path).path
    assert other.fingerprint() != language_encoder(language, file, option="--x").part.fingerprint()


def test_a_qwen3_that_sees_is_named(tmp_path: Path) -> None:
    path = rewrite(make_qwen3(tmp_path), lambda tensors: tensors | {"visual.blocks.0.w": torch.zeros(2)})
    assert "is a Qwen3-VL model; a Qwen3 text encoder is needed" in line(
        lambda: language_encoder("qwen3", path, option="--qwen3")
    )


PUBLISHED = {  # kind and width of the states -> parameters without output layer and vision tower, other settings
    ("qwen3", 2560): (4_022_468_096, {}),
    ("qwen3", 1024): (596_049_920, {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                                    "num_attention_heads": 16}),
    ("qwen3", 4096): (7_568_405_504, {"hidden_size": 4096, "intermediate_size": 12288}),
    ("qwen2.5_vl", 3584): (7_070_619_136, {}),
    ("mistral", 5120): (22_901_314_560, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind, width", PUBLISHED)
def test_sizes_of_the_published_models(kind: str, width: int) -> None:
    """Read from the shapes of their files: the configuration that is built of them has these shapes again."""
    count, changes = PUBLISHED[kind, width]
    model = LANGUAGE_KINDS[kind]
    config = {**shipped_config(model.config), **changes}
    module = build_empty(partial(_build, config, kind, None))
    assert sum(p.numel() for p in module.parameters()) == count
    sizes = language_layout({name: tuple(x.shape) for name, x in module.state_dict().items()}, model.head)
    assert sizes["hidden_size"] == width and {k: v for k, v in sizes.items() if k in config and config[k] != v} == {}
