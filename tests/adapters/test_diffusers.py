# SPDX-License-Identifier: Apache-2.0
"""diffusers reads our files: every key is used and its U-Net answers like ours merged."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from networks.lora import create_network
from tests.adapters.known_formats import convert, to_kohya
from tests.adapters.lora_samples import SAMPLES, Sample, adapter, flux, lumina, merge
from tests.adapters.models import distance, randomize, run_unet, tiny_clip, tiny_unet

pytest.importorskip("peft")

IDS = torch.tensor([[48, 1, 2, 3, 49]])


def pipeline(encoder: nn.Module, unet: nn.Module) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None, text_encoder=encoder, tokenizer=None, unet=unet, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def trained(encoder: nn.Module, unet: nn.Module, **arguments: Any) -> Any:
    torch.manual_seed(5)
    network = create_network(1.0, 4, 2.0, None, encoder, unet, **arguments)
    randomize(network)
    return network


FORMS: dict[str, dict[str, str]] = {
    "plain": {},
    "conv": {"conv_dim": "2", "conv_alpha": "1"},
    "rs_lora": {"rs_lora": "True"},
    "scalar": {"use_scalar": "True"},
}


@pytest.mark.parametrize("form", ["kohya", "peft"])
@pytest.mark.parametrize("arguments", FORMS)
def test_load_lora_weights(arguments: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    network = trained(encoder, unet, **FORMS[arguments])
    path = tmp_path / "lora.safetensors"
    network.save(path, dtype=None, metadata={"ss_network_dim": "4"})
    tensors = convert(network.state(None), "peft")
    theirs = pipeline(copy.deepcopy(encoder), copy.deepcopy(unet))
    unused = load_watched(theirs, str(path) if form == "kohya" else tensors, caplog)
    assert unused == []
    assert adapter_count(theirs.unet) + adapter_count(theirs.text_encoder) == len(network.named_layers())
    network.merge_into()
    assert distance(run_unet(theirs.unet), run_unet(unet)) < 1e-5
    assert distance(theirs.text_encoder(IDS)[0], encoder(IDS)[0]) < 1e-5


@pytest.mark.parametrize("arguments", [{}, {"conv_dim": "2"}], ids=["attention", "conv"])
def test_load_dora(arguments: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """peft form, U-Net: diffusers 0.42 drops dora_scale of kohya files and cannot read an encoder's DoRA."""
    encoder, unet = tiny_clip(), tiny_unet()
    network = trained(encoder, unet, dora_wd="True", **arguments)
    network.attach(train_denoiser=True, train_text_encoder=False)
    theirs = pipeline(copy.deepcopy(encoder), tiny_unet())
    tensors = convert(network.state(None), "peft")
    assert load_watched(theirs, tensors, caplog) == []
    assert adapter_count(theirs.unet) == len(network.named_layers())
    network.merge_into()
    assert distance(run_unet(theirs.unet), run_unet(unet)) < 1e-5


