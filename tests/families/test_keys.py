# SPDX-License-Identifier: Apache-2.0
"""The name tables: reversible on random tensors, and equal to the published names of the real models."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.families.sd.model import published_tensors, unused_open_clip
from library.families.sd.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_rules
from library.families.sd.parts import build_text_encoder, build_unet, clip_layout, open_clip_layout, unet_layout
from library.key_tables import CONV_1X1, COPY, SWAP_HALVES, TRANSPOSE, Rule, expand, named, publish, read
from library.weights.clip_names import clip_rules, open_clip_rules
from library.weights.kl_vae import LDM_BLOCK, build_vae, layout
from library.weights.loading import build_empty, shipped_config
from library.weights.vae_names import VAE_PREFIX, vae_rules
from tests.tiny import tiny_modules

DATA = Path(__file__).parents[1] / "data_files" / "weights"


def key_list(name):
    with gzip.open(DATA / f"{name}.json.gz") as file:
        return json.load(file)


def round_trip(tensors, rules, shapes, prefix=""):
    published = publish(tensors, rules, prefix)
    back, wrong = read(published.__getitem__, published, rules, shapes, prefix)
    return published, back, wrong


@pytest.mark.parametrize("op", [COPY, CONV_1X1, TRANSPOSE, SWAP_HALVES])
def test_every_op_is_reversible(op):
    x = torch.randn(6, 4)
    assert torch.equal(op.read(op.publish(x), (6, 4)), x)


def test_ops_do_what_they_say():
    x = torch.arange(8.0).reshape(4, 2)
    assert CONV_1X1.publish(x).shape == (4, 2, 1, 1)
    assert torch.equal(TRANSPOSE.publish(x), x.T)
    assert torch.equal(SWAP_HALVES.publish(x), torch.tensor([[4.0, 5], [6, 7], [0, 1], [2, 3]]))


def test_fused_tensors_split_in_order():
    tensors = {n: torch.full((rows, 3), float(i)) for i, (n, rows) in enumerate((("q", 2), ("k", 1), ("v", 1)))}
    rules = (Rule("qkv", ("q", "k", "v")),)
    published, back, wrong = round_trip(tensors, rules, {n: tuple(t.shape) for n, t in tensors.items()}, "p.")
    assert published["p.qkv"][:, 0].tolist() == [0.0, 0.0, 1.0, 2.0]
    assert not wrong and all(torch.equal(back[n], tensors[n]) for n in tensors)


def test_read_names_what_is_missing_or_misshapen():
    rules = (Rule("a", ("x",)), Rule("b", ("y",)), Rule("c", ("z", "w")))
    file = {"b": torch.zeros(3, 3), "c": torch.zeros(5, 2)}
    shapes = {"x": (2,), "y": (3, 2), "z": (2, 2), "w": (2, 2)}
    found, wrong = read(file.__getitem__, file, rules, shapes)
    assert wrong == ["a", "b", "c"] and not found


def test_expand_takes_the_longest_name_and_refuses_gaps():
    names = [named("A", "a"), named("AB", "a.b", op=CONV_1X1)]
    assert expand(names, ["a.weight", "a.b.weight", "a.b.bias", "a.c.d.weight"]) == (
        Rule("A.weight", ("a.weight",)),
        Rule("AB.weight", ("a.b.weight",), CONV_1X1),
        Rule("AB.bias", ("a.b.bias",)),
        Rule("A.c.d.weight", ("a.c.d.weight",)),
    )
    with pytest.raises(ValueError, match=r"z\.weight"):
        expand(names, ["z.weight"])


@pytest.mark.parametrize("version", [1, 2])
def test_tiny_models_come_back_bit_equal(version):
    unet, vae, encoder = tiny_modules(version=version)
    text_rules = open_clip_rules if version == 2 else clip_rules
    for module, rules in ((unet, unet_rules), (vae, vae_rules), (encoder, text_rules)):
        state = module.state_dict()
        published, back, wrong = round_trip(state, rules(module), {n: tuple(t.shape) for n, t in state.items()})
        assert not wrong and back.keys() == state.keys()
        assert all(torch.equal(back[n], state[n]) for n in state)
        assert len(published) == len(rules(module)) == len(set(published))


@pytest.mark.parametrize("version, name", [(1, "sd15_full_output"), (2, "sd2_full_output")])
def test_full_size_names_and_shapes_are_the_published_ones(version, name):
    config = shipped_config(f"sd{version}")
    unet, vae = (
        build_empty(lambda b=b, c=c: b(c)) for b, c in ((build_unet, config["unet"]), (build_vae, config["vae"]))
    )
    encoder = build_empty(lambda: build_text_encoder(config["text_encoder"]))
    with torch.device("meta"):
        tensors = published_tensors(unet, encoder, vae, version=version)
        if version == 2:
            tensors |= unused_open_clip(tensors)
    assert {n: list(t.shape) for n, t in tensors.items()} == key_list(name)


@pytest.mark.parametrize("version, name", [(1, "sd15_full_output"), (2, "sd2_full_output")])
def test_configurations_read_from_shapes_equal_the_shipped_ones(version, name):
    config = shipped_config(f"sd{version}")
    shapes = {n: tuple(s) for n, s in key_list(name).items()}

    def below(prefix):
        return {n[len(prefix) :]: s for n, s in shapes.items() if n.startswith(prefix)}

    text_prefix, text_layout = {
        1: (CLIP_PREFIX, clip_layout),
        2: (OPEN_CLIP_PREFIX, open_clip_layout),
    }[version]
    found = {
        "unet": unet_layout(below(UNET_PREFIX), version),
        "vae": layout(below(VAE_PREFIX), LDM_BLOCK),
        "text_encoder": text_layout(below(text_prefix)),
    }
    found["vae"] = {k: v for k, v in found["vae"].items() if k not in ("use_quant_conv", "use_post_quant_conv")}
    for part, values in found.items():
        assert values == {key: config[part][key] for key in values}
