# SPDX-License-Identifier: Apache-2.0
"""Adapter files: what is written, what is read, and the one line for each thing that does not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.adapters.formats.conversion import read_tensors
from library.adapters.layer_network import LayerNetwork
from library.errors import UserError
from networks.lora import create_network, create_network_from_weights
from tests.adapters.known_formats import convert, to_kohya
from tests.adapters.models import randomize, tiny_clip, tiny_unet

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def network(dim: int = 4, encoder: bool = True, **arguments: str) -> LayerNetwork:
    made = create_network(1.0, dim, 2.0, None, tiny_clip() if encoder else None, tiny_unet(), **arguments)
    assert isinstance(made, LayerNetwork)
    randomize(made)
    return made


def refusal(target: LayerNetwork, tensors: dict[str, Tensor]) -> str:
    before = {key: value.clone() for key, value in target.state(None).items()}
    with pytest.raises(UserError) as error:
        target.load(tensors)
    assert all(torch.equal(value, before[key]) for key, value in target.state(None).items()), "nothing is half loaded"
    [line] = error.value.problems
    return line


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_write_and_read(suffix: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    made = network()
    path = tmp_path / f"lora.{suffix}"
    made.save(path, dtype=dtype, metadata={"ss_output_name": "lora"})
    found = read_tensors(path)
    assert {value.dtype for value in found.values()} == {dtype or torch.float32}
    expected = made.state(dtype)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    if suffix == "safetensors":
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"ss_output_name": "lora"}


def test_alpha_is_a_float_and_comes_back() -> None:
    made = network(rs_lora="True")
    state = made.state(None)
    assert state[f"{QUERY}.alpha"].dtype == torch.float32
    other = network()
    other.load(state)
    assert other.named_layers()[QUERY].scale == pytest.approx(2.0 / 4**0.5)


def test_dims_come_from_the_weights() -> None:
    state = network(dim=3, conv_dim="2").state(None)
    made, weights = create_network_from_weights(1.0, None, None, tiny_clip(), tiny_unet(), weights_sd=state)
    assert isinstance(made, LayerNetwork)
    layers = made.named_layers()
    assert (layers[QUERY].rank, layers["lora_unet_mid_block_resnets_0_conv1"].rank) == (3, 2)
    assert [*made.state(None)] == [*state] == [*weights]
    del state[f"{QUERY}.alpha"]
    made, _ = create_network_from_weights(1.0, None, None, tiny_clip(), tiny_unet(), weights_sd=state)
    assert isinstance(made, LayerNetwork) and made.named_layers()[QUERY].scale == 1.0


def test_layers_outside_of_the_usual_blocks() -> None:
    state = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    }  # fmt: skip
    made, _ = create_network_from_weights(1.0, None, None, None, tiny_unet(), weights_sd=state)
    assert [*made.module_parameters()] == ["lora_unet_conv_in"]
    assert made.param_groups(learning_rate=1.0)[0]["name"] == "unet"


def test_a_file_of_one_model_only(caplog: pytest.LogCaptureFixture) -> None:
    unet_only = {key: value for key, value in network().state(None).items() if key.startswith("lora_unet_")}
    other = network(dim=4)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    encoder_before = other.state(None)["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"]
    with caplog.at_level(logging.WARNING):
        other.load(unet_only)
        assert caplog.records == []
        del unet_only[f"{QUERY}.alpha"], unet_only[f"{QUERY}.lora_up.weight"], unet_only[f"{QUERY}.lora_down.weight"]
        other.load(unet_only)
    assert [record.getMessage() for record in caplog.records] == [
        f"1 adapters are not in the file and keep their values: {QUERY}"
    ]
    state = other.state(None)
    assert torch.equal(state["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"], encoder_before)
    assert all(torch.equal(state[key], value) for key, value in unet_only.items())


def test_adapters_of_a_model_that_is_not_trained(caplog: pytest.LogCaptureFixture) -> None:
    state = network().state(None)
    other = network()
    other.attach(train_denoiser=True, train_text_encoder=False)
    with caplog.at_level(logging.WARNING):
        other.load(state)
    [record] = caplog.records
    assert record.getMessage().startswith(
        "12 adapters of the file are of a model that is not trained: lora_te_text_model_enc"
    )


def test_foreign_keys() -> None:
    state = network().state(None)
    line = refusal(network(), {**state, "lora_unet_x.alpha": torch.ones(()), "lora_unet_y.hada_w1_a": torch.ones(1)})
    assert line == "2 keys of the adapter file belong to no adapter here: lora_unet_x.alpha, lora_unet_y.hada_w1_a"
    line = refusal(network(encoder=False), state)
    assert line.startswith("36 keys of the adapter file belong to no adapter here: lora_te_text_model_encoder_layers_0")


def test_another_rank() -> None:
    line = refusal(network(dim=4), network(dim=8).state(None))
    assert "has rank 8, this network has 4 (set --network_dim, or use --dim_from_weights)" in line
    assert line.endswith(" more like it)")


def change(key: str, value: Tensor | None) -> dict[str, Tensor]:
    state = network().state(None)
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (lambda: change(f"{QUERY}.lora_up.weight", None), f"does not fit: {QUERY} has no lora_up.weight"),
        (
            lambda: change(f"{QUERY}.lora_up.weight", torch.ones(5, 4)),
            "lora_up.weight has the shape (5, 4), here it is (16, 4)",
        ),
        (lambda: change(f"{QUERY}.diff", torch.ones(1)), "has an unknown tensor diff"),
        (
            lambda: network(dora_wd="True").state(None),
            "is a DoRA (dora_scale), this network is not (--network_args dora_wd=True)",
        ),
        (lambda: {f"{QUERY}.hada_w1_a": torch.ones(1)}, "has no lora_down.weight"),
        (lambda: {"unet.mid_block.x.lora_C.weight": torch.ones(1)}, "1 keys of the adapter file are not understood"),
    ],
)
def test_what_does_not_fit(tensors: Any, expected: str) -> None:
    assert expected in refusal(network(), tensors())


def test_tucker_file_in_a_plain_network() -> None:
    line = refusal(network(conv_dim="2"), network(conv_dim="2", use_tucker="True").state(None))
    assert "is in Tucker form (lora_mid), this network is not (--network_args use_tucker=True)" in line


def test_from_weights_refuses_other_models_and_kinds() -> None:
    def make(tensors: dict[str, Tensor]) -> str:
        with pytest.raises(UserError) as error:
            create_network_from_weights(1.0, "x.safetensors", None, tiny_clip(), tiny_unet(), weights_sd=tensors)
        return str(error.value)

    sdxl = {"lora_unet_input_blocks_4_1_proj_in.alpha": torch.ones(())}
    assert make(sdxl) == "x.safetensors: 1 keys name no layer of this model: lora_unet_input_blocks_4_1_proj_in.alpha"
    loha = {f"{QUERY}.hada_w1_a": torch.ones(1), f"{QUERY}.alpha": torch.ones(())}
    what = f"1 adapters are of another kind or damaged: {QUERY} (hada_w1_a, alpha)"
    assert make(loha) == f"x.safetensors: {what} (--network_module networks.loha reads such files)"
    shape = {f"{QUERY}.lora_down.weight": torch.ones(4, 3), f"{QUERY}.lora_up.weight": torch.ones(16, 4)}
    assert "lora_down.weight has the shape (4, 3), here it is (4, 16)" in make(shape)


@pytest.mark.parametrize("arguments", [{"use_scalar": "True"}, {"rs_lora": "True"}, {"dora_wd": "True"}])
def test_exact_state(arguments: dict[str, str]) -> None:
    """What a resumed run continues from is the same to the last bit, the learned factor included."""
    made, resumed = network(dim=6, **arguments), network(dim=6, **arguments)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.37)
    resumed.load_exact_state(made.exact_state())
    for (name, a), (_, b) in zip(made.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match="the state is of another network: "):
        network(dim=4).load_exact_state(made.exact_state())


def test_scale_survives_the_file_exactly() -> None:
    made = network(dim=6, rs_lora="True")
    other = network(dim=6)
    other.load(made.state(None))
    assert other.named_layers()[QUERY].scale == made.named_layers()[QUERY].scale


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    empty, text, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.pt"
    empty.touch()
    text.write_text("hello")
    torch.save({"epoch": 3}, other)
    for path, expected in ((tmp_path / "no.pt", "no such adapter file"), (empty, "not a readable"),
                           (text, "not a readable"),
                           (other, "holds no adapter tensors")):  # fmt: skip
        with pytest.raises(UserError) as error:
            read_tensors(path)
        assert str(error.value).startswith(f"{path}: {expected}") and "\n" not in str(error.value)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"x": Evil(str(tmp_path / "ran"))}, path)
    with pytest.raises(UserError, match="not a readable adapter file"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_peft_and_kohya_names() -> None:
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ours = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    one = torch.ones(2, 8)
    for down, up in (("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_A.default", "lora_B.default")):
        found = to_kohya({f"{key}.{down}.weight": one, f"{key}.{up}.weight": one.T, f"{key}.alpha": torch.tensor(2.0)})
        assert [*found] == [f"{ours}.lora_down.weight", f"{ours}.lora_up.weight", f"{ours}.alpha"]
    for path in ("text_model.encoder", "encoder"):
        found = to_kohya({f"text_encoder.{path}.layers.0.self_attn.q_proj.lora_A.weight": one})
        assert [*found] == ["lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"]


def test_peft_has_the_scale_in_lora_b() -> None:
    made = network(dim=4)
    state = made.state(None)
    peft = convert(state, "peft")
    up = peft["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"]
    assert torch.equal(up, state[f"{QUERY}.lora_up.weight"] * 2.0 / 4)
    with pytest.raises(UserError, match="have no name in the peft format"):
        convert(network(train_norm="True").state(None), "peft")


def test_form_options_beside_a_file_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lora.safetensors"
    network().save(path, dtype=None, metadata={})
    with caplog.at_level(logging.WARNING, logger="trainyard"):
        made, _ = create_network_from_weights(
            1.0, path, None, tiny_clip(), tiny_unet(), dora_wd="True", train_norm="True", rank_dropout="0.1"
        )
    assert f"--network_args: dora_wd, train_norm: no effect, {path} decides the form of its layers" in caplog.messages
    assert not any("dora_scale" in key for key in made.state(None))
