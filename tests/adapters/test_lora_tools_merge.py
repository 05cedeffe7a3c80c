# SPDX-License-Identifier: Apache-2.0
"""merge_lora.py and its sisters: merging is applying, files keep what is not ours, several LoRAs become one."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.adapters.surgery.block_ratios import place_of, strengths
from library.adapters.surgery.checkpoint_layers import CheckpointLayers
from library.adapters.surgery.lora_math import as_tensors
from networks import (
    convert_lora,
    dylora,
    flux_merge_lora,
    loha,
    lokr,
    lora_fa,
    merge_lora,
    oft,
    oft_flux,
    sdxl_merge_lora,
    svd_merge_lora,
)
from tests.adapters.known_formats import BY_NAME
from tests.adapters.lora_tool_models import MODELS, Model
from tests.adapters.models import distance

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "networks"


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


def merged(file: Path, adapters: Sequence[tuple[Path, float]], target: Path, *words: object) -> Path:
    paths, ratios = [path for path, _ in adapters], [ratio for _, ratio in adapters]
    run(merge_lora.main, "--sd_model", file, "--models", *paths, "--ratios", *ratios, "--save_to", target, *words)
    return target


# ---- into a model -------------------------------------------------------------------------------------------------

CONV = {"conv_dim": "2"}
KINDS: list[tuple[str, ModuleType | None, dict[str, str]]] = [
    *((name, None, {}) for name in MODELS),
    ("sd1", None, {**CONV, "train_norm": "True"}),
    ("sd1", None, {**CONV, "use_tucker": "True", "dora_wd": "True"}),
    ("sd1", lora_fa, {}),
    ("sd1", dylora, {"unit": "2"}),
    ("sd1", loha, {**CONV, "use_tucker": "True"}),
    ("sd1", lokr, CONV),
    ("sd1", oft, {}),
    ("flux", None, {"split_qkv": "True"}),
    ("flux", None, {"dora_wd": "True"}),
    ("flux", loha, {}),
    ("flux", lokr, {}),
    ("flux", oft_flux, {}),
    ("sd3", loha, {}),
    ("lumina", lokr, {}),
]


@pytest.mark.parametrize(("name", "module", "arguments"), KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_merging_is_applying(name: str, module: ModuleType | None, arguments: dict[str, str], tmp_path: Path) -> None:
    own = model(name)
    file, adapter = (
        own.write(tmp_path / "model.safetensors"),
        own.adapter(tmp_path / "a.safetensors", module, **arguments),
    )
    expected = own.applied(adapter, 0.7, module)
    target = merged(file, [(adapter, 0.7)], tmp_path / "out.safetensors")
    for found, wanted in zip(own.outputs(own.read(target)), expected, strict=True):
        assert distance(found, wanted) < 1e-5
    assert distance(own.outputs()[0], expected[0]) > 3e-3


def test_two_adapters_of_different_kinds(tmp_path: Path) -> None:
    """Their changes add up; a negative ratio takes one back."""
    own = model("flux")
    file = own.write(tmp_path / "model.safetensors")
    first, second = own.adapter(tmp_path / "a.safetensors"), own.adapter(tmp_path / "b.safetensors", loha, seed=5)
    both = load_file(merged(file, [(first, 0.5), (second, -0.3)], tmp_path / "both.safetensors"))
    one, other = (
        load_file(merged(file, [pair], tmp_path / "one.safetensors")) for pair in ((first, 0.5), (second, -0.3))
    )
    for name, weight in load_file(file).items():
        torch.testing.assert_close(both[name], one[name] + other[name] - weight, atol=1e-6, rtol=1e-5)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Unknown keys, the VAE and every weight without an adapter, bit by bit; a part of the U-Net in half precision."""
    own = model("sd2")
    file = own.write(tmp_path / "model.safetensors", torch.float16, {"format": "pt", "modelspec.title": "base"})
    adapter = own.adapter(tmp_path / "a.safetensors")
    target = merged(file, [(adapter, 1.0)], tmp_path / "out.safetensors")
    before, after = load_file(file), load_file(target)
    assert before.keys() == after.keys()
    assert {name: (v.dtype, v.shape) for name, v in before.items()} == {n: (v.dtype, v.shape) for n, v in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {key.split(".")[0] for key in load_file(adapter)}
    # two of three rows of the in-projection's blocks count as one tensor
    fused = sum(name.endswith(("_q_proj", "_k_proj")) for name in layers if name.startswith("lora_te"))
    assert len(changed) == len(layers) - fused
    assert all(name.endswith(("weight", "in_proj_weight")) for name in changed)
    assert not any(name.startswith(("first_stage_model", "alphas", "model_ema")) for name in changed)
    entries = header(target)
    assert entries["format"] == "pt" and entries["modelspec.merged_from"] == "base, a"
    assert entries["modelspec.title"] == "out" and entries["modelspec.architecture"] == "stable-diffusion-v2-512"


def test_precision_of_the_result(tmp_path: Path) -> None:
    """float32 arithmetic, rounded once; a .ckpt holds the same."""
    own = model("flux")
    file, adapter = own.write(tmp_path / "model.safetensors"), own.adapter(tmp_path / "a.safetensors")
    exact = load_file(merged(file, [(adapter, 1.0)], tmp_path / "exact.safetensors"))
    half = load_file(merged(file, [(adapter, 1.0)], tmp_path / "half.safetensors", "--save_precision", "bf16"))
    assert all(torch.equal(half[name], value.to(torch.bfloat16)) for name, value in exact.items())
    pickled = torch.load(merged(file, [(adapter, 1.0)], tmp_path / "out.ckpt"), weights_only=True)
    assert pickled.keys() == exact.keys() and all(torch.equal(pickled[name], exact[name]) for name in exact)


def test_formats_of_the_adapter(tmp_path: Path) -> None:
    own = model("lumina")
    file, adapter = own.write(tmp_path / "model.safetensors"), own.adapter(tmp_path / "a.safetensors")
    expected = load_file(merged(file, [(adapter, 1.0)], tmp_path / "0.safetensors"))
    for to in ("comfy", "peft"):
        run(convert_lora.main, "--src", adapter, "--dst", tmp_path / f"{to}.safetensors", "--to", to)
        found = load_file(merged(file, [(tmp_path / f"{to}.safetensors", 1.0)], tmp_path / "1.safetensors"))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_flux_with_encoders_in_their_own_files(tmp_path: Path) -> None:
    """CLIP-L beside the denoiser; adapters of T5, which is not given, are left with a warning."""
    from tests.tiny import tiny_modules

    own, clip = model("flux"), tiny_modules()[2]
    weights = {f"text_model.{n.removeprefix('text_model.')}": v for n, v in clip.state_dict().items()}
    save_file(weights, tmp_path / "clip.safetensors")
    draw = torch.Generator().manual_seed(0)
    layers = {
        "lora_unet_double_blocks_0_img_mod_lin": (192, 32),
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": (64, 32),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (8, 8),
    }
    tensors = {
        f"{name}.{suffix}": value
        for name, (rows, columns) in layers.items()
        for suffix, value in as_tensors(
            torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw), (rows, columns), 1.0
        ).items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    run(
        flux_merge_lora.main, "--flux_model", own.write(tmp_path / "flux.safetensors"),
        "--clip_l", tmp_path / "clip.safetensors", "--clip_l_save_to", tmp_path / "clip_out.safetensors",
        "--models", tmp_path / "a.safetensors", "--ratios", 0.5, "--save_to", tmp_path / "out.safetensors",
    )  # fmt: skip
    for name, path, source, target in (
        ("lora_unet_double_blocks_0_img_mod_lin", "double_blocks.0.img_mod.lin", "flux", "out"),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc1", "text_model.encoder.layers.1.mlp.fc1", "clip", "clip_out"),
    ):
        before, after = (load_file(tmp_path / f"{f}.safetensors") for f in (source, target))
        change = 0.5 * (1 / 2) * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        torch.testing.assert_close(after[f"{path}.weight"], before[f"{path}.weight"] + change)
        assert [n for n in before if not torch.equal(before[n], after[n])] == [f"{path}.weight"]


def test_where_text_encoders_lie() -> None:
    """All-in-one files of ComfyUI, old files without a level, and the block of SD 2.x that no picture depends on."""

    def weights(architecture: str, *names: str, encoder: str | None = None) -> dict[str, tuple[str, slice | None]]:
        layers = CheckpointLayers(BY_NAME[architecture], {f"{n}_weight" if n.endswith("in_proj") else f"{n}.weight":
                                  (6, 2) for n in names}, encoder=encoder)  # fmt: skip
        return {name: (place.weight, place.rows) for name, place in layers.places.items()}

    clip = "text_model.encoder.layers.0.mlp.fc1"
    name = "text_model_encoder_layers_0_mlp_fc1"
    for architecture, prefix, found in (
        ("sd3", "text_encoders.clip_l.transformer.", f"lora_te1_{name}"),
        ("sd3", "text_encoders.clip_g.transformer.", f"lora_te2_{name}"),
        ("flux", "text_encoders.clip_l.transformer.", f"lora_te1_{name}"),
        ("sdxl", "conditioner.embedders.0.transformer.", f"lora_te1_{name}"),
        ("sd1", "cond_stage_model.transformer.", f"lora_te_{name}"),
    ):
        assert weights(architecture, prefix + clip) == {found: (f"{prefix}{clip}.weight", None)}
    short = "cond_stage_model.transformer.encoder.layers.0.mlp.fc1"
    assert weights("sd1", short) == {f"lora_te_{name}": (f"{short}.weight", None)}
    t5 = "encoder.block.1.layer.0.SelfAttention.q"
    assert [*weights("flux", t5, encoder="t5xxl")] == ["lora_te3_encoder_block_1_layer_0_SelfAttention_q"]
    assert weights("flux", t5, encoder="clip_l") == {}
    start = "cond_stage_model.model.transformer.resblocks"
    blocks = [f"{start}.{i}.{n}" for i in range(3) for n in ("ln_1", "attn.in_proj")]
    found = weights("sd2", *blocks)
    assert len(found) == 2 * 4
    assert found["lora_te_text_model_encoder_layers_1_self_attn_v_proj"] == (
        f"{start}.1.attn.in_proj_weight",
        slice(4, 6),
    )


def test_scaled_8_bit_weights(tmp_path: Path) -> None:
    """Scales are multiplied in; matrices become bfloat16, norms and biases keep their precision."""
    own = model("flux")
    adapter, scaled = own.adapter(tmp_path / "a.safetensors"), dict(own.tensors())
    wanted = dict(scaled)
    for name, value in own.tensors().items():
        if value.dim() == 2:
            scaled[name] = (value / 0.01).to(torch.float8_e4m3fn)
            scaled[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(0.01)
            wanted[name] = scaled[name].float() * 0.01
    scaled["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(scaled, tmp_path / "model.safetensors")
    save_file(wanted, tmp_path / "plain.safetensors")
    found = load_file(merged(tmp_path / "model.safetensors", [(adapter, 1.0)], tmp_path / "out.safetensors"))
    plain = load_file(merged(tmp_path / "plain.safetensors", [(adapter, 1.0)], tmp_path / "exact.safetensors"))
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        dtype = torch.bfloat16 if value.dim() > 1 else torch.float32
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], value.to(dtype))


def test_block_ratios(tmp_path: Path) -> None:
    """--lbws: text encoder and two blocks; the numbers are those that the published U-Net counts by."""
    own = model("sd1")
    file, adapter = own.write(tmp_path / "model.safetensors"), own.adapter(tmp_path / "a.safetensors")
    numbers = [0.0] * 17
    numbers[1], numbers[7] = 0.5, 2.0  # IN01 and MID of BASE, IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03 ... OUT11
    target = merged(file, [(adapter, 1.0)], tmp_path / "out.safetensors", "--lbws", numbers)
    whole = merged(file, [(adapter, 1.0)], tmp_path / "whole.safetensors")
    before, after, full = load_file(file), load_file(target), load_file(whole)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    start = "model.diffusion_model."
    assert {name.split(".transformer")[0] for name in changed if "transformer" in name} == {
        f"{start}input_blocks.1.1", f"{start}middle_block.1",
    }  # fmt: skip
    for name in changed:
        factor = 2.0 if "middle_block" in name else 0.5
        torch.testing.assert_close(
            after[name] - before[name], factor * (full[name] - before[name]), atol=1e-6, rtol=1e-4
        )


def test_places_of_blocks() -> None:
    names = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": 0,
        "lora_unet_down_blocks_0_attentions_1_proj_in": 3,
        "lora_unet_down_blocks_2_downsamplers_0_conv": 10,
        "lora_unet_mid_block_attentions_0_proj_in": 13,
        "lora_unet_up_blocks_3_attentions_2_proj_in": 25,
        "lora_unet_input_blocks_8_1_proj_in": 9,
        "lora_unet_middle_block_1_proj_in": 13,
        "lora_unet_output_blocks_0_1_proj_in": 14,
        "lora_unet_conv_in": None,
    }
    assert {name: place_of(name) for name in names} == names
    assert strengths(0.5, [0.0, *[1.0] * 10, 3.0])("lora_unet_output_blocks_5_1_proj_in") == 1.5


