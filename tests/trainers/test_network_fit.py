# SPDX-License-Identifier: Apache-2.0
"""Which network module is for which model, and what a run says of a third-party one that does not reach it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from library.errors import UserError
from library.families.adapters import load_network_module, own_modules
from library.families.registry import FAMILIES, misfit
from tests.adapters.families import TINY
from tests.adapters.lora_samples import sana
from tests.adapters.models import tiny_unet
from tests.trainers.helpers import train

TINY_OF = {name: (name,) for name in ("flux", "flux2", "chroma", "lumina", "anima", "sana", "hunyuan_image")}
TINY_OF["sd3"] = ("sd3", "sd35")
MAKERS: dict[str, Callable[[], nn.Module]] = {name: tiny.make for name, tiny in TINY.items()}
MAKERS |= {"unet": tiny_unet, "sana": lambda: sana().model}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_fits_or_is_refused_with_the_one_that_fits(family: str) -> None:
    """What the registry says fits makes adapters in the blocks of the family's models; the others are refused."""
    fitting = FAMILIES[family].networks.values()
    for name in own_modules():
        line = misfit(family, name)
        assert (line is None) == (name in fitting)
        if line is not None:
            kind = next(k for e in FAMILIES.values() for k, module in e.networks.items() if module == name)
            assert f"--network_module {name} is for" in line and FAMILIES[family].title in line
            assert FAMILIES[family].networks.get(kind, FAMILIES[family].networks["lora"]) in line
    for model in TINY_OF.get(family, ("unet",)):
        denoiser = MAKERS[model]()
        for name in fitting:
            network = load_network_module(name).create_network(1.0, 2, 0.5, None, None, denoiser)
            assert len(network.module_parameters()) >= 4, (model, name)
    files = (Path(__file__).parents[2] / "networks").glob("*.py")
    assert {*own_modules()} == {f"networks.{f.stem}" for f in files if "\ncreate_network = " in f.read_text("utf-8")}
    assert misfit(family, "lycoris.kohya") is None


def test_unknown_models_are_never_left_without_adapters() -> None:
    """Also below the registry: no module gives an unknown denoiser or text encoder nothing."""
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    encoder = BertModel(BertConfig(**size, vocab_size=8))
    others = {sheet.default_network for sheet in FAMILIES.values()} - {"networks.lora", "networks.lora_flux"}
    for name in own_modules():
        if name == "networks.control_net_lllite" or "oft" in name:
            continue
        create = load_network_module(name).create_network
        flux_model, unet = TINY["flux"].make(), tiny_unet()
        right, wrong = (flux_model, unet) if "flux" in name else (unet, TINY["sd3"].make())
        if name in ("networks.lora", "networks.lora_flux"):
            with pytest.raises(UserError, match=r"no layers that adapters are known for|this model is a"):
                create(1.0, 2, 1.0, None, None, wrong)
        if name not in others:
            with pytest.raises(UserError, match="kind BertModel has no layers that adapters are known for"):
                create(1.0, 2, 1.0, None, [encoder], right)


OWN = {"network_module": "tests.adapters.reaches_nothing"}
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({**OWN}, ["reaches_nothing adapts 0 of 83 layers of the denoiser, in 0 of its", "nothing of it would learn"]),
    ({**OWN, "network_args": ["on=time_embedding"]}, ["adapts 2 of 83 layers of the denoiser, in 0 of its"]),
    ({"network_module": "networks.lora_flux", "network_args": ["x=1"]}, ["1.x and 2.x give networks.lora"]),
    ({"network_dim": 90000}, ["--network_dim 90000: no layer of the denoiser is wider than"]),
    ({"network_args": ["conv_dim=4", "conv_dim=8"]}, ["conv_dim is given twice: conv_dim=4 and conv_dim=8"]),
]  # fmt: skip
FAILURES = [
    ("create_network", "refuses these --network_args", "AssertionError"),
    ("create_network", "refuses these --network_args", "SystemExit"),
    ("apply_to", "failed", "RecursionError"),
    ("prepare_optimizer_params", "makes no groups", "OSError"),
    ("forward", "failed", "AssertionError"),
    ("save_weights", "writes no file", "AttributeError"),
]


@pytest.mark.parametrize(("values", "expected"), REFUSED)
def test_refused(sd1: Path, dataset: Path, tmp_path: Path, values: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        train(sd1, dataset, tmp_path, max_train_steps=1, **values)
    text = "\n".join(error.value.problems)
    assert all(part in text for part in expected), text
    assert len(error.value.problems) == 1 and not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize(("where", "what", "raises"), FAILURES)
def test_errors_of_third_party_modules(
    sd1: Path, dataset: Path, tmp_path: Path, where: str, what: str, raises: str
) -> None:
    """Of every class, wherever they are raised: one line that names the module."""
    with pytest.raises(UserError) as error:
        arguments = ["on=down_blocks", f"raises={raises}", f"where={where}"]
        train(sd1, dataset, tmp_path, max_train_steps=1, network_args=arguments, **OWN)
    line = f"--network_module tests.adapters.reaches_nothing {what}"
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(line), error.value.problems
    assert error.value.problems[0].endswith(f"{raises}: two lines")
