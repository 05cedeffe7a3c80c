# SPDX-License-Identifier: Apache-2.0
"""Files of LyCORIS, made by LyCORIS: each kind is merged as LyCORIS applies it; DoRA on both axes in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.adapters.file_readers import pieces, reader_of
from library.adapters.formats.conversion import by_module
from library.adapters.formats.deltas import added
from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.checkpoint_merge import Adapter, MergedWeights
from library.adapters.surgery.merge import report_merged
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError
from tests.adapters.known_formats import BY_NAME, convert, dora_norms, read_lora, to_kohya
from tests.adapters.lora_samples import flat, flux, published_weights
from tests.adapters.single_layers import CONV, LINEAR, NORM, PUBLISHED, Held, merged, module_for

# ---- LyCORIS ------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("locon.LoConModule", {}),
    "locon_tucker": ("locon.LoConModule", {"use_tucker": True}),
    "dora": ("locon.LoConModule", {"weight_decompose": True}),
    "dora_input": ("locon.LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha.LohaModule", {}),
    "loha_tucker_dora": ("loha.LohaModule", {"use_tucker": True, "weight_decompose": True}),
    "loha_dora_input": ("loha.LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "lokr": ("lokr.LokrModule", {"lora_dim": 1}),
    "lokr_both": ("lokr.LokrModule", {"lora_dim": 1, "decompose_both": True}),
    "lokr_tucker": ("lokr.LokrModule", {"lora_dim": 1, "use_tucker": True}),
    "lokr_full_dora": ("lokr.LokrModule", {"full_matrix": True, "weight_decompose": True}),
    "lokr_dora_input": ("lokr.LokrModule", {"weight_decompose": True, "wd_on_out": False}),
    "dylora": ("locon.LoConModule", {"lora_dim": 8, "rs_lora": True}),
    "glora": ("glora.GLoRAModule", {}),
    "ia3": ("ia3.IA3Module", {}),
    "ia3_input": ("ia3.IA3Module", {"train_on_input": True}),
    "full": ("full.FullModule", {}),
    "diag_oft": ("diag_oft.DiagOFTModule", {}),
    "diag_oft_bound": ("diag_oft.DiagOFTModule", {"constraint": 0.01, "rescaled": True}),
    "boft": ("boft.ButterflyOFTModule", {}),
    "boft_bound": ("boft.ButterflyOFTModule", {"constraint": 0.01, "rescaled": True}),
}


def lycoris(kind: str, name: str, module: nn.Module) -> Any:
    """A module of LyCORIS with random values."""
    import lycoris.modules

    where, arguments = KINDS[kind]
    file, _, cls = where.partition(".")
    own = getattr(__import__(f"lycoris.modules.{file}", fromlist=[cls]), cls)
    adapter = own(name, module, 1.0, **{"lora_dim": 4, "alpha": 2, **arguments})
    assert lycoris.modules
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def file_of(name: str, adapter: Any) -> dict[str, Tensor]:
    return {f"{name}.{key}": value.detach().clone() for key, value in adapter.state_dict().items()}


@pytest.mark.parametrize("name", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lycoris_is_merged_as_lycoris_does(kind: str, name: str) -> None:
    """Into a checkpoint, and as --base_weights into a model; the same when it is at work without merging."""
    module = module_for(name)
    adapter = lycoris(kind, name, module)
    x = torch.randn(2, 16, 5, 5) if name == CONV else torch.randn(2, 16)
    with torch.no_grad():
        plain = module(x)
        adapter.apply_to()
        expected = module(x)  # its `get_merged_weight` of LoHa and LoKr has alpha / rank twice (4.1.3), this once
        tensors = file_of(name, adapter)  # `full` holds the difference only now
        adapter.restore()
        found = merged(name, module, tensors)
        weight, bias = found["weight"], found["bias"]
        assert not torch.allclose(expected, plain, atol=1e-2)
        run = nn.functional.linear if name == LINEAR else lambda *given: nn.functional.conv2d(*given, padding=1)
        assert torch.allclose(run(x, weight, bias), expected, atol=2e-5)
    own = by_module(tensors)[name]
    reader = reader_of(name, own)
    assert reader is not None
    layer = reader.from_tensors(TargetSpec(name, (TargetModule(name, module),), "denoiser"), own, None)
    assert layer.problem(own) is None
    layer.load_tensors(own)
    with torch.no_grad():
        layer.attach()
        assert torch.allclose(module(x), expected, atol=2e-5)
        layer.detach()
        layer.merge()
        assert torch.allclose(module(x), expected, atol=2e-5) and torch.allclose(module.weight, weight, atol=1e-5)


def test_norms_and_a_bias_beside_a_lora() -> None:
    norm, conv = module_for(NORM), module_for(CONV)
    both = {f"{NORM}.w_norm": torch.rand(16), f"{NORM}.b_norm": torch.rand(16)}
    found = merged(NORM, norm, both, 0.5)
    assert torch.allclose(found["weight"], norm.weight + both[f"{NORM}.w_norm"] / 2)
    assert torch.allclose(found["bias"], norm.bias + both[f"{NORM}.b_norm"] / 2)
    tensors = file_of(CONV, lycoris("locon", CONV, conv))
    expected = merged(CONV, conv, tensors, 0.5)["weight"]
    found = merged(CONV, conv, {**tensors, f"{CONV}.diff_b": torch.ones(16)}, 0.5)
    assert torch.equal(found["weight"], expected) and torch.allclose(found["bias"], conv.bias + 0.5)
    assert [set(piece) for piece in pieces({"diff": torch.ones(1), "diff_b": torch.ones(1)})] == [{"diff", "diff_b"}]


def test_only_layers_that_change_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path = f"{PUBLISHED[LINEAR]}.weight"
    held = Held({path: torch.ones(16, 16), f"{PUBLISHED[CONV]}.weight": torch.ones(16, 16, 3, 3)})
    own = {"lora_down.weight": torch.ones(2, 16), "lora_up.weight": torch.ones(16, 2)}
    idle = {"oft_blocks": torch.zeros(4, 4, 4)}
    layers = CheckpointLayers(BY_NAME["sd1"], held.shapes)
    weights = MergedWeights(held, layers, [Adapter("x", {LINEAR: own, CONV: idle}, lambda layer: 1.0)])
    for name in held.tensors:
        weights.tensor(name)
    report_merged("out", weights)
    assert "out: 1 layers merged" in caplog.text
    assert f"out: 1 layers of the adapters change nothing: {CONV}" in caplog.text


UNFIT = {
    "T-LoRA": ({"q_layer.weight": (4, 16), "p_layer.weight": (16, 4), "lambda_layer": (1, 4)}, "of no kind that can"),
    "GLoRA of another layer": ({"a1.weight": (8, 4), "a2.weight": (4, 8), "b1.weight": (16, 4), "b2.weight": (4, 8)},
                               "the layer has 16 x 16"),
    "half a GLoRA": ({"a1.weight": (16, 4), "a2.weight": (4, 16)}, "has no b1.weight"),
    "OFT": ({"oft_blocks": (4, 3, 3)}, "oft_blocks has the shape (4, 3, 3)"),
    "BOFT": ({"oft_blocks": (5, 4, 4, 4)}, "oft_blocks has the shape (5, 4, 4, 4)"),
    "full": ({"diff": (16, 15)}, "diff has the shape (16, 15)"),
    "bias": ({"diff": (16, 16), "diff_b": (15,)}, "diff_b has 15 numbers"),
    "half a LoRA": ({"lora_down.weight": (4, 16)}, "of no kind that can be merged (lora_down.weight)"),
    "more": ({"diff": (16, 16), "other": (1,)}, "has an unknown tensor other"),
    "DoRA of another layer": ({"lora_down.weight": (4, 16), "lora_up.weight": (16, 4), "dora_scale": (1, 15)},
                              "dora_scale has the shape (1, 15)"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_merged_is_named(case: str) -> None:
    shapes, expected = UNFIT[case]
    with pytest.raises(UserError) as error:
        merged(LINEAR, module_for(LINEAR), {f"{LINEAR}.{name}": torch.ones(shape) for name, shape in shapes.items()})
    assert f"x: 1 layers do not fit the model: {LINEAR}" in str(error.value) and expected in str(error.value)


# ---- DoRA: the key says the axis ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("kind", ["dora", "dora_input", "loha_tucker_dora", "loha_dora_input", "lokr_full_dora"])
def test_dora_to_comfy_and_back(kind: str, name: str) -> None:
    """ComfyUI: m V / |W| on the output axis, m V / |V| on the input axis. Its file merges as the trained one."""
    module = module_for(name)
    tensors = file_of(name, lycoris(kind, name, module))
    expected = merged(name, module, tensors)["weight"]
    norms = dora_norms(tensors, lambda layer: module.weight.detach())
    comfy = convert(tensors, "comfy", norms=norms)
    [m] = [value for key, value in comfy.items() if key.endswith(".dora_scale")]
    plain = {key: value for key, value in tensors.items() if not key.endswith("dora_scale")}
    v = merged(name, module, plain)["weight"]
    output = m.shape[0] == 16  # as ComfyUI decides
    assert output == ("input" not in kind)
    over = module.weight.detach().flatten(1) if output else v.transpose(0, 1).flatten(1)
    assert torch.allclose(m * v / over.norm(dim=1).reshape(m.shape), expected, atol=1e-5)
    assert torch.allclose(merged(name, module, to_kohya(comfy))["weight"], expected, atol=1e-5)
    back = convert(comfy, "kohya", norms=norms)
    assert back.keys() == tensors.keys()
    assert all(torch.allclose(back[key], value, rtol=1e-5) for key, value in tensors.items())
    if output:
        with pytest.raises(UserError, match="is a DoRA: ComfyUI scales it by the base model's weights"):
            convert(comfy, "kohya")


def test_magnitudes_of_peft_are_of_the_output_axis() -> None:
    """Their shape for a square convolution is that of kohya's input axis."""
    tensors = file_of(CONV, lycoris("dora", CONV, module_for(CONV)))
    peft = convert(tensors, "peft")
    [m] = [value for key, value in peft.items() if key.endswith("lora_magnitude_vector")]
    assert m.shape == (1, 16, 1, 1)
    assert torch.equal(to_kohya(peft)[f"{CONV}.dora_scale"], tensors[f"{CONV}.dora_scale"])
    columns = file_of(CONV, lycoris("dora_input", CONV, module_for(CONV)))
    comfy = convert(columns, "comfy")
    assert torch.equal(to_kohya(comfy)[f"{CONV}.dora_scale"], columns[f"{CONV}.dora_scale"])
    with pytest.raises(UserError, match="no name in the peft format"):
        convert(columns, "peft")


