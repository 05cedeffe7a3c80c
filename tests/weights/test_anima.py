# SPDX-License-Identifier: Apache-2.0
"""Anima: every way to load, what text and pictures become, what learns, and what is saved."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.families.anima.model import MASKS, T5, Anima
from library.families.anima.modules import build_denoiser
from library.families.anima.options import AnimaFineTuneOptions, AnimaFlowOptions, AnimaOptions
from library.families.anima.parts import QWEN3, conditioner_layout, denoiser_rules, layout
from library.io.checkpoint import CheckpointForm
from library.key_tables import publish
from library.objectives.options import LossOptions
from library.options import specs
from library.rng import torch_generator
from library.types import Cond
from library.weights.loading import build_empty
from tests.families.anima import QWEN3_WIDTH, TEXT_WIDTH, make, tiny_modules, without_torchvision
from tests.tiny import make_tiny_sd
from tests.tiny_text import make_qwen3

DATA = Path(__file__).parents[1] / "data_files" / "weights"
LAYOUTS = ("files", "diffusers", "parts", "adapter")
CAPTIONS = ["a photo of a cat", "red dog", ""]
Models = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Layout -> options that name the model."""
    root = tmp_path_factory.mktemp("anima")
    return {name: make(root / name, layout=name) for name in LAYOUTS}


def family(options: Mapping[str, Any], **more: Any) -> Anima:
    return Anima(AnimaOptions(**{name: str(value) for name, value in options.items()}, **more))


def line(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


@torch.no_grad()
def encode(anima: Anima, captions: list[str] = CAPTIONS) -> Cond:
    encoder = anima.load_text_encoder(QWEN3, None, "cpu")
    return anima.encode_text(anima.tokenize(list(captions)), {QWEN3: encoder})


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_loads_bit_equal_frozen_and_configured(models: Models, kind: str) -> None:
    anima = family(models[kind])
    anima.check()
    anima.check_weights()
    denoiser, (transformer, conditioner, vae) = anima.load_denoiser(None, "cpu"), tiny_modules()
    own: Any = denoiser
    for found, made in ((own.transformer, transformer), (own.text_conditioner, conditioner),
                        (anima.load_vae(None, "cpu"), vae)):  # fmt: skip
        assert found.state_dict().keys() == made.state_dict().keys()
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in made.state_dict().items())
        assert not found.training and not any(p.requires_grad for p in found.parameters())
    without_torchvision()
    x, t, cond = torch.randn(3, 16, 4, 8), torch.tensor([0.1, 0.5, 0.8]), encode(anima)
    with torch.no_grad():  # configuration that no weight shows (heads, positions) is right as well
        text = conditioner(cond[QWEN3], cond[T5], cond[MASKS[T5]], cond[MASKS[QWEN3]])
        frame = x.unsqueeze(2)
        expected = transformer(frame, t, text, padding_mask=torch.zeros(1, 1, 32, 64)).sample.squeeze(2)
        assert torch.equal(anima.predict(denoiser, x, t, cond, None), expected)


@pytest.mark.parametrize("prefix", ["net.", "model.diffusion_model.", "diffusion_model.", ""])
def test_prefixes(models: Models, tmp_path: Path, prefix: str) -> None:
    tensors = load_file(models["files"]["pretrained_model_name_or_path"])
    renamed = {prefix + name.removeprefix("net."): tensor.bfloat16() for name, tensor in tensors.items()}
    renamed |= {f"{prefix}pos_embedder.seq": torch.arange(4.0)}  # as sd-scripts writes it
    save_file(renamed, tmp_path / "m.safetensors")
    for place in ("tokenizer", "t5_tokenizer"):
        shutil.copytree(models["files"]["qwen3"].parent / place, tmp_path / place)
    anima = family(models["files"] | {"pretrained_model_name_or_path": tmp_path / "m.safetensors"})
    anima.check()
    anima.check_weights()
    found = publish(anima.load_denoiser(None, "cpu").state_dict(), denoiser_rules(anima.load_denoiser(None, "cpu")))
    assert found.keys() == {name.removeprefix("net.") for name in tensors}
    assert all(torch.equal(tensor, tensors[f"net.{name}"].bfloat16()) for name, tensor in found.items())


