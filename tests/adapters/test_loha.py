# SPDX-License-Identifier: Apache-2.0
"""networks.loha and networks.lokr against LyCORIS: its files in ours, ours in it, and the same output."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.adapters.layers.factor import FactorSettings
from library.adapters.layers.loha import LoHaLayer
from library.adapters.layers.lokr import LoKrLayer, LokrSettings, parts_of
from library.adapters.options import read_network_args
from library.adapters.target_spec import TargetModule, TargetSpec
from library.errors import UserError
from library.families.adapters import load_network_module
from networks import loha, lokr, lora
from tests.adapters.families import TINY
from tests.adapters.known_formats import convert, format_of
from tests.adapters.models import distance, randomize, run_unet, tiny_clip, tiny_unet

MODULES = {"loha": loha, "lokr": lokr}
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "loha": ("loha", {}),
    "loha_tucker": ("loha", {"use_tucker": "True"}),
    "loha_rs_scalar": ("loha", {"rs_lora": "True", "use_scalar": "True"}),
    "loha_dora": ("loha", {"dora_wd": "True"}),
    "lokr": ("lokr", {}),
    "lokr_factor": ("lokr", {"factor": "2", "use_tucker": "True"}),
    "lokr_both": ("lokr", {"decompose_both": "True", "unbalanced_factorization": "True"}),
    "lokr_full": ("lokr", {"full_matrix": "True"}),
    "lokr_scalar": ("lokr", {"use_scalar": "True", "factor": "2"}),
    "lokr_dora": ("lokr", {"dora_wd": "True"}),
}


LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (2, 5, 24)),
    "conv1x1": (lambda: nn.Conv2d(24, 20, 1), (2, 24, 6, 5)),
    "conv3x3": (lambda: nn.Conv2d(24, 20, 3, stride=2, padding=1), (2, 24, 6, 5)),
}


def ours(algo: str, unet: nn.Module, encoder: nn.Module | None = None, dim: int = 1, **arguments: str) -> Any:
    return MODULES[algo].create_network(1.0, dim, 2.0, None, encoder, unet, **arguments)


def own_layer(algo: str, module: nn.Module, rank: int, **arguments: str) -> Any:
    """A new layer of ours on a module."""
    target = TargetSpec("lora_unet_x", (TargetModule("x", module),), "denoiser")
    builder = MODULES[algo].BUILDER
    options = read_network_args(builder.arguments, arguments)
    return builder.kind.make(target, rank, 3.0, builder.kind.settings(options, None))


def their_layer(algo: str, module: nn.Module, rank: int, **arguments: str) -> Any:
    """A new layer of LyCORIS on a module."""
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    given = {name: int(value) if name == "factor" else value == "True" for name, value in arguments.items()}
    given["weight_decompose"] = given.pop("dora_wd", False)
    return {"loha": LohaModule, "lokr": LokrModule}[algo]("lora_unet_x", module, 1.0, rank, 3.0, **given)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_layers_of_lycoris(form: str, kind: str) -> None:
    """New layers have the same tensors and zeros; files in both directions give the same output."""
    algo, arguments = FORMS[form]
    rank = 1 if form == "lokr_both" else 2
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    x = torch.randn(shape)
    plain = module(x)
    theirs, mine = their_layer(algo, module, rank, **arguments), own_layer(algo, module, rank, **arguments)
    new, own = theirs.custom_state_dict(), mine.tensors()
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in new.items()}
    assert {name for name, value in own.items() if not value.any()} == {n for n, v in new.items() if not v.any()}
    assert float(own["alpha"]) == pytest.approx(float(new["alpha"]))

    randomize(theirs)
    theirs.apply_to()
    with torch.no_grad():
        expected = module(x)
        file = {name: value.detach().clone() for name, value in theirs.custom_state_dict().items()}
        theirs.restore()
        read = type(mine).from_tensors(mine.target, file, mine.settings)
        assert read.problem(file) is None
        read.load_tensors(file)
        read.attach()
        assert distance(expected, plain) > 0.05
        assert distance(module(x) - plain, expected - plain) < 1e-5
        assert all(torch.equal(value, file[name]) for name, value in read.tensors().items() if name != "alpha")
        read.detach()

        randomize(mine, seed=5)
        mine.attach()
        expected = module(x)
        mine.detach()
        theirs.load_state_dict(mine.tensors(), strict=False)
        theirs.apply_to()
        assert distance(expected, plain) > 0.05
        assert distance(module(x) - plain, expected - plain) < 1e-5


@pytest.mark.parametrize("algo", MODULES)
def test_files_of_whole_networks(algo: str, tmp_path: Path) -> None:
    """A file of lycoris.kohya in ours, and ours read by its create_network_from_weights: the same output."""
    unet, encoder = tiny_unet(), tiny_clip()
    module = load_network_module("lycoris.kohya")
    theirs = module.create_network(1.0, 1, 2.0, None, encoder, unet, algo=algo, preset="attn-mlp")
    with torch.no_grad():
        plain = run_unet(unet)
        theirs.attach(train_denoiser=True, train_text_encoder=True)
        randomize(theirs, size=0.3)
        expected = run_unet(unet)
        theirs.save(tmp_path / "theirs.safetensors", dtype=None, metadata=None)
        theirs.detach()
        network, weights = MODULES[algo].create_network_from_weights(
            1.0, tmp_path / "theirs.safetensors", None, encoder, unet
        )
        network.attach(train_denoiser=True, train_text_encoder=True)
        assert distance(expected, plain) > 1e-2
        assert distance(run_unet(unet) - plain, expected - plain) < 1e-4
        assert network.state(None).keys() == weights.keys()
        network.save(tmp_path / "ours.safetensors", dtype=None, metadata=None)
        network.detach()
        again, _ = module.create_network_from_weights(1.0, tmp_path / "ours.safetensors", None, encoder, unet)
        again.attach(train_denoiser=True, train_text_encoder=True)
        assert distance(run_unet(unet) - plain, expected - plain) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_start_values_are_as_large_as_in_lycoris(form: str) -> None:
    algo, arguments = FORMS[form]
    module = nn.Conv2d(480, 640, 3)
    new = their_layer(algo, module, 8, **arguments).custom_state_dict()
    own = own_layer(algo, module, 8, **arguments).tensors()
    large = {name for name, value in own.items() if value.numel() > 300} - {"dora_scale"}
    assert large
    for name in large:
        assert own[name].std().item() == pytest.approx(new[name].std().item(), rel=0.15), name


def test_the_parts_of_a_width() -> None:
    """What the factorization of LyCORIS gives for factor -1, 2, 4, 8, 16."""
    table = {
        127: [(1, 127)] * 5,
        128: [(8, 16), (2, 64), (4, 32), (8, 16), (8, 16)],
        250: [(10, 25), (2, 125), (2, 125), (5, 50), (10, 25)],
        360: [(18, 20), (2, 180), (4, 90), (8, 45), (15, 24)],
        512: [(16, 32), (2, 256), (4, 128), (8, 64), (16, 32)],
        1024: [(32, 32), (2, 512), (4, 256), (8, 128), (16, 64)],
    }
    assert {size: [parts_of(size, factor) for factor in (-1, 2, 4, 8, 16)] for size in table} == table


def literal(tensors: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """ΔW from a file's tensors by the published formulas."""
    get = tensors.get
    if "hada_w1_a" in tensors:
        halves = []
        for a, b, core in (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2")):
            if core in tensors:
                halves.append(torch.einsum("ijkl,jr,ip->prkl", tensors[core], tensors[b], tensors[a]))
            else:
                halves.append((tensors[a] @ tensors[b]).reshape(shape))
        return halves[0] * halves[1] * tensors["alpha"] / len(tensors["hada_w1_b"])
    w1 = get("lokr_w1", tensors["lokr_w1_a"] @ tensors["lokr_w1_b"] if "lokr_w1_a" in tensors else None)
    assert w1 is not None
    rest = (shape[0] // len(w1), shape[1] // w1.shape[1], *shape[2:])
    if "lokr_t2" in tensors:
        w2 = torch.einsum("ijkl,jr,ip->prkl", tensors["lokr_t2"], tensors["lokr_w2_b"], tensors["lokr_w2_a"])
    elif "lokr_w2_a" in tensors:
        w2 = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(rest)
    else:
        w2 = tensors["lokr_w2"]
    inner = get("lokr_w1_b", get("lokr_w2_b"))
    scale = 1.0 if inner is None else float(tensors["alpha"]) / len(inner)
    product = w1.reshape(*w1.shape, *[1] * (len(shape) - 2))
    return torch.kron(product, w2.contiguous()) * scale


@pytest.mark.parametrize("kind", [LoHaLayer, LoKrLayer])
@pytest.mark.parametrize("tucker", [False, True])
def test_merged_weight_by_the_formula(kind: type, tucker: bool) -> None:
    conv = nn.Conv2d(12, 20, 3, padding=1).requires_grad_(False)
    target = TargetSpec("lora_unet_x", (TargetModule("x", conv),), "denoiser")
    settings = FactorSettings(tucker=tucker) if kind is LoHaLayer else LokrSettings(tucker=tucker)
    layer = kind(target, rank=2, alpha=3.0, settings=settings)
    randomize(layer)
    change = literal(layer.tensors(), conv.weight.shape)
    torch.testing.assert_close(layer.merged_weight(), conv.weight + change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algo", MODULES)
@pytest.mark.parametrize("family", ["flux", "flux2", "chroma", "sd35", "lumina"])
def test_fused_layers_are_one_adapter(algo: str, family: str) -> None:
    """In every architecture: merged is applied, and the fused layers' ΔW is the file's formula cut into rows."""
    tiny = TINY[family]
    model = tiny.make()
    network = ours(algo, model, dim=2)
    lora = tiny.module.create_network(1.0, 2, 2.0, None, [], model)
    assert [*network.named_layers()] == [*lora.named_layers()]
    randomize(network, size=0.3)
    with torch.no_grad():
        plain = tiny.run(model)
        network.attach(train_denoiser=True, train_text_encoder=False)
        applied = tiny.run(model)
    fused = [layer for layer in network.named_layers().values() if len(layer.target.modules) > 1]
    for layer in fused[:4]:
        whole = torch.cat([layer.merged_weight(i) for i in range(len(layer.target.modules))])
        if len({id(m.module) for m in layer.target.modules}) > 1:
            expected = layer.target.weight + literal(layer.tensors(), layer.target.weight.shape)
            torch.testing.assert_close(whole, expected.detach(), rtol=1e-4, atol=1e-5)
    network.merge_into()
    with torch.no_grad():
        merged = tiny.run(model)
    assert fused and distance(applied, plain) > 1e-2
    assert distance(merged - plain, applied - plain) < 1e-3


@pytest.mark.parametrize("algo", MODULES)
def test_rank_dropout_drops_rows(algo: str) -> None:
    unet = tiny_unet()
    network = ours(algo, unet, rank_dropout="0.5", rank_dropout_scale="True")
    randomize(network)
    layer = next(iter(network.named_layers("denoiser").values()))
    module = layer.target.modules[0].module
    x = torch.randn(2, module.weight.shape[1], *([5, 5] if layer.is_conv else []))
    plain = module(x)
    layer.attach()
    torch.manual_seed(0)
    changed = (module(x) - plain).movedim(1, -1).flatten(0, -2)
    layer.eval()
    full = (module(x) - plain).movedim(1, -1).flatten(0, -2)
    kept = changed.abs().sum(0) > 0
    assert 0 < kept.sum() < len(kept)
    factor = len(kept) / kept.sum()
    torch.testing.assert_close(changed[:, kept], full[:, kept] * factor, rtol=1e-3, atol=1e-4)


# ---- files and mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_formats(form: str) -> None:
    """kohya is what it is; comfy has the same tensors under its names; peft has no names for them."""
    algo, arguments = FORMS[form]
    flux = TINY["flux"].make()
    state = ours(algo, flux, dim=2, **{k: v for k, v in arguments.items() if k != "dora_wd"}).state(None)
    assert format_of(state) == "kohya" and convert(state, "kohya").keys() == state.keys()
    comfy = convert(state, "comfy")
    back = convert(comfy, "kohya")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(UserError, match=r"adapters have no name in the peft format: lora_unet_.*(hada|lokr)"):
        convert(state, "peft")


@pytest.mark.parametrize(
    ("algo", "arguments", "expected"),
    [
        ("loha", {"use_tuker": "1"}, "unknown key 'use_tuker'. Did you mean 'use_tucker'?"),
        ("loha", {"factor": "8"}, "unknown key 'factor'"),
        ("lokr", {"factors": "8"}, "unknown key 'factors'. Did you mean 'factor'?"),
        ("lokr", {"factor": "0"}, "factor must be -1 or at least 1, got 0"),
        ("lokr", {"full_matrix": "1", "decompose_both": "1"}, "decompose_both has no effect with full_matrix"),
        ("loha", {"wd_on_output": "False"}, "wd_on_output has no effect without dora_wd"),
    ],
)
def test_mistakes(algo: str, arguments: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_network_module(f"networks.{algo}").check_arguments(arguments)
    [line] = error.value.problems
    assert line.startswith("--network_args: ") and expected in line


def test_what_does_not_fit(tmp_path: Path) -> None:
    unet = tiny_unet()
    state = ours("lokr", unet, factor="2").state(None)
    with pytest.raises(UserError, match="its form depends on rank and factor"):
        ours("lokr", unet, full_matrix="True").load(state)
    with pytest.raises(UserError, match=r"has rank 1, this network has 2 \(set --network_dim"):
        ours("loha", unet, dim=2).load(ours("loha", unet).state(None))
    with pytest.raises(UserError, match=r"of another kind .* \(--network_module networks.lokr reads such files\)"):
        loha.create_network_from_weights(1.0, None, None, None, unet, weights_sd=state)
    wide = {key: value.repeat(2, 1) if key.endswith("lokr_w1") else value for key, value in state.items()}
    with pytest.raises(UserError, match=r"is a product of \d+ x \d+, the layer has \d+ x \d+"):
        lokr.create_network_from_weights(1.0, None, None, None, unet, weights_sd=wide)
    with pytest.raises(UserError, match="conv_dim, network_reg_dims: ranks and alphas come from"):
        lokr.create_network_from_weights(
            1.0, None, None, None, unet, weights_sd=state, conv_dim="2", network_reg_dims="attn=2"
        )


def test_blocks_convolutions_and_norms() -> None:
    """The options of networks.lora that choose layers, ranks and learning rates."""
    unet = tiny_unet()
    weights = {"down_lr_weight": ",".join(["0.5"] * 12), "mid_lr_weight": "0", "up_lr_weight": "zeros+1"}
    network = ours("loha", unet, conv_dim="2", train_norm="True", network_reg_dims="attn1=3", **weights)
    layers = network.named_layers()
    assert not any("mid_block" in name for name in layers if "attn1" not in name)
    assert {getattr(layer, "rank", None) for name, layer in layers.items() if "attn1" in name} == {3}
    assert any("w_norm" in key for key in network.state(None))
    rates = {group["name"]: group["lr"] for group in network.param_groups(learning_rate=1.0)}
    assert rates["unet_block1"] == 0.5 and {rate for name, rate in rates.items() if name > "unet_block13"} >= {1.0}


def test_no_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_network_module("networks.loha").create_network(1.0, 2, 1.0, None, None, tiny_unet(), neuron_dropout=0.1)
        ours("lokr", TINY["flux"].make(), conv_dim="2")
    assert "--network_dropout: no effect, networks.loha" in caplog.text
    assert "conv_dim: no effect, this model has no such layers" in caplog.text
    with pytest.raises(UserError, match="per block are not known for this model"):
        ours("lokr", TINY["flux"].make(), block_dims="1,2")


def test_t5_learns_when_asked() -> None:
    import transformers as t

    t5 = t.T5EncoderModel(t.T5Config(d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, vocab_size=9))
    for asked in (False, True):
        arguments = {"train_t5xxl": "True"} if asked else {}
        network = ours("loha", TINY["flux"].make(), [tiny_clip(), t5], **arguments)  # type: ignore[arg-type]
        assert any(name.startswith("lora_te3_") for name in network.named_layers()) == asked


def test_base_weights_may_be_of_any_kind() -> None:
    """What is merged before training need not be of the kind that is trained."""
    for state in (
        ours("lokr", tiny_unet()).state(None),
        lora.create_network(1.0, 2, 2.0, None, None, tiny_unet()).state(None),
    ):
        filled = {key: torch.randn_like(value) * 0.3 if value.dim() else value for key, value in state.items()}
        expected, found = tiny_unet(), tiny_unet()
        kind = lora if any("lora_down" in key for key in filled) else lokr
        for module, unet in ((kind, expected), (loha, found)):
            network, _ = module.create_network_from_weights(
                0.7, None, None, None, unet, weights_sd=filled, for_inference=True
            )
            network.merge_into()
        assert distance(run_unet(found), run_unet(tiny_unet())) > 1e-2
        assert torch.equal(run_unet(found), run_unet(expected))