def test_dora_over_columns_of_parts_of_one_layer_is_refused() -> None:
    """OneTrainer's default for FLUX: q, k and v each with magnitudes of their own inputs."""
    found: dict[str, Tensor] = {}
    for part in ("to_q", "to_k", "to_v"):
        name = f"lora_transformer_transformer_blocks_0_attn_{part}"
        found |= {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.ones(32, 4),
                  f"{name}.dora_scale": torch.ones(1, 32)}  # fmt: skip
    with pytest.raises(UserError, match="img_attn_qkv: DoRA over input columns of 3 parts of one layer") as error:
        to_kohya(found)
    assert "\n" not in str(error.value)
    assert {key.partition(".")[0] for key in to_kohya(found, apart=True)} == {
        f"lora_unet_transformer_blocks_0_attn_{part}" for part in ("to_q", "to_k", "to_v")
    }
    rows = {key: value.T.contiguous() if key.endswith("dora_scale") else value for key, value in found.items()}
    assert to_kohya(rows)["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"].shape == (96, 1)


def test_parts_that_are_no_one_layer_are_merged_each_on_its_own(tmp_path: Path) -> None:
    """LoKr, LoHa, full matrices and DoRA over columns on layers of diffusers, as SimpleTuner writes them for FLUX.1."""
    sample = flux(double=1, single=1)
    modules = dict(sample.model.named_modules())
    draw = torch.Generator().manual_seed(2)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    own = {
        "transformer_blocks.0.attn.to_q": {"lokr_w1": rand(4, 4), "lokr_w2": rand(8, 8), "alpha": torch.ones(())},
        "transformer_blocks.0.attn.to_v": {"lora_down.weight": rand(2, 32), "lora_up.weight": rand(32, 2),
                                           "dora_scale": rand(1, 32).abs() + 1},
        "single_transformer_blocks.0.proj_mlp": {"diff": rand(128, 32), "diff_b": rand(128)},
        "norm_out.linear": {"hada_w1_a": rand(64, 2), "hada_w1_b": rand(2, 32), "hada_w2_a": rand(64, 2),
                            "hada_w2_b": rand(2, 32)},
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    save_file({f"lycoris_{flat(n)}.{suffix}": value for n, t in own.items() for suffix, value in t.items()}, path)
    held = Held({f"{path}.weight": weight.clone() for path, weight in published_weights(sample).items()}
                | {"single_blocks.0.linear1.bias": torch.zeros(32 * 7)})  # fmt: skip
    file = read_lora(str(path), "flux")
    layers = CheckpointLayers(BY_NAME["flux"], held.shapes)
    weights = MergedWeights(held, layers, [Adapter("x", file.layers, lambda layer: 1.0)])
    with torch.no_grad():
        for name, tensors in own.items():
            weight = modules[name].weight
            change = tensors["diff"] if "diff" in tensors else added(tensors, weight.shape)
            assert change is not None
            weight += change
            if "dora_scale" in tensors:
                weight *= tensors["dora_scale"] / weight.norm(dim=0, keepdim=True)
    for published, expected in published_weights(sample).items():
        assert torch.allclose(weights.tensor(f"{published}.weight"), expected, atol=1e-5), published
    bias = weights.tensor("single_blocks.0.linear1.bias")
    assert torch.equal(bias[96:], own["single_transformer_blocks.0.proj_mlp"]["diff_b"]) and not bias[:96].any()
    assert len(weights.moved) == 3
    with pytest.raises(UserError, match="only LoRA and DoRA can be split into parts or fused"):
        to_kohya(load_file(path), among=("flux",))