def load_watched(pipe: Any, lora: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Load, and return what the libraries said about keys that they did not use."""
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(lora)
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "nexpected key" in message or "UNEXPECTED" in message]


def adapter_count(model: nn.Module) -> int:
    return sum(name.endswith("lora_A.default_0") for name, _ in model.named_modules())


def test_peft_keys_load_into_our_network() -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    network = trained(encoder, unet, dora_wd="True", conv_dim="2")
    state = network.state(None)
    peft = convert(state, "peft")
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in peft
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in peft
    again = to_kohya(peft)
    assert again.keys() == {key for key in state if not key.endswith(".alpha")}
    other = create_network(1.0, 4, 2.0, None, encoder, unet, dora_wd="True", conv_dim="2")
    other.load(peft)
    expected = run_with(network, unet)
    assert distance(run_with(other, unet), expected) < 1e-6


def run_with(network: Any, unet: nn.Module) -> torch.Tensor:
    network.attach(train_denoiser=True, train_text_encoder=True)
    output = run_unet(unet)
    network.detach()
    return output


# ---- transformers -------------------------------------------------------------------------------------------------


def mixin(name: str) -> Any:
    from diffusers.loaders import lora_pipeline

    families = {
        "flux": "Flux", "flux2": "Flux2", "chroma": "Flux", "sd3": "SD3", "lumina": "Lumina2", "anima": "Anima",
        "sana": "Sana",
    }  # fmt: skip
    return getattr(lora_pipeline, f"{families[name]}LoraLoaderMixin")


def load_transformer(name: str, tensors: dict[str, torch.Tensor], model: nn.Module, caplog: Any) -> list[str]:
    """Through the loader of the family's pipelines; what it said about keys."""
    logging.getLogger("diffusers").propagate = True
    if name == "hunyuan_image":  # its pipeline has no loader
        with caplog.at_level(logging.WARNING):
            model.load_lora_adapter(dict(tensors), prefix="transformer")  # type: ignore[operator]
        return [record.getMessage() for record in caplog.records]
    loader = mixin(name)
    with caplog.at_level(logging.WARNING):
        if name in ("flux", "chroma"):
            state, alphas = loader.lora_state_dict(dict(tensors), return_alphas=True)
            loader.load_lora_into_transformer(state, alphas, model, low_cpu_mem_usage=True)
        elif name == "anima":
            state = loader.lora_state_dict(dict(tensors))
            for part in ("transformer", "text_conditioner"):
                own = {key: value for key, value in state.items() if key.startswith(f"{part}.")}
                load = getattr(loader, f"load_lora_into_{part}")
                load(own, model.get_submodule(part), low_cpu_mem_usage=True)
        else:
            loader.load_lora_into_transformer(loader.lora_state_dict(dict(tensors)), model, low_cpu_mem_usage=True)
    return [record.getMessage() for record in caplog.records]


def check_loads(
    name: str, sample: Sample, tensors: dict[str, torch.Tensor], to: str, caplog: Any, architecture: str | None = None
) -> None:
    """Every part has an adapter, nothing is unused, and the output is that of the weights changed by formula."""
    theirs = copy.deepcopy(sample.model)
    written = {form: convert(tensors, form, architecture=architecture) for form in (to, "peft")}
    assert load_transformer(name, written[to], theirs, caplog) == []
    parts = {key.partition(".lora_A")[0] for key in written["peft"] if ".lora_A." in key}
    assert adapter_count(theirs) == len(parts) > 0
    before = sample.run(sample.model)
    with torch.no_grad():
        found = sample.run(theirs)
        merge(sample, tensors)
        expected = sample.run(sample.model)
    assert distance(found, expected) < 1e-4 < 100 * distance(before, expected)


@pytest.mark.parametrize("form", ["fused", "split", "dora", "one rank each"])
@pytest.mark.parametrize("name", SAMPLES)
def test_peft_files_load(name: str, form: str, caplog: pytest.LogCaptureFixture) -> None:
    sample = SAMPLES[name]()
    tensors = adapter(sample, alpha=2.7, split=form == "split", dora=form == "dora")
    if form == "one rank each":
        tensors |= adapter(sample, rank=3, alpha=1.0, only="mlp") | adapter(
            sample, rank=5, alpha=1.0, only="feed_forward"
        )
    check_loads(name, sample, tensors, "peft", caplog)


def test_comfy_files_of_anima_load(caplog: pytest.LogCaptureFixture) -> None:
    """Every layer, those of the LLM adapter too, which is the text conditioner there."""
    sample = SAMPLES["anima"]()
    tensors = adapter(sample, alpha=2.7)
    check_loads("anima", sample, tensors, "comfy", caplog)


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_kohya_files_of_flux_load(name: str, split: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Layers inside the blocks. diffusers has the rows of linear1 at full width only, see the next test."""
    sample = SAMPLES[name]()
    tensors = {key: value for key, value in adapter(sample, alpha=2.7, split=split).items() if "linear1" not in key}
    tensors = {key: value for key, value in tensors.items() if "_blocks_" in key}
    check_loads(name, sample, tensors, "kohya", caplog)


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_kohya_files_of_flux_load_at_full_width(split: bool, caplog: pytest.LogCaptureFixture) -> None:
    """linear1: its adapter's output, in a model of zeros, is that of the four Linear layers of diffusers."""
    with torch.device("meta"):
        theirs = flux(double=0, single=1, heads=24, head_dim=128).model
    for module in theirs.modules():
        for name, parameter in module.named_parameters(recurse=False):  # zeros of full size without the memory
            setattr(module, name, nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    key, ranks = "lora_unet_single_blocks_0_linear1", 8 if split else 2
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(21504, ranks, generator=draw), torch.randn(ranks, 3072, generator=draw)
    if split:
        up = torch.block_diag(*[rows[:, :2] for rows in up.split([3072, 3072, 3072, 12288])])
    tensors = {f"{key}.alpha": torch.tensor(2.7), f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    assert load_transformer("flux", {k: v.clone() for k, v in tensors.items()}, theirs, caplog) == []
    x = torch.randn(3072, generator=draw)
    block = theirs.get_submodule("single_transformer_blocks.0")
    outputs = []
    for path in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        layer: Any = block.get_submodule(path)
        outputs.append(layer.lora_B["default_0"](layer.lora_A["default_0"](x)) * layer.scaling["default_0"])
    assert distance(torch.cat(outputs), up @ (down @ x) * (2.7 / ranks)) < 1e-5
    assert outputs[3].shape == (12288,) and adapter_count(theirs) == 4


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_files_of_flux2_load(to: str, split: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The layers that are adapted by default, and those with in_dims."""
    sample = SAMPLES["flux2"]()
    known = ("_blocks_", "lora_unet_img_in", "lora_unet_txt_in", "lora_unet_time_in")
    tensors = {k: v for k, v in adapter(sample, alpha=2.7, split=split).items() if any(part in k for part in known)}
    check_loads("flux2", sample, tensors, to, caplog, architecture="flux2")


def test_comfy_files_of_lumina_load_at_full_width(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers wants every layer of each block, and none outside of the blocks."""
    sample = lumina(
        2304, layers=1, refiners=0, num_attention_heads=24, num_kv_heads=8, axes_dim_rope=(32, 32, 32),
        ffn_dim_multiplier=0.05,
    )  # fmt: skip
    tensors = adapter(sample, rank=1, alpha=0.1, only="lora_unet_layers_")
    check_loads("lumina", sample, tensors, "comfy", caplog)


@pytest.mark.parametrize(("name", "to"), [("flux", "kohya"), ("flux", "peft"), ("sd3", "peft")])
def test_text_encoders_load(name: str, to: str, caplog: pytest.LogCaptureFixture) -> None:
    """CLIP-L, and the CLIP-G of SD3. diffusers reads no adapter of T5."""
    first, second = tiny_clip(), tiny_clip(1)
    torch.manual_seed(5)
    encoders = [first, second] if name == "sd3" else [first]
    tensors: dict[str, torch.Tensor] = {}
    for number, encoder in enumerate(encoders, start=1):
        network = create_network(1.0, 4, 2.7, None, encoder, None)
        randomize(network)
        tensors |= {k.replace("lora_te_", f"lora_te{number}_"): v for k, v in network.state(None).items()}
    loader = mixin(name)
    written = {k: v.clone() for k, v in convert(tensors, to).items()}  # diffusers scales in place
    state = loader.lora_state_dict(written)
    for number, encoder in enumerate(encoders, start=1):
        theirs = copy.deepcopy(encoder)
        prefix = "text_encoder" if number == 1 else f"text_encoder_{number}"
        with caplog.at_level(logging.WARNING):
            loader.load_lora_into_text_encoder(state, None, theirs, prefix=prefix)
        assert adapter_count(theirs) == 12
        own = {k.replace(f"lora_te{number}_", "lora_te_"): v for k, v in tensors.items() if f"lora_te{number}_" in k}
        network = create_network(1.0, 4, 2.7, None, encoder, None)
        network.load(own)
        network.merge_into()
        assert distance(theirs(IDS)[0], encoder(IDS)[0]) < 1e-5
    assert [record.getMessage() for record in caplog.records if "key" in record.getMessage()] == []