# ---- several into one ---------------------------------------------------------------------------------------------


def changes(path: Path) -> dict[str, Tensor]:
    """Layer -> alpha / rank * up * down, literally."""
    tensors = load_file(path)
    found = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up = tensors[key].float(), tensors[f"{name}.lora_up.weight"].float()
            scale = float(tensors[f"{name}.alpha"]) / len(down)
            found[name] = scale * (up.flatten(1) @ down.flatten(1))
    return found


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_concat_is_the_exact_sum(name: str, tmp_path: Path) -> None:
    own = model(name)
    first = own.adapter(tmp_path / "a.safetensors", dim=4)
    second = own.adapter(tmp_path / "b.safetensors", dim=2, seed=5)
    target = tmp_path / "out.safetensors"
    words = ("--models", first, second, "--ratios", 0.7, -0.5, "--save_to", target, "--concat")
    for more in ((), ("--shuffle",)):
        run(merge_lora.main, *words, *more)
        one, other, found = changes(first), changes(second), changes(target)
        assert found.keys() == one.keys()
        for layer, change in found.items():
            torch.testing.assert_close(change, 0.7 * one[layer] - 0.5 * other[layer], atol=1e-6, rtol=1e-4)
    assert {len(v) for k, v in load_file(target).items() if "lora_down" in k} == {6}
    entries = header(target)
    assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == ("6", "6.0")
    assert entries["modelspec.merged_from"] == "a, b" and entries["modelspec.title"] == "out"
    assert {"sshs_model_hash", "sshs_legacy_hash", "ss_base_model_version"} <= entries.keys()


