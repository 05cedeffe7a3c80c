# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's and Forge's rules: against formulas written down literally, on files that are right and on spoiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.adapters.readers.comparison import COMFY, DIFFUSERS, FORGE, NetworkComparison, Program, report
from library.adapters.readers.known_keys import key_lines
from library.families.adapters import load_network_module
from tests.adapters.families import TINY
from tests.adapters.known_formats import TABLES, convert, to_kohya
from tests.adapters.lora_samples import comfy_apply, comfy_keys, flux, published_weights
from tests.adapters.models import distance, randomize, tiny_clip, tiny_unet

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def network(module: str = "lora", alpha: float = 2.7, **arguments: str) -> Any:
    torch.manual_seed(5)
    arguments.setdefault("conv_dim", "2") if module in ("lora", "loha", "lokr") else None
    made = load_network_module(f"networks.{module}").create_network(
        1.0, 4, alpha, None, tiny_clip(), tiny_unet(), **arguments
    )
    randomize(made)
    return made


def taken(made: Any, tensors: dict[str, Tensor], *programs: Program) -> dict[str, str]:
    """Program -> "yes" or what it does."""
    check = NetworkComparison(made.trained(), "sd1", TABLES)
    verdicts = {program.name: check.verdict(program, tensors) for program in programs or (COMFY, FORGE)}
    return {name: "yes" if found.takes else found.text() for name, found in verdicts.items()}


# ---- every kind ---------------------------------------------------------------------------------------------------

