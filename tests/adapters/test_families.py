# SPDX-License-Identifier: Apache-2.0
"""Adapters in tiny FLUX.1, Chroma, SD3, SD3.5 and Lumina models against the published weights they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.adapters.adapter_layer import AdapterLayer
from library.adapters.layers.lora import LoRALayer, LoraSettings
from library.adapters.target_spec import TargetModule, TargetSpec
from library.families.anima.names import anima_names
from library.families.flux.names import flux_names
from library.families.flux2.names import flux2_names
from library.families.hunyuan_image.names import hunyuan_names
from library.families.lumina.names import lumina_names
from library.families.sd3.names import sd3_names
from library.key_tables import ModuleName, expand, publish, read
from tests.adapters.families import TINY, Tiny
from tests.adapters.models import distance, randomize

NAMES: dict[str, Callable[[], list[ModuleName]]] = {
    "flux": lambda: flux_names(2, 2),
    "chroma": lambda: flux_names(2, 2, 2),
    "flux2": lambda: flux2_names(2, 2),
    "sd3": lambda: sd3_names(2),
    "sd35": lambda: sd3_names(3),
    "lumina": lambda: lumina_names(2, 2),
    "anima": lambda: anima_names(2, 2),
    "hunyuan_image": lambda: hunyuan_names(2, 2, 2),
}
FORMS = {
    "plain": {},
    "split": {"split_qkv": "True"},
    "dora": {"dora_wd": "True"},
    "split_dora_rs": {"split_qkv": "True", "dora_wd": "True", "rs_lora": "True"},
}
DROPOUTS = {"rank_dropout": "0.3", "module_dropout": "0.2", "dropout": "0.1"}


def attached(tiny: Tiny, model: nn.Module, **arguments: str) -> Any:
    if not tiny.module.BUILDER.targets.fused and arguments.pop("split_qkv", None):
        pytest.skip("no layer of this model is published as several in one")
    torch.manual_seed(5)
    network = tiny.module.create_network(1.0, 4, 2.0, None, [], model, **tiny.everything, **arguments)
    randomize(network, size=0.1)
    network.attach(train_denoiser=True, train_text_encoder=False)
    return network


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TINY)
def test_published_weights_plus_the_file_is_the_model_with_adapters(family: str, form: str) -> None:
    """The file's tensors by the LoRA (or DoRA) formula on the published checkpoint, read back: the same output."""
    tiny = TINY[family]
    model = tiny.make()
    plain = tiny.run(model)
    network = attached(tiny, model, **FORMS[form])
    applied = tiny.run(model)
    assert distance(applied, plain) > 0.05
    state = network.state(None)
    network.detach()

    ours = model.state_dict()
    rules = expand(NAMES[family](), [name for name in ours if "pos_embed.pos_embed" not in name])
    published = publish(ours, rules)
    layers = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": key for key in published}
    for name in {key.partition(".")[0] for key in state}:
        weight = published[layers[name]]
        down, up = state[f"{name}.lora_down.weight"].flatten(1), state[f"{name}.lora_up.weight"].flatten(1)
        changed = weight + (float(state[f"{name}.alpha"]) / len(down) * up @ down).reshape(weight.shape)
        if f"{name}.dora_scale" in state:
            changed = (
                state[f"{name}.dora_scale"]
                * changed
                / changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
            )
        published[layers[name]] = changed
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    back, wrong = read(published.__getitem__, published, rules, shapes)
    assert wrong == []
    model.load_state_dict(back, strict=False)
    assert distance(tiny.run(model), applied) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TINY)
def test_merged_is_applied(family: str, form: str, dtype: torch.dtype) -> None:
    tiny = TINY[family]
    model = tiny.make(dtype)
    network = attached(tiny, model, **FORMS[form])
    applied = tiny.run(model)
    network.merge_into()
    assert applied.dtype == dtype
    assert distance(tiny.run(model), applied) < (1e-5 if dtype == torch.float32 else 0.05)


def gradients(tiny: Tiny, model: nn.Module, network: Any) -> list[Tensor]:
    network.zero_grad()
    torch.manual_seed(0)
    tiny.run(model).square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "arguments",
    [DROPOUTS, {"dora_wd": "True"}, {"split_qkv": "True", **DROPOUTS}, {"ggpo_sigma": "0.03", "ggpo_beta": "0.01"}],
    ids=["dropouts", "dora", "split_dropouts", "ggpo"],
)
@pytest.mark.parametrize("family", TINY)
def test_recomputed_blocks_give_the_same_gradients(family: str, arguments: dict[str, str]) -> None:
    tiny = TINY[family]
    model = tiny.make()
    network = attached(tiny, model, **arguments)
    gradients(tiny, model, network)
    network.step_taken()
    expected = gradients(tiny, model, network)
    main: Any = dict(model.named_children()).get("transformer", model)
    main.enable_gradient_checkpointing(
        gradient_checkpointing_func=lambda f, *a, **k: checkpoint(f, *a, use_reentrant=False, **k)
    )
    found = gradients(tiny, model, network)
    assert len(found) > 20 and max(float(gradient.abs().max()) for gradient in expected) > 1e-4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    kept = [layer.target.name for layer in network.layers.values() if layer.shared._input is not None]
    assert kept == [], "nothing of the step is kept alive"


