# SPDX-License-Identifier: Apache-2.0
"""--network_args: every mistake in one message, and the factors per block."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest

from library.adapters.block_ranks import BlockLayout, block_lr_weights
from library.adapters.options import BlockOptions, read_network_args
from library.errors import UserError
from library.families.adapters import load_network_module, own_modules
from library.families.sd.targets import SD_BLOCKS, sd_block
from library.options import specs
from networks.lora import create_network, create_network_from_weights
from tests.adapters.models import tiny_clip, tiny_unet


def problems(dim: int | None = 4, **arguments: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        create_network(1.0, dim, 1.0, None, tiny_clip(), tiny_unet(), **arguments)
    assert all("\n" not in line for line in error.value.problems)
    return error.value.problems


def test_every_mistake_at_once() -> None:
    assert problems(conv_dims="4", rank_dropout="much", dora_wd="maybe", block_dims="1,x", module_dropout="2") == [
        "--network_args: unknown key 'conv_dims'. Did you mean 'conv_dim'?",
        "--network_args: rank_dropout expects a number, got 'much'",
        "--network_args: dora_wd expects true or false, got 'maybe'",
        "--network_args: block_dims expects a whole number, got 'x'",
        "--network_args: module_dropout must be between 0 and 0.999, got 2.0",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"block_dims": "1,2,3"}, "block_dims needs 25 values, got 3"),
        ({"conv_alpha": "1"}, "conv_alpha has no effect without conv_dim"),
        ({"block_lr_zero_threshold": "0.1"}, "block_lr_zero_threshold has no effect without"),
        ({"wd_on_output": "False"}, "wd_on_output has no effect without dora_wd"),
        ({"down_lr_weight": "sinus"}, "down_lr_weight expects one value per block"),
        ({"up_lr_weight": "sine+much"}, "up_lr_weight expects a number, got 'much'"),
        ({"conv_dim": "-1"}, "conv_dim must be at least 0, got -1"),
        ({"loraplus_lr_ratio": "-1"}, "loraplus_lr_ratio must be greater than 0"),
        ({"neuron_dropout": 0.1, "dropout": "0.2"}, "dropout=0.2 is --network_dropout, which is 0.1"),
        ({"block_dims": ",".join("0" * 25), "conv_dim": "2", "conv_block_dims": ",".join("0" * 25)}, None),
        ({"dim": 0}, "--network_dim must be at least 1, got 0"),
    ],
)
def test_one_mistake(arguments: dict[str, Any], expected: str | None) -> None:
    if expected is None:  # the text encoder is still there
        network = create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet(), **arguments)
        assert all(name.startswith("lora_te_") for name in network.module_parameters())
        with pytest.raises(UserError, match="no layer is left to train"):
            create_network(1.0, 4, 1.0, None, None, tiny_unet(), **arguments)
        return
    [line] = problems(**arguments)
    assert expected in line


def test_a_conv_dim_of_zero_leaves_3x3_convolutions_out() -> None:
    """As in sd-scripts: the residual blocks get adapters, without those of their 3x3 convolutions."""
    plain, zero, four = (
        {*create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet(), **arguments).module_parameters()}
        for arguments in ({}, {"conv_dim": "0", "conv_alpha": "1"}, {"conv_dim": "4"})
    )
    assert plain < zero < four
    assert all(name.endswith(("time_emb_proj", "conv_shortcut")) for name in zero - plain)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", own_modules())
def test_every_number_is_finite(name: str, number: str) -> None:
    """In each argument of each module that takes a fraction: alone, in a list, on a curve, behind a pattern."""
    module = load_network_module(name)
    for key, spec in specs(module.builder.arguments).items():
        kinds = "float" in str(spec.hint), re.search(r"Pattern\[str\], (int|float)", str(spec.hint))
        given = [f"x={number}"] if kinds[1] else [number, f"1,{number}", f"sine+{number}"] if kinds[0] else []
        for value in given:
            with pytest.raises(UserError) as error:
                module.check_arguments({key: value})
            assert error.value.problems[0].startswith(f"--network_args: {key} "), (key, value)
    if "blocks" in module.builder.arguments and "lora_" not in name:
        with pytest.raises(UserError, match=r"down_lr_weight must be a finite number|down_lr_weight expects"):
            module.check_arguments({"down_lr_weight": f"{number},1,1"})
    if name != "networks.control_net_lllite" and number != "-inf":
        with pytest.raises(UserError, match="--network_alpha"):
            module.create_network(1.0, 4, float(number), None, None, tiny_unet() if "_" not in name else None)


def test_defaults_and_empty_values() -> None:
    network = create_network(1.0, None, None, None, tiny_clip(), tiny_unet(), conv_dim="", block_dims=None)
    assert {(layer.rank, layer.alpha) for layer in network.named_layers().values()} == {(4, 1.0)}
    assert not any("resnets" in name for name in network.named_layers())


def test_values_that_are_no_text() -> None:
    options = read_network_args({"blocks": BlockOptions}, {"conv_dim": 4, "block_alphas": [1, 0.5], "train_norm": True})
    assert options["blocks"] == BlockOptions(conv_dim=4, block_alphas=(1.0, 0.5), train_norm=True)


def test_alpha_zero_means_the_rank() -> None:
    network = create_network(1.0, 8, 0, None, None, tiny_unet())
    assert {layer.scale for layer in network.named_layers().values()} == {1.0}


def test_conv_block_dims_alone() -> None:
    """Without conv_dim and block_dims too: linear layers have network_dim, convolutions their block's rank."""
    dims = ",".join(str(i % 3) for i in range(25))
    layers = create_network(1.0, 4, 1.0, None, None, tiny_unet(), conv_block_dims=dims).named_layers()
    assert layers["lora_unet_down_blocks_0_resnets_0_conv1"].rank == 1  # block 1
    assert layers["lora_unet_down_blocks_0_resnets_0_time_emb_proj"].rank == 4
    assert "lora_unet_down_blocks_0_downsamplers_0_conv" not in layers  # block 3: rank 0
    assert layers["lora_unet_up_blocks_0_resnets_0_conv2"].rank == 1  # block 13
    assert "lora_unet_up_blocks_0_upsamplers_0_conv" not in layers  # block 15
    assert layers["lora_unet_mid_block_attentions_0_proj_in"].rank == 4


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("down_blocks.0.attentions.0.proj_in", 1), ("down_blocks.2.resnets.1.conv1", 8),
        ("down_blocks.1.downsamplers.0.conv", 6),
        ("mid_block.attentions.0.proj_in", 12), ("up_blocks.0.resnets.0.conv1", 13),
        ("up_blocks.3.attentions.2.proj_in", 24),
        ("up_blocks.1.upsamplers.0.conv", 18), ("conv_in", None), ("time_embedding.linear_1", None),
    ],
)  # fmt: skip
def test_block_numbers(path: str, block: int | None) -> None:
    assert sd_block(path) == block