def test_sum_of_matrices_of_one_rank(tmp_path: Path) -> None:
    """sd-scripts' formula: each matrix is summed with ratio * sqrt(alpha / first alpha), up without the sign."""
    draw = torch.Generator().manual_seed(0)
    name, parts = "lora_unet_double_blocks_0_img_mod_lin", []
    for i, alpha in enumerate((2.0, 8.0)):
        up, down = torch.randn(12, 4, generator=draw), torch.randn(4, 6, generator=draw)
        parts.append((up, down))
        tensors = as_tensors(up, down, (12, 6), alpha)
        save_file({f"{name}.{suffix}": value for suffix, value in tensors.items()}, tmp_path / f"{i}.safetensors")
    target = tmp_path / "out.safetensors"
    run(merge_lora.main, "--models", tmp_path / "0.safetensors", tmp_path / "1.safetensors", "--ratios", 0.5, -0.25,
        "--save_to", target, "--no_metadata", "--save_precision", "fp16")  # fmt: skip
    found, ((up, down), (other_up, other_down)) = load_file(target), parts
    torch.testing.assert_close(found[f"{name}.lora_up.weight"], (0.5 * up + 0.5 * other_up).half())
    torch.testing.assert_close(found[f"{name}.lora_down.weight"], (0.5 * down - 0.5 * other_down).half())
    assert float(found[f"{name}.alpha"]) == 2.0
    assert not any(key.startswith("modelspec") for key in header(target))


