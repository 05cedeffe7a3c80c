# SPDX-License-Identifier: Apache-2.0
"""networks/convert_lora.py: files in, files out, and one line with exit code 2 for what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.adapters.formats.conversion import read_metadata, read_tensors
from library.key_tables import expand, publish
from networks.convert_lora import main
from tests.adapters.known_formats import read_adapter
from tests.adapters.lora_samples import (
    Sample,
    adapter,
    comfy_apply,
    comfy_keys,
    expected_weights,
    flux,
    published_weights,
)

SCRIPT = Path(__file__).resolve().parent.parent.parent / "networks" / "convert_lora.py"
METADATA = {"ss_network_dim": "4", "ss_network_alpha": "2.7", "modelspec.title": "é"}


@pytest.fixture(scope="module")
def sample() -> Sample:
    return flux(double=1, single=1)


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = METADATA) -> Path:
    save_file(tensors, path, metadata)
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert run(*words) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_as_a_script_from_any_folder(sample: Sample, tmp_path: Path) -> None:
    tensors = adapter(sample, alpha=2.7, dtype=torch.float16)
    source, target = written(tmp_path / "a.safetensors", tensors), tmp_path / "new" / "b.safetensors"
    command = [sys.executable, str(SCRIPT), "--src", str(source), "--dst", str(target), "--to", "peft"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "transformer.x_embedder.lora_A.weight" in load_file(target)
    back = tmp_path / "c.safetensors"
    assert run("--src", target, "--dst", back, "--to", "kohya") == 0
    again = load_file(back)
    assert again.keys() == tensors.keys()
    assert all(again[key].dtype == value.dtype and torch.equal(again[key], value) for key, value in tensors.items())
    metadata = read_metadata(back)
    assert metadata.items() >= METADATA.items() and "lora_alphas" not in metadata
    assert metadata["sshs_model_hash"] != read_metadata(target)["sshs_model_hash"]


def test_formats_one_after_the_other(sample: Sample, tmp_path: Path) -> None:
    tensors = adapter(sample, alpha=1.0, split=True)
    path = written(tmp_path / "0.safetensors", tensors)
    for i, to in enumerate(("comfy", "peft", "comfy", "peft", "kohya"), start=1):
        path, source = tmp_path / f"{i}.safetensors", path
        assert run("--src", source, "--dst", path, "--to", to) == 0
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())


def test_save_precision(sample: Sample, tmp_path: Path) -> None:
    """Weights only: alpha would lose its value."""
    tensors = adapter(sample, alpha=2.7)
    source, target = written(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    assert run("--src", source, "--dst", target, "--to", "peft", "--save_precision", "bf16") == 0
    found = read_adapter(target)
    for key, value in tensors.items():
        expected = value if key.endswith("alpha") else value.bfloat16()
        assert found[key].dtype == expected.dtype and torch.equal(found[key], expected), key


@pytest.mark.parametrize("layout", ["published", "prefixed", "diffusers"])
def test_dora_with_the_base_model(layout: str, sample: Sample, tmp_path: Path) -> None:
    tensors = adapter(sample, alpha=2.0, dora=True)
    source, target, base = (tmp_path / f"{name}.safetensors" for name in ("lora", "comfy", "base"))
    written(source, tensors)
    weights = dict(sample.model.state_dict())
    if layout != "diffusers":
        prefix = "model.diffusion_model." if layout == "prefixed" else ""
        weights = publish(weights, expand(sample.names, weights), prefix)
    save_file(weights, base)
    assert run("--src", source, "--dst", target, "--to", "comfy", "--base_model", base) == 0
    found, unused = comfy_apply(load_file(target), published_weights(sample), comfy_keys(sample))
    assert unused == set()
    for path, weight in expected_weights(sample, tensors).items():
        assert torch.allclose(found[path], weight, atol=1e-4, rtol=1e-4), path
    back = tmp_path / "back.safetensors"
    assert run("--src", target, "--dst", back, "--to", "peft", "--base_model", base) == 0
    again = read_adapter(back)
    assert all(torch.allclose(again[key], value, rtol=1e-5) for key, value in tensors.items())


def test_weights_of_fp8_files_have_a_factor(tmp_path: Path) -> None:
    key = "lora_unet_double_blocks_0_img_mlp_0"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(8, 1),
               f"{key}.dora_scale": torch.full((8, 1), 3.0)}  # fmt: skip
    source, target, base = (tmp_path / f"{name}.safetensors" for name in ("lora", "comfy", "base"))
    written(source, tensors)
    path = "double_blocks.0.img_mlp.0"
    stored = torch.full((8, 4), 2.0).to(torch.float8_e4m3fn)
    save_file({f"{path}.weight": stored, f"{path}.scale_weight": torch.tensor(0.5)}, base)
    assert run("--src", source, "--dst", target, "--to", "comfy", "--base_model", base) == 0
    assert torch.equal(load_file(target)[f"diffusion_model.{path}.dora_scale"], torch.full((8, 1), 1.5))  # W 1, V 2


def test_bad_input(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = written(tmp_path / "a.safetensors", adapter(sample, only="img_mlp_0")), tmp_path / "b.safetensors"
    before = source.read_bytes()
    dora = written(tmp_path / "dora.safetensors", adapter(sample, only="img_mlp_0", dora=True))
    loha = written(tmp_path / "loha.safetensors", {"lora_unet_double_blocks_0_img_mlp_0.hada_w1_a": torch.ones(1)})
    other = written(tmp_path / "other.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(1)})
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    folder = tmp_path / "dir.safetensors"
    folder.mkdir()
    to_peft, to_comfy = ("--dst", target, "--to", "peft"), ("--dst", target, "--to", "comfy")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--src", source, "--dst", source, "--to", "peft"), f"error: --dst {source} is --src itself: give another"),
        (
            ("--src", source, "--dst", target, "--to", "pfet"),
            "error: --to 'pfet' is not one of kohya, comfy, peft. Did",
        ),
        (("--src", source, "--dst", "b.pt", "--to", "peft"), "error: --dst b.pt: the file must end with .safetensors"),
        (("--src", source, "--to", "peft"), "error: --dst is needed"),
        (("--src", tmp_path / "no.safetensors", *to_peft), "no such adapter file"),
        (("--src", text, *to_peft), f"error: {text}: not a readable adapter file"),
        (("--src", loha, *to_peft), f"error: {loha}: 1 adapters have no name in the peft format"),
        (("--src", other, *to_peft), f"error: {other}: the adapter is for no architecture that is known"),
        (("--src", dora, *to_comfy), "cannot be written or read without them (--base_model)"),
        (("--src", dora, *to_comfy, "--base_model", source), "the base model has no weight for 1 layers"),
        (("--src", dora, *to_comfy, "--base_model", text), f"--base_model {text}: not a readable .safetensors"),
        (("--src", source, "--dst", folder, "--to", "peft"), "is a folder; give a file"),
    ]
    for words, expected in cases:
        assert expected in refused(capsys, *words)
    assert source.read_bytes() == before and not target.exists()


def test_through_a_link_the_source_is_still_the_source(
    sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, link = written(tmp_path / "a.safetensors", adapter(sample, only="img_mlp_0")), tmp_path / "b.safetensors"
    link.symlink_to(source)
    assert "is --src itself" in refused(capsys, "--src", source, "--dst", link, "--to", "peft")
    assert {*read_tensors(source)} == {*adapter(sample, only="img_mlp_0")}