TUCKER = {"use_tucker": "True"}
ROWS, COLUMNS = {"dora_wd": "True"}, {"dora_wd": "True", "wd_on_output": "False"}
KINDS: dict[str, tuple[str, dict[str, str], bool, bool]] = {  # ... read by ComfyUI, by Forge
    "lora": ("lora", {}, True, True),
    "lora, tucker and norms": ("lora", {**TUCKER, "train_norm": "True"}, True, True),
    "lora, scalar, rslora": ("lora", {"use_scalar": "True", "rs_lora": "True"}, True, True),
    "dora, rows": ("lora", ROWS, False, False),
    "dora, columns": ("lora", COLUMNS, True, True),
    "loha": ("loha", TUCKER, True, True),
    "loha, dora, columns": ("loha", COLUMNS, True, True),
    "lokr": ("lokr", {"factor": "4"}, True, True),
    "lokr, tucker": ("lokr", TUCKER, True, True),
    "lokr, dora, rows": ("lokr", ROWS, False, False),
    "dylora": ("dylora", {}, True, True),
    "oft": ("oft", {"enable_conv": "True"}, False, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kohya_files(kind: str) -> None:
    module, arguments, comfy, forge = KINDS[kind]
    made = network(module, 1e-3 if module == "oft" else 2.7, **arguments)
    found = taken(made, made.state(None))
    assert [found["ComfyUI"] == "yes", found["Forge"] == "yes"] == [comfy, forge], found
    if not comfy:
        told = "loads nothing" if module == "oft" else f"changes {len(made.named_layers())} of"
        assert found["ComfyUI"].startswith(told)


@pytest.mark.parametrize("bound", [1e-3, 0.9], ids=["bounded", "free"])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_oft_in_comfy_format(family: str, bound: float) -> None:
    """The same rotations under names that ComfyUI has, also of the parts of fused layers; and back."""
    if family == "sd1":
        made = network("oft", bound, enable_all_linear="True")
    else:
        module = load_network_module("networks.oft_flux")
        made = module.create_network(1.0, 4, bound, None, None, TINY["flux"].make(), enable_all_linear="True")
        randomize(made)
    state = made.state(None)
    tensors = convert(state, "comfy")
    verdict = NetworkComparison(made.trained(), family, TABLES).verdict(COMFY, tensors)
    assert verdict.takes, verdict.text()
    assert key_lines(tensors, TABLES)[0] == "ComfyUI: knows every key"
    again = to_kohya(tensors)
    assert again.keys() == state.keys()
    assert all(torch.allclose(again[key], value, rtol=1e-6) for key, value in state.items())
    assert to_kohya(tensors, among=("sd1", "sdxl", "flux")).keys() == state.keys()
    unbound = {key: value * 0 if key.endswith(".alpha") else value for key, value in tensors.items()}
    if family == "sd1":  # as LyCORIS has it; no name in kohya's format has a rotation without a bound
        assert {key.partition("_")[0] for key in to_kohya(unbound)} == {"lora"}


def test_rotations_by_the_formula() -> None:
    """W' = Rᵀ W with R = (I + Q)(I - Q)⁻¹, which is what ComfyUI computes of a comfy file."""
    made = network("oft", 0.9)
    layer = made.named_layers()[QUERY.replace("lora_", "oft_")]
    [own] = [value for key, value in convert(made.state(None), "comfy").items() if key.endswith("1.1.transformer_blocks.0.attn1.to_q.oft_blocks")]  # fmt: skip  # noqa: E501
    skew = own.double() - own.double().transpose(1, 2)
    unit = torch.eye(own.shape[-1], dtype=torch.float64)
    turn = torch.block_diag(*((unit + q) @ torch.linalg.inv(unit - q) for q in skew))
    weight = layer.target.weight.double()
    assert distance(layer.merged_weight(), turn.T @ weight) < 1e-5


def test_formulas_equal_the_literal_comfyui() -> None:
    """FLUX.1 with fused and swapped layers: the change of each weight, written down in lora_samples."""
    sample, tiny = flux(), TINY["flux"]
    made: Any = tiny.module.create_network(1.0, 4, 2.7, None, None, sample.model, in_dims="2,2,2,2,2")
    randomize(made)
    check = NetworkComparison(made.trained(), "flux", TABLES)
    for form in ("kohya", "comfy", "peft"):
        tensors = convert(made.state(None), form)
        assert check.verdict(COMFY, tensors).takes
        before = published_weights(sample)
        after, unused = comfy_apply(tensors, before, comfy_keys(sample))
        assert not unused
        for name, layer in check.layers.items():
            path = next(p for p in before if f"lora_unet_{p.replace('.', '_')}" == name)
            assert layer.probe is not None
            assert distance(check._change(layer), (after[path] - before[path]).double() @ layer.probe.flat) < 1e-4


# ---- spoiled files ------------------------------------------------------------------------------------------------


def transposed(own: dict[str, Tensor]) -> None:
    up, down = f"{QUERY}.lora_up.weight", f"{QUERY}.lora_down.weight"
    own[up], own[down] = own[down].T.contiguous(), own[up].T.contiguous()


def without_alpha(own: dict[str, Tensor]) -> None:
    del own[f"{QUERY}.alpha"]


def wrong_axis(own: dict[str, Tensor]) -> None:
    own[f"{QUERY}.dora_scale"] = torch.full((1, own[f"{QUERY}.lora_down.weight"].shape[1]), 3.0)


def misspelt(own: dict[str, Tensor]) -> None:
    for ending in ("alpha", "lora_up.weight", "lora_down.weight"):
        own[f"{QUERY}_.{ending}"] = own.pop(f"{QUERY}.{ending}")


@pytest.mark.parametrize("spoil", [transposed, without_alpha, wrong_axis, misspelt])
def test_a_spoiled_file_is_noticed(spoil: Callable[[dict[str, Tensor]], None]) -> None:
    made = network()
    tensors = made.state(None)
    assert set(taken(made, tensors, COMFY, FORGE, DIFFUSERS).values()) == {"yes"}
    spoil(tensors)
    found = taken(made, tensors, COMFY, FORGE)
    for told in found.values():
        assert QUERY in told and ("leaves 1 of" if spoil is misspelt else "changes 1 of") in told


def test_half_precision_is_no_fault_but_a_wrong_scale_is() -> None:
    made = network()
    for dtype in (torch.bfloat16, torch.float16):
        tensors = made.state(dtype)
        assert set(taken(made, tensors).values()) == {"yes"}
        tensors[f"{QUERY}.lora_up.weight"] *= 1.05
        assert all("changes 1 of" in told and QUERY in told for told in taken(made, tensors).values())


# ---- what is said -------------------------------------------------------------------------------------------------


def test_lines_say_what_is_for_a_program() -> None:
    made = network()
    state = made.state(None)
    rewritten = lambda form, names: convert({k: v for k, v in state.items() if k.partition(".")[0] in names}, form)
    found = report(NetworkComparison(made.trained(), "sd1", TABLES), convert(state, "comfy"), "comfy", rewritten)
    assert found.taken_by == ["ComfyUI"]
    forge, diffusers = found.warnings
    assert forge.startswith("Forge refuses the file: 36 of 273 keys are unknown to it, 12 are forgiven: text_encoders.")
    assert forge.endswith("; --lora_format kohya is for it") and "\n" not in forge
    assert diffusers.startswith("diffusers refuses the file: all keys must have 'lora'")
    assert diffusers.endswith("; --lora_format kohya is for it")
    mark = "layers.0.mlp.fc1"
    few = {key: value for key, value in convert(state, "comfy").items() if mark in key or "clip" not in key}
    assert "leaves 12 of 91 layers" in taken(made, few, FORGE)["Forge"]  # three unknown keys are forgiven


T5 = "encoder_block_0_layer_0_SelfAttention_q"


@pytest.mark.parametrize(
    ("model", "prefix", "comfy", "forge"),
    [
        ("flux", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", True, True),
        ("flux", f"lora_te3_{T5}", True, True),
        ("flux", f"lora_te2_{T5}", True, False),
        ("chroma", f"lora_te3_{T5}", False, True),
        ("sd3", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj", True, True),
        ("sd3", "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj", True, False),
        ("lumina", "lora_te_layers_0_self_attn_q_proj", False, None),
        ("lumina", "text_encoders.gemma2_2b.transformer.model.layers.0.self_attn.q_proj", True, None),
        ("anima", "lora_te_layers_0_self_attn_q_proj", True, None),
        ("anima", "lora_unet_llm_adapter_blocks_0_mlp_2", True, None),
        ("anima", "transformer.transformer_blocks.0.attn1.to_q", False, None),
        ("sdxl", "lora_unet_input_blocks_4_1_proj_in", True, True),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_proj_in", True, True),
        ("sdxl", "lycoris_down_blocks_1_attentions_0_proj_in", True, False),
        ("sd1", "unet.down_blocks.0.attentions.0.proj_in", True, True),
        ("sd1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", False, False),
        ("lumina", "transformer.layers.0.attn.to_q", False, None),
        ("sd3", "transformer.transformer_blocks.0.attn.to_q", True, False),
    ],
)
def test_names(model: str, prefix: str, comfy: bool, forge: bool | None) -> None:
    from library.adapters.readers.programs import comfy_names, forge_names
    from library.adapters.readers.reading import NamedModel

    found = NamedModel.of(model, [prefix], TABLES)
    assert (prefix in comfy_names(found)) == comfy
    assert bool(found.formats("Forge")) == (forge is not None)
    assert forge is None or (prefix in forge_names(found)) == forge


# ---- third-party networks -----------------------------------------------------------------------------------------

LYCORIS: dict[str, tuple[dict[str, str], bool, bool]] = {  # ... read by ComfyUI, by Forge
    "lora": ({"rs_lora": "True", "use_scalar": "True"}, True, True),
    "loha": ({}, True, True),
    "lokr": ({"factor": "4"}, True, True),
    "diag-oft": ({}, True, False),
    "boft": ({}, True, False),
    "glora": ({}, True, False),
    "full": ({}, True, True),
    "ia3": ({}, False, False),
    "diag-oft ": ({"constraint": "0.01"}, False, False),  # it bounds by rows and saves the number without them
}


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris(name: str) -> None:
    pytest.importorskip("lycoris.kohya")
    arguments, comfy, forge = LYCORIS[name]
    torch.manual_seed(2)
    made: Any = load_network_module("lycoris.kohya").create_network(
        1.0, 4, 2.0, None, tiny_clip(), tiny_unet(), 0.0, preset="attn-mlp", algo=name.strip(), **arguments
    )
    made.attach(train_denoiser=True, train_text_encoder=True)
    randomize(made, size=0.1)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    found = taken(made, made.state(None))
    assert [found["ComfyUI"] == "yes", found["Forge"] == "yes"] == [comfy, forge], found
    after = made.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("algo", ["lora", "lokr"])
@pytest.mark.parametrize("family", ["flux", "sd3", "lumina"])
def test_lycoris_on_fused_layers(family: str, algo: str) -> None:
    """A published layer that is several modules of ours is compared as the network sees it."""
    pytest.importorskip("lycoris.kohya")
    torch.manual_seed(2)
    module = load_network_module("lycoris.kohya")
    made: Any = module.create_network(1.0, 4, 2.0, None, None, TINY[family].make(), 0.0, algo=algo)
    made.attach(train_denoiser=True, train_text_encoder=False)
    randomize(made, size=0.1)
    state = made.state(None)
    layers = made.trained()
    assert {layer.name for layer in layers} == {key.partition(".")[0] for key in state}
    verdict = NetworkComparison(layers, family, TABLES).verdict(COMFY, state)
    assert verdict.takes, verdict.text()
    fused = next(key for key in state if "qkv" in key and key.endswith(("lora_up.weight", "lokr_w1")))
    state[fused] *= 1.05
    assert fused.partition(".")[0] in NetworkComparison(layers, family, TABLES).verdict(COMFY, state).text()


def test_a_network_whose_layers_have_no_names() -> None:
    """Nothing was compared, so nothing is said to be as it was trained."""
    found = report(NetworkComparison([], "sd1", TABLES), {"shift": torch.ones(4)}, "kohya", lambda form, names: {})
    assert not found.taken_by
    assert [line.partition(":")[0] for line in found.warnings] == ["what other programs make of it is not known"]


def test_the_network_is_as_before() -> None:
    """Training or evaluation, devices, dtypes and draws."""
    made = network("lora", **ROWS)
    made.attach(train_denoiser=True, train_text_encoder=True)
    made.train()
    modules: list[nn.Module] = [*made.modules()]
    before = ([module.training for module in modules], torch.get_rng_state(), {**made.exact_state()})
    hooks = [len(layer.target.modules[0].module._forward_hooks) for layer in made.named_layers().values()]
    taken(made, made.state(None))
    assert [module.training for module in modules] == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(made.exact_state()[name], value) for name, value in before[2].items())
    assert [len(layer.target.modules[0].module._forward_hooks) for layer in made.named_layers().values()] == hooks