@pytest.mark.parametrize("name", ["sd1", "lumina"])
def test_svd_merge_is_the_best_of_its_rank(name: str, tmp_path: Path) -> None:
    """The error of each layer is what its singular values beyond the rank make; with all ranks the sum is exact."""
    own = model(name)
    arguments = CONV if name == "sd1" else {}
    first = own.adapter(tmp_path / "a.safetensors", dim=4, **arguments)
    second = own.adapter(tmp_path / "b.safetensors", dim=3, seed=5, **arguments)
    target = tmp_path / "out.safetensors"
    words = ("--models", first, second, "--ratios", 0.7, -0.5, "--save_to", target)
    run(svd_merge_lora.main, *words, "--new_rank", 3)
    one, other = changes(first), changes(second)
    for layer, change in changes(target).items():
        wanted = 0.7 * one[layer] - 0.5 * other[layer]
        tail = torch.linalg.svdvals(wanted.double())[3:].norm()
        assert abs(float((change - wanted).norm() - tail)) < 1e-4 * float(wanted.norm())
    run(svd_merge_lora.main, *words, "--new_rank", 7, "--new_conv_rank", 64)
    for layer, change in changes(target).items():
        assert distance(change, 0.7 * one[layer] - 0.5 * other[layer]) < 1e-5
    assert header(target)["ss_network_module"] == own.network.__name__


