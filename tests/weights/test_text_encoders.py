# SPDX-License-Identifier: Apache-2.0
"""Text encoders from every kind of source equal the modules that transformers itself reads, and bad files say why."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.weights.text_encoders import EncoderPart, clip_encoder, gemma2_encoder, t5_encoder
from tests.tiny_text import Made, make_clip_g, make_clip_l, make_gemma2, make_t5

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
}
LEVELS = {"clip_l": "text_model.", "clip_g": "text_model.", "gemma2": "model."}


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


WHAT = {"clip_l": "CLIP", "clip_g": "CLIP", "t5xxl": "T5", "gemma2": "Gemma 2"}


@pytest.mark.parametrize("given", ["clip_l", "t5xxl", "gemma2"])
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
    lost = {"t5xxl": ".wo.weight", "gemma2": "gate_proj.weight"}.get(kind, "fc1.weight")
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