def test_another_adapter_takes_the_place_of_the_models(models: Models, tmp_path: Path) -> None:
    other = make(tmp_path, layout="adapter", seed=3)["llm_adapter_path"]
    expected = tiny_modules(3)[1].state_dict()
    for kind, path in (("files", other), ("diffusers", other), ("parts", tmp_path / "pipeline")):
        loaded: Any = family(models[kind] | {"llm_adapter_path": path}).load_denoiser(None, "cpu")
        found, kept = loaded.text_conditioner.state_dict(), loaded.transformer.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(kept[name], tensor) for name, tensor in tiny_modules()[0].state_dict().items())


def test_sizes_of_the_real_model_and_its_keys(tmp_path: Path) -> None:
    """At full size, without memory: what is read from the published shapes gives the published shapes again."""
    with gzip.open(DATA / "anima_output.json.gz") as file:
        keys = {name.removeprefix("net."): tuple(shape) for name, shape in json.load(file).items()}
    adapter = {name.removeprefix("llm_adapter."): shape for name, shape in keys.items() if "llm_adapter." in name}
    real: Any = build_empty(lambda: build_denoiser(layout(keys), conditioner_layout(adapter)))
    found = {name: tuple(t.shape) for name, t in publish(real.state_dict(), denoiser_rules(real)).items()}
    tables = {name: shape for name, shape in keys.items() if name.startswith("pos_embedder.")}
    assert found | tables == keys and len(keys) == 688 and len(tables) == 3
    assert sum(p.numel() for p in real.transformer.parameters()) == 1_956_405_248
    assert sum(p.numel() for p in real.text_conditioner.parameters()) == 134_663_680
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    settings = {"num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
    plain, conditioner = build_empty(lambda: CosmosTransformer3DModel(**settings)), build_empty(AnimaTextConditioner)
    for name in ("num_attention_heads", "attention_head_dim", "num_layers", "mlp_ratio", "text_embed_dim",
                 "adaln_lora_dim", "out_channels"):  # fmt: skip
        assert real.transformer.config[name] == plain.config[name], name
    assert list(real.transformer.config.rope_scale) == [1, 4, 4]
    for name in conditioner.config:
        assert name == "_use_default_values" or real.text_conditioner.config[name] == conditioner.config[name], name


def test_pictures_larger_than_the_transformers_own_table(models: Models) -> None:
    """A side of 2064 pixels: positions beyond 128, in each layout."""
    x, t = torch.randn(1, 16, 2, 258), torch.tensor([0.5])
    for kind in ("files", "diffusers"):
        anima = family(models[kind])
        with torch.no_grad():
            assert anima.predict(anima.load_denoiser(None, "cpu"), x, t, encode(anima, ["cat"]), None).shape == x.shape


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_parts_that_are_missing_are_all_named(models: Models) -> None:
    model = models["files"]["pretrained_model_name_or_path"]
    with pytest.raises(UserError) as caught:
        family({"pretrained_model_name_or_path": model}).check()
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["--qwen3 is missing", "--vae is missing"]


def test_wrong_files(models: Models, tmp_path: Path) -> None:
    files, name = models["files"], "pretrained_model_name_or_path"
    wrong, pipeline = make_tiny_sd(tmp_path / "sd", layout="single"), models["diffusers"][name]
    told = {
        "is a Stable Diffusion 1.x or 2.x checkpoint: use train_network.py": {name: wrong},
        "is a text encoder": {name: files["qwen3"]},
        "has no LLM adapter (llm_adapter.*)": {name: models["adapter"][name]},
        "has the names of diffusers": {name: pipeline / "transformer" / "diffusion_pytorch_model.safetensors"},
        "is no Anima folder": {name: tmp_path},
        "holds a AutoencoderKLQwenImage": {name: pipeline / "vae"},
        "is a VAE and has no Qwen3 text encoder inside": {"qwen3": files["vae"]},
        "is an Anima checkpoint and has no Qwen3": {"qwen3": files[name]},
        "is a VAE, not a checkpoint": {name: files["vae"]},
        "is a VAE of another kind": {"vae": wrong},
        "is no LLM adapter of Anima": {"llm_adapter_path": files["vae"]},
    }
    for text, given in told.items():
        (option,) = given
        found = line(family(files | given).check)
        assert text in found and (option == name or found.startswith(f"--{option}: ")), found


def test_a_text_encoder_of_another_size(models: Models, tmp_path: Path) -> None:
    wide = make_qwen3(tmp_path, width=2 * QWEN3_WIDTH).path
    shutil.copytree(models["files"]["qwen3"].parent / "t5_tokenizer", tmp_path / "t5_tokenizer")
    assert "Anima needs Qwen3-0.6B" in line(family(models["files"] | {"qwen3": wide}).check)
    other = make(tmp_path / "other", layout="adapter")["llm_adapter_path"]
    tensors = load_file(other)
    tensors["llm_adapter.embed.weight"] = tensors["llm_adapter.embed.weight"][:9]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "few.safetensors")
    found = line(family(models["files"] | {"llm_adapter_path": tmp_path / "few.safetensors"}).check)
    assert "the LLM adapter of" in found and "only 9" in found


