# SPDX-License-Identifier: Apache-2.0
"""resize_lora.py, the extract scripts, check_lora_weights.py, and their arithmetic against literal formulas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.adapters.surgery.lora_math import Change, choose_rank, clamped, spectrum_of_change
from networks import (
    check_lora_weights,
    extract_lora_from_dylora,
    extract_lora_from_models,
    flux_extract_lora,
    resize_lora,
)
from tests.adapters.lora_tool_models import MODELS, Model
from tests.adapters.models import distance

EXACT = ("--clamp_quantile", "1")


@functools.lru_cache
def model(name: str) -> Model:
    return MODELS[name]()


def run(main: Callable[[Sequence[str]], int], *words: object) -> None:
    assert main([str(word) for word in words]) == 0


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int], *words: object) -> str:
    """The one line of a refusal."""
    assert main([str(word) for word in words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def layers(path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> (up, down as matrices, alpha)."""
    tensors = load_file(path)
    names = [key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")]
    return {
        name: (
            tensors[f"{name}.lora_up.weight"].float().flatten(1),
            tensors[f"{name}.lora_down.weight"].float().flatten(1),
            float(tensors[f"{name}.alpha"]),
        )
        for name in names
    }


def changes(path: Path) -> dict[str, Tensor]:
    """Layer -> alpha / rank * up * down."""
    return {name: alpha / len(down) * (up @ down) for name, (up, down, alpha) in layers(path).items()}


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def test_singular_values_of_thin_matrices() -> None:
    draw = torch.Generator().manual_seed(0)
    change = Change(torch.randn(40, 5, generator=draw), torch.randn(5, 27, generator=draw), (40, 3, 3, 3))
    found = spectrum_of_change(change)
    assert torch.allclose(found.s, torch.linalg.svdvals(change.up @ change.down)[:5], rtol=1e-5)
    up, down = found.cut(5)
    assert distance((up @ down).reshape(change.shape), change.weight()) < 1e-6


S = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("method", "target", "rank"),
    [
        ("sv_ratio", 2.0, 1),  # above 8 / 2: not 4 itself
        ("sv_ratio", 5.0, 3),  # above 1.6
        ("sv_ratio", 100.0, 4),  # all five, but four is the limit
        ("sv_cumulative", 0.5, 1),  # 8 / 15.5 = 0.516
        ("sv_cumulative", 0.78, 3),  # 12 / 15.5 = 0.774, 14 / 15.5 = 0.903
        ("sv_fro", 0.86, 1),  # 8 / sqrt(85.25) = 0.866
        ("sv_fro", 0.98, 3),  # sqrt(80 / 85.25) = 0.9687, sqrt(84 / 85.25) = 0.9926
        ("sv_fro", 1.0, 4),
        (None, 0.0, 4),
    ],
)
def test_how_many_values_are_kept(method: str | None, target: float, rank: int) -> None:
    assert choose_rank(S, 4, method, target) == rank
    assert choose_rank(torch.zeros(5), 4, method, target) == 1


@pytest.mark.parametrize("quantile", [0.99, 0.5, 0.9, 1.0])
def test_quantile(quantile: float) -> None:
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(30, 4, generator=draw), torch.randn(4, 50, generator=draw)
    limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile).abs() if quantile < 1 else math.inf
    for found, value in zip(clamped(up, down, quantile), (up, down), strict=True):
        torch.testing.assert_close(found, value.clamp(-limit, limit))


# ---- resize -------------------------------------------------------------------------------------------------------


def literal_rank(s: Tensor, method: str, target: float) -> int:
    """The methods, value by value."""
    values = s.double().tolist()
    if method == "sv_ratio":
        return sum(value > values[0] / target for value in values)
    power = 1 if method == "sv_cumulative" else 2
    total = sum(value**power for value in values)
    for rank in range(1, len(values) + 1):
        if sum(value**power for value in values[:rank]) / total >= target**power:
            return rank
    return len(values)


