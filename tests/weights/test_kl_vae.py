# SPDX-License-Identifier: Apache-2.0
"""Where a VAE's weights may lie, and what is said of files that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.key_tables import publish
from library.weights import kl_vae
from library.weights.vae_names import vae_rules
from tests.tiny import tiny_modules

CONFIG = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def published() -> dict[str, torch.Tensor]:
    _, vae, _ = tiny_modules()
    return publish(vae.state_dict(), vae_rules(vae))


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    tensors, path = published(), tmp_path / "ae.safetensors"
    rest = {"model.diffusion_model.x": torch.zeros(1)} if prefix else {}
    save_file({prefix + name: tensor.clone() for name, tensor in tensors.items()} | rest, path)
    vae = kl_vae.vae_part(path, CONFIG, option="--ae").load(None, "cpu")
    found = publish(vae.state_dict(), vae_rules(vae))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)


@pytest.mark.parametrize("option", ["--ae", "--vae"])
def test_messages_name_the_option(option: str, tmp_path: Path) -> None:
    path, given = tmp_path / "ae.safetensors", {} if option == "--vae" else {"option": option}
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=f"{path} has no VAE inside; {option} needs one that has"):
        kl_vae.vae_part(path, CONFIG, **given)
    save_file({"encoder.0.weight": torch.zeros(1), "decoder.1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=rf"{path} has no VAE inside \(it is a TAESD.*\); {option} needs one that has"):
        kl_vae.vae_part(path, CONFIG, **given)
    tensors = {name: tensor.clone() for name, tensor in published().items() if name != "encoder.conv_out.weight"}
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{option}: {path} is incomplete: it lacks encoder.conv_out.weight"):
        kl_vae.vae_part(path, CONFIG, **given)