# ---- refused ------------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = model("flux")
    file, adapter = own.write(tmp_path / "model.safetensors"), own.adapter(tmp_path / "a.safetensors")
    before, target = file.read_bytes(), tmp_path / "out.safetensors"
    words = ("--sd_model", file, "--models", adapter, "--ratios", 1.0, "--save_to")
    assert "input of this very run" in refused(capsys, merge_lora.main, *words, file)
    assert "input of this very run" in refused(capsys, merge_lora.main, *words, adapter)
    assert "must end with .safetensors" in refused(capsys, merge_lora.main, *words, tmp_path / "out.gguf")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "is a folder" in refused(capsys, merge_lora.main, *words, folder)
    assert "--save_to is needed" in refused(capsys, merge_lora.main, *words[:-1])
    assert "0 numbers for 1 --models" in refused(capsys, merge_lora.main, *words[:4], "--save_to", target)
    assert "--concat is for several LoRAs" in refused(capsys, merge_lora.main, *words, target, "--concat")
    assert "--clip_l_save_to is needed" in refused(capsys, merge_lora.main, *words, target, "--clip_l", adapter)
    missing = ("--sd_model", tmp_path / "no.safetensors", *words[2:], target)
    assert (
        refused(capsys, merge_lora.main, *missing) == f"error: --sd_model {tmp_path / 'no.safetensors'} does not exist"
    )
    assert "2 numbers; 12, 17, 20, 26" in refused(capsys, merge_lora.main, *words, target, "--lbws", "[1,2]")
    assert "in brackets" in refused(capsys, merge_lora.main, *words, target, "--lbws", "1,2")
    assert file.read_bytes() == before and not target.exists()