@pytest.mark.parametrize("name", ["v2", "v_parameterization", "weighted_captions"])
def test_options_that_make_no_sense(name: str) -> None:
    with pytest.raises(ValueError, match="has no meaning here"):
        specs({"model": AnimaOptions})[name].read("true")


def test_sage_attention_is_refused() -> None:
    found = [*AnimaOptions(pretrained_model_name_or_path="x", attn_mode="sageattn").problems()]
    assert found == ["--attn_mode sageattn: SageAttention has no backward pass, so nothing would learn; leave it out"]


# ---- text -----------------------------------------------------------------------------------------------------------


def test_states_and_ids_cut_to_the_longest(models: Models) -> None:
    anima = family(models["files"])
    tokens, cond = anima.tokenize(CAPTIONS), encode(anima)
    assert tokens.ids[QWEN3].shape == tokens.ids[T5].shape == (3, 512)
    assert tokens.lengths[QWEN3][2] == 0 and tokens.lengths[T5][2] == 1  # the empty caption is T5's end token
    assert cond[QWEN3].shape == (3, max(tokens.lengths[QWEN3]), QWEN3_WIDTH)
    assert torch.equal(cond[T5], tokens.ids[T5][:, : max(tokens.lengths[T5])])
    assert not cond[QWEN3][2].any() and cond[MASKS[QWEN3]][2].tolist() == [True] + [False] * (cond[QWEN3].shape[1] - 1)
    encoder = anima.load_text_encoder(QWEN3, None, "cpu")
    for i, length in enumerate(tokens.lengths[QWEN3][:2]):
        with torch.no_grad():
            states = encoder(tokens.ids[QWEN3][i : i + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(cond[QWEN3][i, :length], states, rtol=1e-5, atol=1e-6)
        assert not cond[QWEN3][i, length:].any()


def test_conds_split_and_join_again(models: Models) -> None:
    anima = family(models["files"])
    cond = encode(anima)
    parts = anima.split_cond(cond)
    assert [len(part[QWEN3]) for part in parts] == [max(1, n) for n in anima.tokenize(CAPTIONS).lengths[QWEN3]]
    joined = anima.join_conds(parts)
    assert joined.keys() == cond.keys() and all(torch.equal(joined[name], cond[name]) for name in cond)
    alone = anima.join_conds(parts[:1] * 2)
    assert alone.keys() == {QWEN3, T5} and alone[T5].dtype == torch.int64
    again = anima.join_conds(anima.split_cond(alone))
    assert all(torch.equal(again[name], alone[name]) for name in alone)


@torch.no_grad()
def test_padding_never_reaches_the_model(models: Models) -> None:
    """A text alone, in a batch, and padded to the limit as sd-scripts has it: the same numbers. Also the empty one."""
    anima = family(models["files"])
    denoiser, cond = anima.load_denoiser(None, "cpu"), encode(anima)
    x, t = torch.randn(3, 16, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    together = anima.predict(denoiser, x, t, cond, None)
    for i, part in enumerate(anima.split_cond(cond)):
        alone = anima.predict(denoiser, x[i : i + 1], t[i : i + 1], anima.join_conds([part]), None)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    full = {name: torch.zeros(3, 512, *cond[name].shape[2:], dtype=cond[name].dtype) for name in cond}
    for name in cond:
        full[name][:, : cond[name].shape[1]] = cond[name]
    full[MASKS[QWEN3]][2] = False  # no token at all
    torch.testing.assert_close(anima.predict(denoiser, x, t, full, None), together, rtol=1e-4, atol=1e-5)


def test_limits(models: Models) -> None:
    anima = family(models["files"], qwen3_max_token_length=9, t5_max_token_length=7)
    assert anima.token_limit == 6
    caption = "cat " * 6
    assert anima.count_tokens([caption.strip()])[0] >= 6
    tokens = anima.tokenize([caption * 3, "cat"])
    assert tokens.truncated == (0,) and tokens.ids[QWEN3].shape == (2, 9) and tokens.ids[T5].shape == (2, 7)
    assert anima.text_fingerprint(QWEN3) != family(models["files"]).text_fingerprint(QWEN3)
    long = family(models["files"], t5_max_token_length=600)
    with torch.no_grad():  # each text is as long, whatever else is in its batch
        cond = encode(long, ["cat"])
        module: Any = long.load_denoiser(None, "cpu")
        assert module.text_conditioner(cond[QWEN3], cond[T5]).shape == (1, 600, TEXT_WIDTH)


# ---- training -------------------------------------------------------------------------------------------------------


def test_time_reaches_the_model_in_float32(models: Models) -> None:
    """bfloat16 has three digits: of eleven neighbours it would leave four."""
    anima = family(models["files"])
    denoiser: Any = anima.load_denoiser(torch.bfloat16, "cpu")
    seen = []
    denoiser.transformer.time_embed.time_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    t = torch.arange(900, 911) / 1000
    cond = {name: tensor[:1].expand(11, *tensor.shape[1:]) for name, tensor in encode(anima, ["cat"]).items()}
    cond[QWEN3] = cond[QWEN3].bfloat16()
    with torch.no_grad():
        anima.predict(denoiser, torch.zeros(11, 16, 2, 2).bfloat16(), t, cond, None)
    assert seen[0].dtype == torch.float32 and len(seen[0].unique(dim=0)) == 11


GROUPS = {
    "llm_adapter": ".llm_adapter.",
    "self_attn": ".self_attn.",
    "cross_attn": ".cross_attn.",
    "mlp": ".mlp.",
    "mod": ".adaln_modulation",
}


def names_by_group(groups: list[dict[str, Any]], denoiser: nn.Module) -> dict[str, set[str]]:
    rules = {rule.ours[0]: f".{rule.published}" for rule in denoiser_rules(denoiser)}
    names = {id(parameter): rules[name] for name, parameter in denoiser.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_rates_by_part(models: Models) -> None:
    """As sd-scripts sorts the published names. The LLM adapter learns only when it has a rate."""
    anima = family(models["files"])
    denoiser = anima.load_denoiser(None, "cpu")
    usual = anima.denoiser_groups(denoiser, AnimaFineTuneOptions(), 1e-5)
    assert [(group["name"], group["lr"]) for group in usual] == [("denoiser", 1e-5), ("llm_adapter", 0.0)]
    rates = {f"{name}_lr": (i + 1) * 1e-6 for i, name in enumerate(GROUPS)}
    groups = anima.denoiser_groups(denoiser, AnimaFineTuneOptions(**rates), 1e-5)
    assert {group["name"]: group["lr"] for group in groups} == {
        "denoiser": 1e-5,
        **{name: rates[f"{name}_lr"] for name in GROUPS},
    }
    for name, own in names_by_group(groups, denoiser).items():
        assert own
        for path in own:
            assert next((group for group, mark in GROUPS.items() if mark in path), "denoiser") == name, path
    frozen = anima.denoiser_groups(denoiser, AnimaFineTuneOptions(mlp_lr=0.0), 1e-5)
    assert {group["name"]: group["lr"] for group in frozen}["mlp"] == 0.0


def test_the_weighting_scheme_counts() -> None:
    """As in sd-scripts, where the prediction is compared as it is."""
    options = AnimaFlowOptions(weighting_scheme="cosmap")
    assert [*options.problems()] == []
    anima = Anima(AnimaOptions())
    objective = anima.objective(options, LossOptions())
    noised = objective.noise(torch.zeros(2, 16, 2, 2), torch.tensor([0.2, 0.5]), torch_generator("x", device="cpu"))
    s = torch.tensor([0.2, 0.5])
    torch.testing.assert_close(noised.weight, 2 / (torch.pi * (1 - 2 * s + 2 * s**2)))


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(models: Models, tmp_path: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The published tensors, and those of a saved file."""
    anima = family(models["diffusers"])
    anima.save(anima.load_denoiser(None, "cpu"), {}, tmp_path / "m.safetensors", CheckpointForm())
    yield load_file(models["files"]["pretrained_model_name_or_path"]), load_file(tmp_path / "m.safetensors")


def test_saved_as_sd_scripts_saves_it(saved: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    published, found = saved
    assert all(torch.equal(found.pop(name), tensor) for name, tensor in published.items())
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "net.pos_embedder.seq": (256,),
        "net.pos_embedder.dim_spatial_range": (5,),
        "net.pos_embedder.dim_temporal_range": (6,),
    }
    shares = torch.arange(0, 10, 2)[:5] / 10
    torch.testing.assert_close(found["net.pos_embedder.dim_spatial_range"], shares)