@pytest.mark.parametrize(("method", "target"), [("sv_ratio", 1.4), ("sv_cumulative", 0.6), ("sv_fro", 0.8)])
def test_dynamic_ranks(method: str, target: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rank that the formula says, the best approximation of that rank, alpha / rank as before."""
    path, small = model("sd3").adapter(tmp_path / "a.safetensors", dim=8), tmp_path / "small.safetensors"
    run(resize_lora.main, "--model", path, "--save_to", small, "--new_rank", 6, "--dynamic_method", method,
        "--dynamic_param", target, "--verbose")  # fmt: skip
    before, found = layers(path), layers(small)
    assert found.keys() == before.keys()
    for name, (up, down, alpha) in before.items():
        s = torch.linalg.svdvals((up @ down).double())[:8]
        rank = min(literal_rank(s, method, target), 6)
        assert len(found[name][1]) == rank and found[name][2] == pytest.approx(alpha / 8 * rank)
    whole, cut = changes(path), changes(small)
    for name, change in cut.items():
        tail = torch.linalg.svdvals(whole[name].double())[len(found[name][1]) :].norm()
        assert abs(float((change - whole[name]).norm() - tail)) < 1e-4 * float(whole[name].norm())
    entries = header(small)
    assert entries["ss_network_dim"] == entries["ss_network_alpha"] == "Dynamic"
    assert entries["ss_training_comment"].startswith(f"dynamic resize with {method}: {target}, from 8; ")
    assert entries["modelspec.title"] == "a" and entries["sshs_model_hash"] != header(path)["sshs_model_hash"]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(before) + 1 and table[0].split()[0] in before and "mean norm kept" in table[-1]


def test_fixed_ranks_and_convolutions(tmp_path: Path) -> None:
    """Own ranks for 3x3 convolutions, Tucker form and all; norms stay; a rank that suffices changes nothing."""
    path = model("sd1").adapter(tmp_path / "a.safetensors", dim=4, conv_dim="3", use_tucker="True", train_norm="True")
    small, same = tmp_path / "small.safetensors", tmp_path / "same.safetensors"
    run(resize_lora.main, "--model", path, "--save_to", small, "--new_rank", 2, "--new_conv_rank", 1)
    before, found = load_file(path), load_file(small)
    for key, value in found.items():
        if key.endswith("lora_down.weight"):
            assert len(value) == (1 if value.dim() == 4 and value.shape[2:] != (1, 1) else 2)
        elif key.endswith(("w_norm", "b_norm")):
            assert torch.equal(value, before[key])
    assert not any("lora_mid" in key for key in found) and any("lora_mid" in key for key in before)
    assert any(key.endswith("w_norm") for key in found)
    assert header(small)["ss_network_dim"] == "2"
    run(resize_lora.main, "--model", path, "--save_to", same, "--new_rank", 64)
    whole = changes(same)
    for name, (up, _, alpha) in layers(path).items():
        down = before[f"{name}.lora_down.weight"]
        if f"{name}.lora_mid.weight" in before:
            down = torch.einsum("rskl,si->rikl", before[f"{name}.lora_mid.weight"], down.flatten(1))
        assert distance(whole[name], alpha / len(down) * (up @ down.flatten(1))) < 1e-5


def test_resize_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model("flux").adapter(tmp_path / "a.safetensors", dora_wd="True")
    target, before = tmp_path / "out.safetensors", path.read_bytes()
    words = ("--model", path, "--save_to", target)
    assert "input of this very run" in refused(capsys, resize_lora.main, "--model", path, "--save_to", path)
    assert "needs --dynamic_param" in refused(capsys, resize_lora.main, *words, "--dynamic_method", "sv_fro")
    assert "needs --dynamic_method" in refused(capsys, resize_lora.main, *words, "--dynamic_param", 0.5)
    too_much = ("--dynamic_method", "sv_fro", "--dynamic_param", 2)
    assert "must be at most 1" in refused(capsys, resize_lora.main, *words, *too_much)
    too_little = ("--dynamic_method", "sv_ratio", "--dynamic_param", 0.5)
    assert "must be at least 1" in refused(capsys, resize_lora.main, *words, *too_little)
    assert "Did you mean 'sv_ratio'?" in refused(capsys, resize_lora.main, *words, "--dynamic_method", "sv_rati")
    assert "--device nowhere" in refused(capsys, resize_lora.main, *words, "--device", "nowhere")
    assert resize_lora.main([str(word) for word in words]) == 2
    assert "a DoRA scales the model's weights" in capsys.readouterr().err
    assert path.read_bytes() == before and not target.exists()


# ---- from two models ----------------------------------------------------------------------------------------------


def tuned(own: Model, path: Path, *, seed: int = 1, rank: int | None = None) -> Path:
    """A file of the same model with other weights: everywhere, or matrices by a change of a rank."""
    draw, tensors = torch.Generator().manual_seed(seed), own.tensors()
    for name, value in tensors.items():
        if name.startswith("first_stage") or value.dim() < 2:
            continue
        noise = torch.randn(value.shape, generator=draw).flatten(1) * 0.02
        if rank is not None:
            noise = noise[:, :rank] @ torch.randn(rank, noise.shape[1], generator=draw)
        tensors[name] = value + noise.reshape(value.shape)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_extracting_keeps_all_but_the_smallest_values(name: str, tmp_path: Path) -> None:
    """Layers as a new network has them; each misses the difference by its singular values beyond the rank."""
    own = model(name)
    original, other = own.write(tmp_path / "a.safetensors"), tuned(own, tmp_path / "b.safetensors")
    target, example = tmp_path / "lora.safetensors", own.adapter(tmp_path / "example.safetensors")
    words = ("--model_org", original, "--model_tuned", other, "--save_to", target, "--dim", 4)
    run(extract_lora_from_models.main, *words, *EXACT, "--min_diff", 0)
    found, expected = load_file(target), load_file(example)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert all(float(value) == 4 for key, value in found.items() if key.endswith("alpha"))
    network, _ = own.network.create_network_from_weights(1.0, target, None, own.modules[1:] or None, own.modules[0])
    theirs = {
        id(ours): tuned_module.weight.detach()
        for before, after in zip(own.modules, own.read(other), strict=True)
        for ours, tuned_module in zip(before.modules(), after.modules(), strict=True)
        if isinstance(ours, (torch.nn.Linear, torch.nn.Conv2d))
    }
    for layer in network.layers.values():
        modules = layer.target.modules
        differences = [(theirs[id(m.module)] - m.module.weight)[m.rows or slice(None)] for m in modules]
        difference = torch.cat(differences).flatten(1)
        change = torch.cat([layer.scale * layer.delta_weight(i) for i in range(len(modules))]).flatten(1).detach()
        tail = torch.linalg.svdvals(difference.double())[4:].norm()
        assert abs(float((change - difference).norm() - tail)) < 1e-4 * float(difference.norm())
    assert len(network.layers) == len(found) // 3
    entries = header(target)
    assert entries["ss_network_module"] == own.network.__name__ and entries["ss_network_dim"] == "4"
    assert entries["modelspec.architecture"].endswith("/lora") and entries["modelspec.title"] == "lora"


def test_extracting_what_was_merged(tmp_path: Path) -> None:
    """A model with a LoRA of rank 3, convolutions too, gives that LoRA back; an unchanged text encoder gives none."""
    from networks import merge_lora

    own = model("sd1")
    original = own.write(tmp_path / "a.safetensors")
    lora = own.adapter(tmp_path / "lora.safetensors", dim=3, conv_dim="2")
    denoiser_only = {k: v for k, v in load_file(lora).items() if k.startswith("lora_unet")}
    save_file(denoiser_only, lora)
    merged, target = tmp_path / "b.safetensors", tmp_path / "out.safetensors"
    run(merge_lora.main, "--sd_model", original, "--models", lora, "--ratios", 1, "--save_to", merged)
    run(extract_lora_from_models.main, "--model_org", original, "--model_tuned", merged, "--save_to", target,
        "--dim", 3, "--conv_dim", 2, *EXACT)  # fmt: skip
    found, wanted = changes(target), changes(lora)
    assert found.keys() == wanted.keys()
    assert max(distance(found[name], wanted[name]) for name in wanted) < 1e-4
    run(extract_lora_from_models.main, "--model_org", original, "--model_tuned", merged, "--save_to", target,
        "--dim", 3, "--save_precision", "fp16", "--load_precision", "bf16", "--no_metadata")  # fmt: skip
    assert {value.dtype for value in load_file(target).values()} == {torch.float16}
    assert len(changes(target)) < len(wanted) and not any(key.startswith("modelspec") for key in header(target))


def test_flux_script(tmp_path: Path) -> None:
    """The same as the general one; the default quantile limits the largest numbers."""
    own = model("chroma")
    original, other = own.write(tmp_path / "a.safetensors"), tuned(own, tmp_path / "b.safetensors", rank=2)
    words = ("--model_org", original, "--model_tuned", other, "--dim", 2)
    run(flux_extract_lora.main, *words, "--save_to", tmp_path / "1.safetensors", "--mem_eff_safe_open", *EXACT)
    run(extract_lora_from_models.main, *words, "--save_to", tmp_path / "2.safetensors", *EXACT)
    run(flux_extract_lora.main, *words, "--save_to", tmp_path / "3.safetensors")
    first, second, limited = (load_file(tmp_path / f"{i}.safetensors") for i in (1, 2, 3))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    name = next(key for key in first if key.endswith("lora_up.weight"))
    down = name.replace("lora_up", "lora_down")
    limit = torch.quantile(torch.cat([first[name].flatten(), first[down].flatten()]), 0.99)
    torch.testing.assert_close(limited[name], first[name].clamp(-limit, limit))
    assert header(tmp_path / "1.safetensors")["ss_base_model_version"] == "chroma"


def test_extracting_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux, sd1 = model("flux").write(tmp_path / "flux.safetensors"), model("sd1").write(tmp_path / "sd1.safetensors")
    lora, target = model("flux").adapter(tmp_path / "lora.safetensors"), tmp_path / "out.safetensors"
    main, to = extract_lora_from_models.main, ("--save_to", target)
    assert "must be of one architecture" in refused(capsys, main, "--model_org", flux, "--model_tuned", sd1, *to)
    assert "Stable Diffusion 2.x was asked for" in refused(
        capsys, main, "--model_org", sd1, "--model_tuned", sd1, "--v2", *to
    )
    assert "is a LoRA" in refused(capsys, main, "--model_org", lora, "--model_tuned", flux, *to)
    assert "input of this very run" in refused(
        capsys, main, "--model_org", flux, "--model_tuned", sd1, "--save_to", sd1
    )
    assert "this" not in refused(capsys, main, "--model_org", flux, "--model_tuned", tmp_path / "no.safetensors", *to)
    assert "FLUX.1 or Chroma was asked for" in refused(
        capsys, flux_extract_lora.main, "--model_org", sd1, "--model_tuned", sd1, *to
    )
    other = model("flux").tensors()
    name = "double_blocks.0.img_mlp.0.weight"
    hole = tmp_path / "hole.safetensors"
    save_file({key: value for key, value in other.items() if key != name}, hole)
    for option, files in (("--model_org", (hole, flux)), ("--model_tuned", (flux, hole))):
        line = refused(capsys, main, "--model_org", files[0], "--model_tuned", files[1], *to)
        assert f"{option} {hole} lacks lora_unet_double_blocks_0_img_mlp_0 (1 layers)" in line
    save_file({**other, name: other[name][:-1].clone()}, tmp_path / "wide.safetensors")
    assert "has another shape of lora_unet_double_blocks_0_img_mlp_0" in refused(
        capsys, main, "--model_org", flux, "--model_tuned", tmp_path / "wide.safetensors", *to
    )
    assert not target.exists()


# ---- DyLoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [2, 3])
def test_dylora(unit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every multiple of the unit below the rank: the first ranks of each matrix, and alpha as it was."""
    from networks import dylora

    path = model("sd1").adapter(tmp_path / "a.safetensors", dylora, dim=6, unit="1", conv_dim="6")
    run(
        extract_lora_from_dylora.main,
        "--model",
        path,
        "--unit",
        unit,
        "--save_to",
        tmp_path / "new" / "out.safetensors",
    )
    whole, ranks = load_file(path), range(unit, 6, unit)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"out-{rank:04d}.safetensors" for rank in ranks]
    for rank in ranks:
        file = tmp_path / "new" / f"out-{rank:04d}.safetensors"
        found = load_file(file)
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            cut = value[:rank] if "lora_down" in key else value[:, :rank] if "lora_up" in key else value
            assert torch.equal(found[key], cut)
        entries = header(file)
        assert entries["ss_network_dim"] == str(rank) and entries["sshs_model_hash"] != header(path)["sshs_model_hash"]
    words = ("--model", path, "--save_to", tmp_path / "out.safetensors", "--unit")
    assert "has rank 6; give a smaller unit" in refused(capsys, extract_lora_from_dylora.main, *words, 6)
    assert "must be at least 1" in refused(capsys, extract_lora_from_dylora.main, *words, 0)
    assert "--unit is needed" in refused(capsys, extract_lora_from_dylora.main, *words[:-1])


# ---- check --------------------------------------------------------------------------------------------------------


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "lora_unet_x.lora_down.weight": torch.tensor([[1.0, -3.0]]),
        "lora_unet_x.alpha": torch.tensor(1.0).half(),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert check_lora_weights.main([str(path)]) == 0
    title, alpha, down = capsys.readouterr().out.splitlines()
    assert "2 tensors, 3 numbers" in title and alpha.startswith("lora_unet_x.alpha") and "float16" in alpha
    assert "(1, 2)" in down and "mean |x| 2, min -3, max 1" in down
    save_file({**tensors, "lora_unet_x.lora_up.weight": torch.tensor([[math.nan], [1.0]])}, path)
    assert check_lora_weights.main(["--file", str(path)]) == 1
    assert capsys.readouterr().err == "not finite: lora_unet_x.lora_up.weight\n"
    assert "does not exist" in refused(capsys, check_lora_weights.main, tmp_path / "no.safetensors")
    assert "--file is needed" in refused(capsys, check_lora_weights.main)