def test_architectures_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux, lumina = model("flux"), model("lumina")
    file, own = flux.write(tmp_path / "flux.safetensors"), flux.adapter(tmp_path / "flux_lora.safetensors")
    other, target = lumina.adapter(tmp_path / "lumina_lora.safetensors"), tmp_path / "out.safetensors"
    into = ("--sd_model", file, "--models", other, "--ratios", 1, "--save_to", target)
    assert "layers are not in FLUX.1 or Chroma" in refused(capsys, merge_lora.main, *into)
    assert "this script is for Stable Diffusion XL" in refused(
        capsys, sdxl_merge_lora.main, "--sd_model", file, "--models", own, "--ratios", 1, "--save_to", target
    )
    several = ("--models", own, other, "--ratios", 1, 1, "--save_to", target)
    for main in (merge_lora.main, svd_merge_lora.main):
        assert "are for different architectures" in refused(capsys, main, *several)
    vae = tmp_path / "vae.safetensors"
    save_file({"encoder.conv_in.weight": torch.zeros(3, 3, 3, 3)}, vae)
    assert "is a VAE" in refused(
        capsys, merge_lora.main, "--sd_model", vae, "--models", own, "--ratios", 1, "--save_to", target
    )
    theirs = tmp_path / "diffusers.safetensors"
    save_file(flux.modules[0].state_dict(), theirs)
    assert "has the names of diffusers" in refused(
        capsys, merge_lora.main, "--sd_model", theirs, "--models", own, "--ratios", 1, "--save_to", target
    )
    assert "is a LoRA" in refused(
        capsys, merge_lora.main, "--sd_model", own, "--models", own, "--ratios", 1, "--save_to", target
    )
    assert (
        "no adapter tensors"
        in (line := refused(capsys, merge_lora.main, "--models", file, "--ratios", 1, "--save_to", target))
        or "not understood" in line
    )
    wide = load_file(own)
    key = next(key for key in wide if key.endswith("img_attn_qkv.lora_up.weight"))
    save_file({**wide, key: wide[key][:-1].clone()}, own)
    assert "layers do not fit the model" in refused(
        capsys, merge_lora.main, "--sd_model", file, "--models", own, "--ratios", 1, "--save_to", target
    )
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "arguments"), [(loha, {}), (lokr, {}), (oft, {}), (None, {"dora_wd": "True"})], ids=str
)
def test_what_needs_the_model(
    module: ModuleType | None, arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters that are no sum of two matrices are refused without a model, in a line that says what to do."""
    own = model("sd1")
    path = own.adapter(tmp_path / "a.safetensors", module, **arguments)
    words = ("--models", path, path, "--ratios", 1, 1, "--save_to", tmp_path / "out.safetensors")
    for main, more in ((merge_lora.main, ()), (merge_lora.main, ("--concat",)), (svd_merge_lora.main, ())):
        assert main([str(word) for word in (*words, *more)]) == 2
        assert "no plain LoRA" in (error := capsys.readouterr().err) and "merge_lora.py --sd_model" in error
    assert not (tmp_path / "out.safetensors").exists()


def test_different_ranks_and_numbers_that_are_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = model("flux")
    file = own.write(tmp_path / "model.safetensors")
    first, second = own.adapter(tmp_path / "a.safetensors"), own.adapter(tmp_path / "b.safetensors", dim=2)
    target = tmp_path / "out.safetensors"
    assert merge_lora.main([*map(str, ("--models", first, second, "--ratios", 1, 1, "--save_to", target))]) == 2
    assert "different ranks: 4 and 2): use --concat" in capsys.readouterr().err
    line = refused(capsys, merge_lora.main, "--sd_model", file, "--models", first, "--ratios", 1e9, "--save_to", target,
                   "--save_precision", "fp16")  # fmt: skip
    assert "is not finite in float16" in line
    damaged = tmp_path / "damaged.safetensors"
    tensors = load_file(first)
    name = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, damaged)
    for main in (merge_lora.main, svd_merge_lora.main):
        line = refused(capsys, main, "--models", damaged, "--ratios", 1, "--save_to", target)
        assert "is damaged: 1 of" in line and name in line
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))] == []


@pytest.mark.parametrize("name", ["merge_lora", "sdxl_merge_lora", "flux_merge_lora", "svd_merge_lora", "resize_lora",
                                  "extract_lora_from_models", "flux_extract_lora", "extract_lora_from_dylora",
                                  "check_lora_weights"])  # fmt: skip
def test_help_from_any_folder(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--" in done.stdout and done.stderr == ""
