# SPDX-License-Identifier: Apache-2.0
"""Our rules for diffusers say of each file what its real loader does: refused, left out, other than trained, right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from library.adapters.formats.conversion import FORMATS
from library.adapters.readers.comparison import DIFFUSERS, NetworkComparison
from library.errors import UserError
from library.families.adapters import load_network_module
from tests.adapters.families import TINY
from tests.adapters.known_formats import TABLES, convert, dora_norms
from tests.adapters.models import distance, randomize, tiny_clip, tiny_unet
from tests.adapters.readers.real import Outcome, load

pytest.importorskip("peft")


def compare(model: str, network: Any, denoiser: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, str]:
    """The outcome of each format, after it was found to be the same by the rules and by the loader."""
    randomize(network)
    check = NetworkComparison(network.trained(), model, TABLES)
    state, targets = network.state(None), network.targets()
    found = {}
    for form in FORMATS:
        try:
            norms = dora_norms(state, lambda name: targets[name].weight) if form == "comfy" else None
            tensors = convert(state, form, norms=norms, architecture={"chroma": "flux"}.get(model, model))
        except (UserError, KeyError):
            continue
        rules, real = check.verdict(DIFFUSERS, tensors), Outcome(check, tensors, denoiser, encoders)
        assert bool(rules.refused) == real.refused, (form, rules.text(), real.error)
        assert sorted(rules.missing) == sorted(real.missing), (form, real.wrong)
        assert sorted(name for name, _ in rules.wrong) == sorted(real.wrong), form
        found[form] = "yes" if rules.takes else rules.text().partition(":")[0]
    return found


REFUSES, NOTHING = "refuses the file", "loads nothing of the file"


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        ("lora", {"conv_dim": "2"}, {"kohya": "yes", "comfy": REFUSES, "peft": "yes"}),
        ("lora", {"dora_wd": "True"}, {"kohya": "changes 60 of 60 layers otherwise than trained", "comfy": REFUSES}),
        ("lora", {"conv_dim": "2", "use_tucker": "True"}, {"kohya": REFUSES}),
        ("lora", {"train_norm": "True"}, {"kohya": REFUSES}),
        ("lora", {"network_reg_dims": "to_q=2,fc1=3", "rs_lora": "True"}, {"peft": "yes"}),
        ("loha", {}, {"kohya": REFUSES, "comfy": REFUSES}),
        ("oft", {}, {"kohya": REFUSES}),
    ],
)
def test_stable_diffusion(module: str, arguments: dict[str, str], expected: dict[str, str]) -> None:
    encoder, unet = tiny_clip(), tiny_unet()
    torch.manual_seed(5)
    alpha = 1e-3 if module == "oft" else 2.7
    network = load_network_module(f"networks.{module}").create_network(1.0, 4, alpha, None, encoder, unet, **arguments)
    found = compare("sd1", network, unet, [encoder])
    assert found | expected == found


@pytest.mark.parametrize("arguments", [{}, {"dora_wd": "True"}, {"split_qkv": "True"}], ids=lambda a: "".join(a))
@pytest.mark.parametrize("family", TINY)
def test_transformers(family: str, arguments: dict[str, str]) -> None:
    tiny = TINY[family]
    if "split_qkv" in arguments and not tiny.module.BUILDER.targets.fused:
        return
    model = tiny.make()
    torch.manual_seed(5)
    everything = {} if arguments else tiny.everything
    network = tiny.module.create_network(1.0, 4, 2.7, None, None, model, **arguments, **everything)
    found = compare({"sd35": "sd3"}.get(family, family), network, model, [])
    assert found["peft"] == "yes"
    if family == "flux2":
        assert found == (found | {"kohya": "yes", "comfy": "yes"} if "dora_wd" not in arguments else found)
    else:
        assert found["kohya"] == (REFUSES if family in ("flux", "chroma") else NOTHING)
    if family == "anima" and not arguments:
        assert found["comfy"] == "yes"


@pytest.mark.parametrize(("module", "form", "expected"), [
    ("lokr", "comfy", "yes"), ("lokr", "kohya", REFUSES), ("loha", "comfy", REFUSES), ("loha", "kohya", NOTHING),
])  # fmt: skip
def test_other_kinds_for_flux2(module: str, form: str, expected: str) -> None:
    """LoKr is put on layers that diffusers fuses for it: what the whole model gives is compared."""
    tiny, network_module = TINY["flux2"], load_network_module(f"networks.{module}")
    model = tiny.make()
    torch.manual_seed(5)
    network: Any = network_module.create_network(1.0, 4, 2.7, None, [], model)
    randomize(network)
    network.attach(train_denoiser=True, train_text_encoder=False)
    trained = tiny.run(model)
    network.detach()
    tensors = convert(network.state(None), form, architecture="flux2") if form == "comfy" else network.state(None)
    rules = NetworkComparison(network.trained(), "flux2", TABLES).verdict(DIFFUSERS, tensors)
    assert ("yes" if rules.takes else rules.text().partition(":")[0]) == expected
    theirs = copy.deepcopy(model)
    if expected == REFUSES:
        with pytest.raises(Exception, match=r"should be empty|not found in the base model"):
            load("flux2", tensors, theirs, [])
        return
    load("flux2", tensors, theirs, [])
    assert distance(tiny.run(theirs), trained if expected == "yes" else tiny.run(model)) < 1e-4


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).requires_grad_(False).eval()


@pytest.mark.parametrize("family", ["flux", "chroma", "sd3"])
def test_text_encoders(family: str) -> None:
    """CLIPs are loaded, T5 is left out."""
    tiny = TINY[family]
    model = tiny.make()
    encoders = {"flux": [tiny_clip(), tiny_t5()], "chroma": [tiny_t5()], "sd3": [tiny_clip(), tiny_clip(1), tiny_t5()]}
    torch.manual_seed(5)
    # linear1 of a tiny width cannot be converted
    arguments = {} if family == "sd3" else {"single_dim": "0", "single_mod_dim": "0"}
    network = tiny.module.create_network(1.0, 4, 2.7, None, encoders[family], model, train_t5xxl="True", **arguments)
    found = compare(family, network, model, encoders[family])
    assert found["peft"].startswith("leaves 7 of")
    assert found["kohya"].startswith(NOTHING if family == "sd3" else "leaves 7 of")