def weights(layout: BlockLayout = SD_BLOCKS, **arguments: str) -> tuple[float, ...]:
    found = block_lr_weights(read_network_args({"blocks": BlockOptions}, arguments)["blocks"], layout)
    assert found is not None
    return found


def test_curves() -> None:
    assert weights(down_lr_weight="sine")[:12] == pytest.approx([math.sin(math.pi / 2 * i / 11) for i in range(12)])
    assert weights(down_lr_weight="cosine")[:12] == pytest.approx([math.cos(math.pi / 2 * i / 11) for i in range(12)])
    assert weights(up_lr_weight="linear+0.5")[13:] == pytest.approx([i / 11 + 0.5 for i in range(12)])
    assert weights(up_lr_weight="reverse_linear+.25")[13:] == pytest.approx([1 - i / 11 + 0.25 for i in range(12)])
    assert weights(up_lr_weight="zeros")[12:] == (1.0, *[0.0] * 12)
    assert weights(mid_lr_weight="0.5") == (*[1.0] * 12, 0.5, *[1.0] * 12)


def test_lists_are_filled_cut_and_cleared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert weights(down_lr_weight="0.5,,2")[:5] == (0.5, 0.0, 2.0, 1.0, 1.0)
        assert weights(up_lr_weight=",".join(["0.5"] * 14))[13:] == (0.5,) * 12
    assert [record.getMessage() for record in caplog.records] == [
        "--network_args: down_lr_weight has 3 values of 12; the others are 1",
        "--network_args: up_lr_weight has 14 values of 12; the rest is not used",
    ]
    assert weights(down_lr_weight=",".join(["0.3", "0.2"] * 6), block_lr_zero_threshold="0.2")[:4] == (0.3, 0, 0.3, 0)


def test_a_layout_with_outer_blocks() -> None:
    found = weights(BlockLayout(9, 3, 9, outer=1), down_lr_weight="linear", mid_lr_weight="1,0.5,1")
    assert len(found) == 23
    assert (found[0], found[1], found[9], found[11], found[22]) == (1.0, 0.0, 1.0, 0.5, 1.0)


def test_ranks_are_not_for_a_network_from_a_file() -> None:
    network = create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet())
    with pytest.raises(
        UserError, match=r"conv_dim, block_dims: ranks and alphas come from my\.safetensors; leave them out"
    ):
        create_network_from_weights(
            1.0, "my.safetensors", None, tiny_clip(), tiny_unet(), weights_sd=network.state(None), conv_dim="2",
            block_dims=",".join("1" * 25),
        )  # fmt: skip


def test_learning_rate_options_hold_for_a_network_from_a_file() -> None:
    state = create_network(1.0, 4, 1.0, None, tiny_clip(), tiny_unet()).state(None)
    network, _ = create_network_from_weights(
        1.0, None, None, tiny_clip(), tiny_unet(), weights_sd=state, loraplus_unet_lr_ratio="4", mid_lr_weight="0.5",
        rank_dropout="0.1",
    )  # fmt: skip
    groups = {g["name"]: g["lr"] for g in network.param_groups(learning_rate=1.0, text_encoder_lr=[0.25, 0.75])}
    assert groups["textencoder"] == 0.25
    assert (groups["unet_block12"], groups["unet_block12 plus"], groups["unet_block1 plus"]) == (0.5, 2.0, 4.0)
