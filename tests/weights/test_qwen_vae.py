# SPDX-License-Identifier: Apache-2.0
"""The VAE of Qwen-Image: both layouts of its files, pixels and latents, and files that are other VAEs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.key_tables import publish
from library.weights import qwen_vae
from library.weights.loading import build_empty
from library.weights.vae_names import vae_rules
from tests.families.anima import tiny_modules as anima_modules
from tests.tiny import tiny_modules

DATA = Path(__file__).parents[1] / "data_files" / "weights"


@pytest.fixture(scope="module")
def vae() -> Any:
    return anima_modules()[2]


@pytest.mark.parametrize("layout", ["wan", "vae.", "diffusers", "folder"])
def test_layouts(layout: str, vae: Any, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    if layout == "folder":
        path = tmp_path / "vae"
        vae.save_pretrained(path)
    elif layout == "diffusers":
        save_file(vae.state_dict(), path)
    else:
        save_file(publish(vae.state_dict(), qwen_vae.wan_rules(vae), "" if layout == "wan" else layout), path)
    part = qwen_vae.qwen_vae_part(path)
    found = part.load(None, "cpu")
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in found.state_dict().items())
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    names = ("latents_mean", "latents_std", "base_dim", "dim_mult", "temperal_downsample", "z_dim", "num_res_blocks")
    assert all(list(found.config[n]) == list(vae.config[n]) for n in names if isinstance(vae.config[n], (list, tuple)))
    assert all(found.config[n] == vae.config[n] for n in names if isinstance(vae.config[n], int))


def test_the_real_files_keys_in_both_layouts() -> None:
    """The table for Wan's names against diffusers' own converter."""
    from diffusers import AutoencoderKLQwenImage
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with gzip.open(DATA / "anima_qwen_image_vae_input.json.gz") as file:
        keys = {name: tuple(shape) for name, shape in json.load(file).items()}
    real = build_empty(AutoencoderKLQwenImage)
    assert {name: tuple(tensor.shape) for name, tensor in real.state_dict().items()} == keys and len(keys) == 194
    numbered = {name: torch.tensor([float(i)]) for i, name in enumerate(keys)}
    wan = publish(numbered, qwen_vae.wan_rules(real))
    converted = convert_wan_vae_to_diffusers(dict(wan))
    assert converted.keys() == keys.keys() and all(torch.equal(converted[name], numbered[name]) for name in keys)
    in_wan = {rule.published: keys[rule.ours[0]] for rule in qwen_vae.wan_rules(real)}
    for shapes, names in ((keys, qwen_vae.DIFFUSERS), (in_wan, qwen_vae.WAN)):
        assert all(real.config[key] == value for key, value in qwen_vae.layout(shapes, names).items())


@torch.no_grad()
def test_pixels_and_latents_are_those_of_diffusers(vae: Any, tmp_path: Path) -> None:
    """Computed as one frame, in two dimensions."""
    save_file(publish(vae.state_dict(), qwen_vae.wan_rules(vae)), tmp_path / "vae.safetensors")
    own = qwen_vae.qwen_vae_part(tmp_path / "vae.safetensors").load(None, "cpu")
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    raw = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    latents = qwen_vae.encode(own, pixels)
    torch.testing.assert_close(latents, (raw.squeeze(2) - mean) / std, rtol=1e-4, atol=1e-5)
    assert latents.shape == (2, 16, 4, 6) and latents.dtype == torch.float32
    expected = vae.decode(raw).sample.squeeze(2)
    torch.testing.assert_close(qwen_vae.decode(own, latents), expected, rtol=1e-4, atol=1e-4)
    half = qwen_vae.encode(own.to(torch.bfloat16), pixels)
    assert half.dtype == torch.float32 and float((half - latents).abs().mean()) < 0.05


def test_other_vaes_are_refused(tmp_path: Path) -> None:
    kl = tiny_modules()[1]
    kl.save_pretrained(tmp_path / "kl")
    files = {"published": publish(kl.state_dict(), vae_rules(kl)), "own": kl.state_dict(), "none": {"x": torch.ones(1)}}
    for name, tensors in files.items():
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    lines = {"published": "a VAE of another kind", "own": "a VAE of single pictures", "none": "is no VAE"}
    for name, told in (*lines.items(), ("kl", "holds a AutoencoderKL, not an AutoencoderKLQwenImage")):
        path = tmp_path / name if name == "kl" else tmp_path / f"{name}.safetensors"
        with pytest.raises(UserError) as caught:
            qwen_vae.qwen_vae_part(path)
        (line,) = caught.value.problems
        assert line.startswith(f"--vae: {path}") and told in line and "the VAE of Qwen-Image is needed" in line