def test_every_parameter_gets_a_gradient() -> None:
    tiny = TINY["sd35"]
    model = tiny.make()
    network = attached(tiny, model, split_qkv="True")
    gradients(tiny, model, network)
    # the last block's text stream ends there: its queries take part, its output is not used
    without = {name for name, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0}
    assert all("joint_blocks_2_context_block_attn_qkv.parts.0" in name for name in without)


def test_compiles_in_one_graph() -> None:
    tiny = TINY["flux"]
    model: Any = tiny.make()
    network = attached(tiny, model, rank_dropout="0.0")
    expected = gradients(tiny, model, network)
    blocks = model.single_transformer_blocks
    blocks[0] = torch.compile(blocks[0], fullgraph=True, backend="aot_eager")
    found = gradients(tiny, model, network)
    assert all(distance(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))


# ---- one fused layer -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """q, k, v apart, called in another order than the rows of the published layer have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        v, q = self.v(x), self.q(x)
        return torch.cat([q, self.k(x), v], -1)


def fused_pair(settings: LoraSettings) -> tuple[Attention, nn.Linear, LoRALayer, LoRALayer]:
    """The same LoRA on q, k, v and on one Linear with their rows."""
    torch.manual_seed(0)
    apart = Attention().requires_grad_(False)
    modules = tuple(TargetModule(name, getattr(apart, name)) for name in "qkv")
    whole = nn.Linear(8, 12).requires_grad_(False)
    whole.weight.copy_(torch.cat([apart.q.weight, apart.k.weight, apart.v.weight]))
    whole.bias.copy_(torch.cat([apart.q.bias, apart.k.bias, apart.v.bias]))
    targets = (
        TargetSpec("lora_unet_qkv", modules, "denoiser"),
        TargetSpec("lora_unet_qkv", (TargetModule("qkv", whole),), "denoiser"),
    )
    layers = [LoRALayer(target, rank=3, alpha=2.0, settings=settings) for target in targets]
    for layer in layers:
        randomize(layer, seed=1)
        layer.attach()
    layers[1].load_tensors(layers[0].tensors())
    return apart, whole, layers[0], layers[1]


