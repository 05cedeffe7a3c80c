# SPDX-License-Identifier: Apache-2.0
"""--network_args of lora_flux, lora_flux2, lora_sd3 and lora_lumina: what each does, and one line for each mistake."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from library.errors import UserError
from library.families.adapters import load_network_module
from tests.adapters.families import TINY
from tests.adapters.models import tiny_unet


def ranks(family: str, **arguments: Any) -> dict[str, int]:
    tiny = TINY[family]
    network = tiny.module.create_network(1.0, 4, 1.0, None, [], tiny.make(), **arguments)
    return {name.removeprefix("lora_unet_"): layer.rank for name, layer in network.named_layers().items()}


def refusal(family: str, **arguments: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        ranks(family, **arguments)
    assert all("\n" not in line for line in error.value.problems)
    return [line.removeprefix("--network_args: ") for line in error.value.problems]


def test_flux_ranks_by_kind() -> None:
    kinds = ["img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod"]
    given = {f"{kind}_dim": str(index + 1) for index, kind in enumerate(kinds)}
    found = ranks("flux", **given, single_dim="7", single_mod_dim="0")
    for index, kind in enumerate(kinds):
        assert {rank for name, rank in found.items() if f"_{kind}_" in name} == {index + 1}
    assert found["single_blocks_0_linear1"] == found["single_blocks_1_linear2"] == 7
    assert not any("modulation" in name for name in found)


def test_flux_blocks() -> None:
    found = ranks("flux", train_double_block_indices="1", train_single_block_indices="none")
    assert {name[:16] for name in found} == {"double_blocks_1_"}
    assert {name[:16] for name in ranks("flux", train_blocks="single", train_single_block_indices="0-0")} == {
        "single_blocks_0_"
    }
    assert ranks("flux", train_double_block_indices="all", train_blocks="all") == ranks("flux")
    # a pattern stands above the selection, and the selection does not reach outside of the blocks
    found = ranks(
        "flux", train_double_block_indices="none", train_single_block_indices="none", in_dims="[0,0,0,0,3]",
        network_reg_dims=r"double_blocks_\d_img_mlp_0=5",
    )  # fmt: skip
    assert found == {"double_blocks_0_img_mlp_0": 5, "double_blocks_1_img_mlp_0": 5, "txt_in": 3}


def test_flux2_ranks_by_kind() -> None:
    kinds = ["img_attn", "txt_attn", "img_mlp", "txt_mlp"]
    given = {f"{kind}_dim": str(index + 1) for index, kind in enumerate(kinds)}
    found = ranks("flux2", **given, single_dim="7", in_dims="8,0,9", train_double_block_indices="1")
    for index, kind in enumerate(kinds):
        assert {rank for name, rank in found.items() if f"_{kind}_" in name} == {index + 1}
    assert found["single_blocks_0_linear1"] == found["single_blocks_1_linear2"] == 7
    assert {name: rank for name, rank in found.items() if "_blocks_" not in name} == {"img_in": 8, "txt_in": 9}
    assert not any(name.startswith("double_blocks_0_") for name in found)
    assert {name[:7] for name in ranks("flux2", train_blocks="single")} == {"single_"}


def test_sd3_ranks_by_kind() -> None:
    found = ranks(
        "sd35", context_attn_dim="1", context_mlp_dim="2", context_mod_dim="3", x_attn_dim="5", x_mlp_dim="6",
        x_mod_dim="7", emb_dims="0,0,8,0,9,0", train_block_indices="0,2",
    )  # fmt: skip
    assert found["joint_blocks_0_context_block_attn_qkv"] == 1
    assert found["joint_blocks_0_context_block_mlp_fc1"] == 2
    assert found["joint_blocks_2_context_block_adaLN_modulation_1"] == 3
    assert found["joint_blocks_0_x_block_attn2_qkv"] == found["joint_blocks_0_x_block_attn_proj"] == 5
    assert found["joint_blocks_2_x_block_mlp_fc2"] == 6 and found["joint_blocks_2_x_block_adaLN_modulation_1"] == 7
    assert {name: rank for name, rank in found.items() if not name.startswith("joint_blocks")} == {
        "x_embedder_proj": 8, "final_layer_adaLN_modulation_1": 9
    }  # fmt: skip
    assert not any("joint_blocks_1_" in name for name in found)


def test_lumina_ranks_by_kind() -> None:
    found = ranks("lumina", attn_dim="1", mlp_dim="2", mod_dim="3", refiner_dim="5", embedder_dims="6,7,8")
    assert found["noise_refiner_0_attention_qkv"] == found["layers_1_attention_out"] == 1
    assert found["noise_refiner_1_adaLN_modulation_1"] == found["final_layer_adaLN_modulation_1"] == 3
    assert found["context_refiner_0_feed_forward_w2"] == 5 and found["layers_0_feed_forward_w2"] == 4
    assert (found["x_embedder"], found["t_embedder_mlp_0"], found["cap_embedder_1"]) == (6, 2, 8)
    assert {name.partition("_refiner")[0] for name in ranks("lumina", train_blocks="refiners")} == {"noise", "context"}


def test_anima_patterns_match_whole_paths() -> None:
    """As in sd-scripts: a pattern that is in the middle of a path only means nothing."""
    usual = ranks("anima")
    assert len(usual) == 20 and not any("modulation" in name or "adapter" in name for name in usual)
    assert ranks("anima", exclude_patterns="['mlp', 'self_attn']") == usual
    assert {name.split("_")[2] for name in ranks("anima", exclude_patterns="['.*mlp.*', '.*self_attn.*']")} == {"cross"}
    assert ranks("anima", exclude_patterns=".*mlp.*").keys() == ranks("anima", exclude_patterns='".*mlp.*"').keys()
    more = ranks("anima", include_patterns=r"['final_layer\..*', 'x_embedder.*', 'llm_adapter.*']").keys() - usual
    assert more == {
        "final_layer_linear", "final_layer_adaln_modulation_1", "final_layer_adaln_modulation_2", "x_embedder_proj_1"
    }  # fmt: skip
    adapter = ranks("anima", train_llm_adapter="True").keys() - usual
    assert len(adapter) == 20 and all(name.startswith("llm_adapter_blocks_") for name in adapter)
    found = ranks("anima", network_reg_dims=r"blocks\.0\..*=8,.*mlp.*=2,self_attn=16", train_llm_adapter="True")
    assert (
        found["blocks_0_mlp_layer1"] == 8 and found["blocks_1_mlp_layer1"] == found["llm_adapter_blocks_0_mlp_0"] == 2
    )
    assert found["blocks_1_self_attn_q_proj"] == found["llm_adapter_blocks_0_self_attn_q_proj"] == 4


def test_anima_rates_by_whole_paths() -> None:
    network = TINY["anima"].module.create_network(
        1.0, 4, 1.0, None, [tiny_qwen3()], TINY["anima"].make(), train_llm_adapter="True",
        network_reg_lrs=".*llm_adapter.*=0.5,layers.*=0.25,mlp=9",
    )  # fmt: skip
    groups = {group["name"]: group["lr"] for group in network.param_groups(learning_rate=1.0)}
    assert groups == {"textencoder reg_lr_1": 0.25, "unet reg_lr_0": 0.5, "unet": 1.0}


def tiny_qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return Qwen3Model(Qwen3Config(**size, intermediate_size=8, head_dim=8, vocab_size=8))


def test_rates_by_pattern_reach_the_text_encoder_and_other_families() -> None:
    from networks.lora import create_network
    from tests.adapters.models import tiny_clip

    network = create_network(
        1.0, 4, 1.0, None, tiny_clip(), tiny_unet(), network_reg_lrs="_mlp_fc1=0.5,attn1=0.25",
        network_reg_dims="attn2=2", loraplus_unet_lr_ratio="4",
    )  # fmt: skip
    groups = {group["name"]: group["lr"] for group in network.param_groups(learning_rate=1.0)}
    assert groups == {
        "textencoder reg_lr_0": 0.5, "textencoder": 1.0, "unet reg_lr_1": 0.25, "unet reg_lr_1 plus": 1.0,
        "unet": 1.0, "unet plus": 4.0,
    }  # fmt: skip
    layers = network.named_layers()  # type: ignore[operator]
    assert {layer.rank for name, layer in layers.items() if "attn2" in name} == {2}


@pytest.mark.parametrize(
    ("family", "arguments", "expected"),
    [
        ("flux", {"img_atn_dim": "4"}, "unknown key 'img_atn_dim'. Did you mean 'img_attn_dim'?"),
        ("flux", {"in_dims": "1,2,3"}, "in_dims needs 5 values, got 3"),
        ("flux", {"in_dims": "1,2,3,4,x"}, "in_dims expects a whole number, got 'x'"),
        ("flux", {"in_dims": "1,2,3,4,-1"}, "in_dims must be at least 0, got -1"),
        ("flux", {"train_blocks": "singel"}, "train_blocks 'singel' is not one of all, double, single. Did you mean"),
        ("flux", {"train_double_block_indices": "0-2,x"}, "train_double_block_indices expects all, none, or numbers"),
        ("flux", {"train_double_block_indices": "3-1"}, "train_double_block_indices expects all, none, or numbers"),
        (
            "flux",
            {"train_single_block_indices": "0-2"},
            "train_single_block_indices: there is no block 2; this model has 0 to 1",
        ),
        ("flux2", {"train_double_block_indices": "1-2"}, "train_double_block_indices: there is no block 2"),
        ("flux2", {"in_dims": "1,2"}, "in_dims needs 3 values, got 2"),
        ("sd3", {"train_block_indices": "7"}, "train_block_indices: there is no block 7; this model has 0 to 1"),
        ("sd3", {"emb_dims": "[1,2]"}, "emb_dims needs 6 values, got 2"),
        ("sd3", {"split_qkv": "maybe"}, "split_qkv expects true or false, got 'maybe'"),
        ("lumina", {"embedder_dims": "1"}, "embedder_dims needs 3 values, got 1"),
        ("lumina", {"train_t5xxl": "True"}, "unknown key 'train_t5xxl'"),
        ("lumina", {"network_reg_dims": "layers_[=4"}, "network_reg_dims 'layers_[' is no regular expression: "),
        ("lumina", {"network_reg_dims": "layers_"}, "network_reg_dims expects regex=value,regex=value, got 'layers_'"),
        ("lumina", {"network_reg_lrs": "layers_=-1"}, "network_reg_lrs must not be below 0, got layers_=-1"),
        ("anima", {"exclude_patterns": "blocks[=4"}, "exclude_patterns expects a regular expression or a list of them"),
        (
            "anima",
            {"include_patterns": "[1]"},
            "include_patterns expects a regular expression or a list of them, got '[1]'",
        ),
        ("anima", {"include_patterns": "b'x'"}, "include_patterns expects a regular expression or a list of them"),
        ("anima", {"exclude_patterns": ".*"}, "no layer is left to train"),
        ("lumina", {"ggpo_sigma": "-1"}, "ggpo_sigma must be at least 0, got -1.0"),
        ("flux", {"ggpo_sigma": "0.1", "use_scalar": "True"}, "ggpo_sigma and ggpo_beta do not go with use_tucker or"),
        (
            "flux",
            {"dora_wd": "True", "wd_on_output": "False"},
            "wd_on_output must be true: fused layers have no columns of their own, got False",
        ),
        ("flux", {"single_dim": "0", "train_blocks": "single", "single_mod_dim": "0"}, "no layer is left to train"),
    ],
)
def test_one_mistake(family: str, arguments: dict[str, str], expected: str) -> None:
    [line] = refusal(family, **arguments)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    "name", ["networks.lora_flux", "networks.lora_flux2", "networks.lora_sd3", "networks.lora_lumina"]
)
def test_mistakes_are_found_before_anything_is_loaded(name: str) -> None:
    module = load_network_module(name)
    with pytest.raises(UserError) as error:
        module.check_arguments({"network_reg_lrs": "(=1", "rank_dropout": "2", "block_dims": "1"})
    assert len(error.value.problems) == 3
    with pytest.raises(UserError, match="ggpo_sigma and ggpo_beta do not go with"):
        module.check_arguments({"ggpo_beta": "0.1", "use_tucker": "True"})


def test_the_wrong_module_for_a_model() -> None:
    with pytest.raises(UserError, match=r"networks\.lora_sd3 is for SD3Transformer2DModel; this model is a UNet2D"):
        TINY["sd3"].module.create_network(1.0, 4, 1.0, None, [], tiny_unet())


def test_options_without_effect_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ranks("sd3", conv_dim="4", conv_alpha="1", verbose="True")
    assert "--network_args: conv_dim and conv_alpha: no effect, this model has no 3x3 convolutions" in caplog.messages
    assert "adapter lora_unet_joint_blocks_0_x_block_attn_qkv: rank 4, alpha 1" in caplog.messages


def test_ranks_are_not_for_a_network_from_a_file() -> None:
    tiny = TINY["flux"]
    model = tiny.make()
    state = tiny.module.create_network(1.0, 4, 1.0, None, [], model).state(None)
    with pytest.raises(UserError, match=r"in_dims, train_blocks, network_reg_dims: ranks and alphas come from x\.st"):
        tiny.module.create_network_from_weights(
            1.0, "x.st", None, [], model, weights_sd=state, in_dims="1,1,1,1,1", train_blocks="all",
            network_reg_dims="a=1",
        )  # fmt: skip


def test_a_file_with_some_of_the_layers() -> None:
    tiny = TINY["flux"]
    model = tiny.make()
    state = tiny.module.create_network(1.0, 4, 2.0, None, [], model, in_dims="3,0,0,0,0").state(None)
    some = {key: value for key, value in state.items() if "linear1" in key or "img_in" in key}
    network, _ = tiny.module.create_network_from_weights(1.0, None, None, [], model, weights_sd=some)
    assert {name: layer.rank for name, layer in network.named_layers().items()} == {
        "lora_unet_single_blocks_0_linear1": 4, "lora_unet_single_blocks_1_linear1": 4, "lora_unet_img_in": 3
    }  # fmt: skip


def test_a_split_file_is_read_fused_or_split() -> None:
    tiny = TINY["flux"]
    model = tiny.make()
    state = tiny.module.create_network(1.0, 4, 2.0, None, [], model, split_qkv="True").state(None)
    name = "lora_unet_single_blocks_0_linear1"
    assert float(state[f"{name}.alpha"]) == 8.0 and state[f"{name}.lora_down.weight"].shape[0] == 16
    for arguments in ({}, {"split_qkv": "true"}):
        network, _ = tiny.module.create_network_from_weights(1.0, None, None, [], model, weights_sd=state, **arguments)
        layer = network.named_layers()[name]
        assert layer.rank == 16 and layer.target.split == bool(arguments)
        assert all((value == state[key]).all() for key, value in network.state(None).items())
    fused = tiny.module.create_network(1.0, 16, 2.0, None, [], model).state(None)
    for key, value in fused.items():
        if key.endswith("lora_up.weight"):
            value.fill_(1.0)
    with pytest.raises(UserError, match="was not trained with split_qkv"):
        tiny.module.create_network_from_weights(1.0, None, None, [], model, weights_sd=fused, split_qkv="True")