@pytest.mark.parametrize("dora", [None, "output"])
def test_a_fused_layer_drops_what_one_linear_would_drop(dora: str | None) -> None:
    settings = LoraSettings(dora=dora, neuron_dropout=0.3, rank_dropout=0.4, module_dropout=0.3)
    apart, whole, on_parts, on_whole = fused_pair(settings)
    x = torch.randn(4, 5, 8)
    plain = torch.nn.functional.linear(x, whole.weight, whole.bias)
    dropped = 0
    for seed in range(8):
        outputs = []
        for model, layer in ((apart, on_parts), (whole, on_whole)):
            torch.manual_seed(seed)
            layer.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
        assert distance(outputs[0], outputs[1]) < 1e-6
        dropped += torch.equal(outputs[1], plain)
        for a, b in zip(on_parts.parameters(), on_whole.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
    assert 0 < dropped < 8


def test_down_is_computed_once_for_a_fused_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, _, layer, _ = fused_pair(LoraSettings())
    computed: list[Tensor] = []
    inner = layer._inner

    def counted(x: Tensor) -> Tensor:
        computed.append(x)
        return inner(x)

    monkeypatch.setattr(layer, "_inner", counted)
    x = torch.randn(2, 8)
    apart(x)
    assert len(computed) == 1 and layer.shared._input is None
    with torch.no_grad():  # another pass with the same input: the weights may be others by now
        layer.lora_down.mul_(2)
    before = apart.q(x)
    apart.q(x)
    assert len(computed) == 3 and torch.equal(apart.q(x), before)


def test_a_pass_that_is_not_finished_does_not_disturb_the_next() -> None:
    apart, whole, layer, on_whole = fused_pair(LoraSettings())
    apart.q(torch.randn(2, 8))
    x = torch.randn(2, 8)
    with torch.no_grad():
        apart.k(x)
    outputs = apart(x), whole(x)
    assert distance(*outputs) < 1e-6
    for output in outputs:
        output.square().sum().backward()
    assert layer.lora_down.grad is not None and on_whole.lora_down.grad is not None
    assert distance(layer.lora_down.grad, on_whole.lora_down.grad) < 1e-6


# ---- GGPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"dora_wd": "True"}], ids=["plain", "dora"])
def test_ggpo_noise(form: dict[str, str]) -> None:
    tiny = TINY["flux"]
    model = tiny.make()
    network = attached(tiny, model, ggpo_sigma="0.03", ggpo_beta="2.0", **form)
    calm = tiny.run(model)
    gradients(tiny, model, network)
    layers = network.named_layers()
    layer = layers["lora_unet_double_blocks_0_img_attn_qkv"]
    assert torch.equal(layer.noise, torch.zeros(96))
    network.step_taken()
    down, up, scale = layer.lora_down.detach(), layer.lora_up.detach(), layer.scale
    weight = torch.cat([module.module.weight for module in layer.target.modules]) + scale * up @ down
    gradient = scale * (up @ layer.lora_down.grad + layer.lora_up.grad @ down)
    expected = (0.03 * weight.norm(dim=1) + 2.0 * gradient.norm(dim=1) ** 2) / 96**0.5
    assert distance(layer.noise, expected) < 1e-4

    torch.manual_seed(0)
    shaken = tiny.run(model)
    assert 1e-3 < distance(shaken, calm) < 2
    torch.manual_seed(0)
    assert torch.equal(tiny.run(model), shaken)
    network.eval()
    assert torch.equal(tiny.run(model), calm)
    assert not any("noise" in key for key in network.state(None))


def test_ggpo_noise_has_the_variance_it_says() -> None:
    linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
    layer = LoRALayer(
        TargetSpec("x", (TargetModule("x", linear),), "denoiser"),
        rank=2,
        alpha=2,
        settings=LoraSettings(noise=(1.0, 0.0)),
    )
    layer.noise = torch.tensor([0.0, 0.1, 1.0, 3.0])
    x = torch.randn(1, 6)
    torch.manual_seed(0)
    draws = torch.cat([layer._perturbation(x, 0) for _ in range(4000)])
    torch.testing.assert_close(draws.std(0), layer.noise * x.norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("split", ["False", "True"])
def test_ggpo_resumes_exactly(split: str) -> None:
    tiny = TINY["sd3"]
    arguments = {"ggpo_sigma": "0.03", "ggpo_beta": "0.01", "split_qkv": split}
    model, fresh = tiny.make(), tiny.make()
    network = attached(tiny, model, **arguments)
    gradients(tiny, model, network)
    network.step_taken()
    resumed = attached(tiny, fresh, **arguments)
    resumed.load_exact_state(network.exact_state())
    outputs = []
    for each in (model, fresh):
        torch.manual_seed(1)
        outputs.append(tiny.run(each))
    assert torch.equal(*outputs)
    assert any("noise" in name for name in network.exact_state())


def test_conv_adapter_of_the_patch_embedding() -> None:
    tiny = TINY["sd3"]
    network = attached(tiny, tiny.make())
    state = network.state(None)
    assert state["lora_unet_x_embedder_proj.lora_down.weight"].shape == (2, 16, 2, 2)
    assert state["lora_unet_x_embedder_proj.lora_up.weight"].shape == (16, 2, 1, 1)
    layer = network.named_layers()["lora_unet_final_layer_adaLN_modulation_1"]
    assert isinstance(layer, AdapterLayer)
    assert [module.rows for module in layer.target.modules] == [slice(16, 32), slice(0, 16)]


# ---- text encoders -------------------------------------------------------------------------------------------------


def tiny_encoders() -> dict[str, nn.Module]:
    import transformers as t

    torch.manual_seed(0)
    clip: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 50, "projection_dim": 16}  # fmt: skip
    found = {
        "lora_te1": t.CLIPTextModel(t.CLIPTextConfig(**clip, bos_token_id=48, eos_token_id=49)),
        "lora_te2": t.CLIPTextModelWithProjection(t.CLIPTextConfig(**clip, bos_token_id=48, eos_token_id=49)),
        "lora_te3": t.T5EncoderModel(
            t.T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, vocab_size=50,
                       feed_forward_proj="gated-gelu")
        ),
        "lora_te": t.Gemma2Model(t.Gemma2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, vocab_size=50,
        )),
    }  # fmt: skip
    return {name: encoder.requires_grad_(False).eval() for name, encoder in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["lora_te1", "lora_te2", "lora_te3", "lora_te"])
def test_text_encoders(prefix: str, dtype: torch.dtype) -> None:
    encoder = tiny_encoders()[prefix].to(dtype)
    places: list[nn.Module | None] = [None, encoder, None] if prefix == "lora_te2" else [encoder]
    module = TINY["lumina" if prefix == "lora_te" else "sd3"].module
    arguments = {"train_t5xxl": "True"} if prefix == "lora_te3" else {}
    network: Any = module.create_network(1.0, 4, 2.0, None, places, None, **arguments)
    randomize(network, size=0.3)
    assert {name.partition("_")[2].partition("_")[0] for name in network.layers} == {prefix.partition("_")[2]}
    ids = torch.tensor([[3, 4, 5, 49]])
    plain = encoder(ids)[0]
    network.attach(train_denoiser=False, train_text_encoder=True)
    applied = encoder(ids)[0]
    assert distance(applied, plain) > 0.05
    applied.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network.merge_into()
    assert distance(encoder(ids)[0], applied) < (1e-5 if dtype == torch.float32 else 0.05)
