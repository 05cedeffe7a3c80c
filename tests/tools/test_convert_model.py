# SPDX-License-Identifier: Apache-2.0
"""tools/convert_model.py: there and back gives the same bits, other programs read both, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.families import sdxl
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import differing
from tools.convert_model import kind_of, main, with_flags

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "convert_model.py"
KINDS = ("v1", "v2", "sdxl")
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"  # of CLIP-G: no picture depends on it, no folder has it


def make(folder: Path, kind: str, **variants: Any) -> Path:
    """A tiny model. Its attention is too narrow to tell 1.x and 2.x folders apart: commands here say which it is."""
    if kind == "sdxl":
        return sdxl.make(folder, **variants)["pretrained_model_name_or_path"]
    return make_tiny_sd(folder, version=int(kind[1]), **variants)


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind), kind, layout="single") for kind in KINDS}


def run(*words: object) -> int:
    return main([str(word) for word in words])


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_file_folder_file(kind: str, safetensors: bool, singles: dict[str, Path], tmp_path: Path) -> None:
    more = [f"--{kind}", *(["--use_safetensors"] if safetensors else [])]
    assert run(singles[kind], tmp_path / "folder", *more) == 0
    ending = ".safetensors" if safetensors else ".bin"
    assert (tmp_path / "folder" / "unet" / f"diffusion_pytorch_model{ending}").is_file()
    assert run(f"--{kind}", tmp_path / "folder", tmp_path / "again.safetensors") == 0
    before, after = load_file(singles[kind]), load_file(tmp_path / "again.safetensors")
    before.pop(LOGIT_SCALE, None)
    after.pop(LOGIT_SCALE, None)
    assert differing(before, after) == []


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_folder(kind: str, singles: dict[str, Path], tmp_path: Path) -> None:
    """The pipeline of the class that the folder names, every weight in its place, v-prediction in its scheduler."""
    import diffusers

    assert run(singles[kind], tmp_path / "folder", f"--{kind}", "--use_safetensors", "--v_parameterization") == 0
    name = json.loads((tmp_path / "folder" / "model_index.json").read_text())["_class_name"]
    assert name == ("StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline")
    loaded: Any = getattr(diffusers, name).from_pretrained(tmp_path / "folder")
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    image = loaded("a cat", num_inference_steps=1, height=64, width=64, output_type="latent").images
    assert torch.isfinite(image).all()
    weights = load_file(singles[kind])
    assert torch.equal(loaded.unet.conv_in.weight, weights["model.diffusion_model.input_blocks.0.0.weight"])
    assert torch.equal(loaded.vae.encoder.conv_in.weight, weights["first_stage_model.encoder.conv_in.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_folder_file_folder(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "m", kind, v_prediction=True)
    assert run(source, tmp_path / "a.safetensors", f"--{kind}") == 0
    assert run(tmp_path / "a.safetensors", tmp_path / "b", f"--{kind}", "--reference_model", source,
               "--use_safetensors") == 0  # fmt: skip
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        before = {key.removeprefix("text_model."): v for key, v in load_file(source / f"{name}.safetensors").items()}
        after = load_file(tmp_path / "b" / f"{name}.safetensors")
        assert differing(before, {key.removeprefix("text_model."): v for key, v in after.items()}) == []
    theirs, ours = (json.loads((f / "scheduler/scheduler_config.json").read_text()) for f in (source, tmp_path / "b"))
    assert ours == theirs and ours["prediction_type"] == "v_prediction"
    assert (tmp_path / "b" / "tokenizer" / "tokenizer_config.json").is_file()


# ---- one file to another --------------------------------------------------------------------------------------------


def test_unknown_weights_and_metadata_survive(singles: dict[str, Path], tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {**load_file(singles["v1"]), "model_ema.decay": torch.tensor(0.5), "mine": torch.arange(3)}
    save_file(tensors, source, {"modelspec.title": "old", "modelspec.hash_sha256": "1", "modelspec.author": "é"})
    before = source.read_bytes()
    assert run(source, target, "--metadata", "{'modelspec.title': 'new'}") == 0
    assert differing(load_file(target), tensors) == []
    assert metadata_of(target).items() >= {"modelspec.title": "new", "modelspec.author": "é"}.items()
    assert "modelspec.hash_sha256" not in metadata_of(target)
    assert source.read_bytes() == before


def test_ckpt_counts_on(singles: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    assert run(singles["v1"], first, "--epoch", 3, "--global_step", 40) == 0
    assert run(first, second, "--epoch", 1, "--global_step", 2) == 0
    content = torch.load(second, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (4, 42)
    assert differing(content["state_dict"], load_file(singles["v1"])) == []


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (["--fp16"], torch.float16),
        (["--save_precision_as", "bf16"], torch.bfloat16),
        (["--float"], torch.float32),
        (["--bf16", "--save_precision_as", "bf16"], torch.bfloat16),
        ([], torch.float32),
    ],
)
def test_precision(words: list[str], dtype: torch.dtype, singles: dict[str, Path], tmp_path: Path) -> None:
    assert run(*words, singles["v1"], tmp_path / "a.safetensors") == 0
    expected = {name: tensor.to(dtype) for name, tensor in load_file(singles["v1"]).items()}
    assert differing(load_file(tmp_path / "a.safetensors"), expected) == []


def test_half_precision_stays(tmp_path: Path) -> None:
    source = make_tiny_sd(tmp_path / "m", layout="single", dtype=torch.float16)
    assert run(source, tmp_path / "f", "--use_safetensors") == 0
    assert run(tmp_path / "f", tmp_path / "b.safetensors") == 0
    assert differing(load_file(tmp_path / "b.safetensors"), load_file(source)) == []


# ---- options --------------------------------------------------------------------------------------------------------


def test_variant(singles: dict[str, Path], tmp_path: Path) -> None:
    """A folder with both precisions, as the hub has them: without the option the whole numbers are read."""
    both = make_tiny_sd(tmp_path / "m")
    for file in both.glob("*/*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
    assert run(both, tmp_path / "a.safetensors") == 0
    assert run(both, tmp_path / "b.safetensors", "--variant", "fp16") == 0
    whole, half = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert differing(half, {name: tensor.half() for name, tensor in whole.items()}) == []
    assert run(both, tmp_path / "f", "--variant", "fp16", "--reference_model", both) == 0
    assert {path.name for path in both.glob("unet/*")} >= {"config.json", "diffusion_pytorch_model.fp16.safetensors"}


def test_reference_model_where_there_is_no_tokenizer(
    singles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(singles["v1"].read_bytes())
    assert run(alone, tmp_path / "a") == 2
    assert "no tokenizer" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert run(alone, tmp_path / "a.ckpt") == 0  # a file needs none
    reference = make_tiny_sd(tmp_path / "reference", seed=1)
    assert run(alone, tmp_path / "a", "--reference_model", reference) == 0
    assert [p.name for p in alone.parent.iterdir()] == ["model.safetensors"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / "tokenizer" / name).is_file()


def test_an_older_folder_is_replaced_as_a_whole(singles: dict[str, Path], tmp_path: Path) -> None:
    target = make_tiny_sd(tmp_path / "target", seed=5)
    (target / "mark").write_text("old")
    assert run(singles["v1"], target) == 0
    assert not (target / "mark").exists() and not list(target.glob("unet/*.safetensors"))


def test_which_model_it_is(singles: dict[str, Path], tmp_path: Path) -> None:
    assert {kind: kind_of(path) for kind, path in singles.items()} == {kind: kind for kind in KINDS}
    (tmp_path / "unet").mkdir()
    for kind, config in (
        ("v1", {"cross_attention_dim": 768}),
        ("v2", {"cross_attention_dim": 1024}),
        ("sdxl", {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}),
    ):
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
        assert kind_of(tmp_path) == kind


def test_names_may_stand_before_or_behind_the_options() -> None:
    names = ["--model_to_load", "a", "--model_to_save", "b"]
    assert with_flags(["a", "b"]) == names
    assert with_flags(["a", "b", "--v2"]) == [*names, "--v2"]
    assert with_flags(["--v2", "--epoch", "3", "a", "b"]) == [*names, "--v2", "--epoch", "3"]
    assert with_flags(["--fp16", "a", "b"]) == [*names, "--fp16"]
    for words in ([], ["a"], ["--v2"], ["--epoch", "3", "a"], ["a", "--v2"], [*names]):
        assert with_flags(words) == words


def test_as_a_script_from_any_folder(tmp_path: Path) -> None:
    """As far as that takes no import of torch."""
    (tmp_path / "here").write_text("x")
    words = [sys.executable, "-P", str(SCRIPT), "--fp16", "here", "here"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    line = "error: --model_to_save here is --model_to_load itself: give another name\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_bad_input(singles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = singles["v1"], tmp_path / "other"
    (other / "stuff").mkdir(parents=True)
    (tmp_path / "plain").write_text("x")
    (tmp_path / "dir.safetensors").mkdir()
    flux = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(1)}, flux)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, lora)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(source.read_bytes()[:100000])
    before = source.read_bytes()
    into = partial(lambda *words: words, source)
    good = tmp_path / "b.safetensors"
    cases: list[tuple[tuple[object, ...], str]] = [
        ((source,), "belongs to no option"),
        (("--model_to_load", source), "--model_to_save is needed"),
        (into(source), "is --model_to_load itself: give another name"),
        (into(tmp_path / "b.pt"), "a file must end with .safetensors or .ckpt"),
        (into(good, "--v1", "--v2"), "--v1 and --v2: give one of them"),
        (into(good, "--fp16", "--bf16"), "several precisions are asked for (bf16, fp16): give one"),
        (into(good, "--fp16", "--save_precision_as", "float"), "several precisions"),
        (into(good, "--save_precision_as", "fp61"), "Did you mean 'fp16'?"),
        (into(good, "--metadata", "{1: 2}"), "--metadata expects texts such as"),
        (into(good, "--metadata", "__import__('os')"), "--metadata expects texts such as"),
        (into(tmp_path / "b.ckpt", "--metadata", "{'a': 'b'}"), "--metadata: .ckpt has no place for them"),
        (into(good, "--epoch", "3"), "--epoch and --global_step: .safetensors has no place for them"),
        (into(good, "--variant", "fp16"), "--variant has no effect on a single file"),
        (into(good, "--use_safetensors"), "--use_safetensors has no effect on a single file"),
        (into(other), "is a folder of other things: give another name"),
        (into(tmp_path / "plain"), "is a file; a folder (a name without ending) is written here"),
        (into(tmp_path / "dir.safetensors"), "is a folder; give a file"),
        (into(tmp_path / "b", "--reference_model", other), "scheduler/scheduler_config.json and tokenizer missing"),
        (into(good, "--v2"), "is a Stable Diffusion 1.x model: leave out --v2"),
        ((singles["sdxl"], good, "--v1"), "is an SDXL checkpoint"),
        ((singles["v2"], good, "--v1"), "is a Stable Diffusion 2.x model: add --v2"),
        ((tmp_path / "no.safetensors", good), "--model_to_load: "),
        ((flux, good), "is of another architecture (flux)"),
        ((lora, good), "a LoRA or other adapter, not a checkpoint"),
        ((cut, good), "is cut short"),
    ]
    for words, expected in cases:
        assert run(*words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith("error: ") and expected in line for line in lines), (expected, lines)
        assert "Traceback" not in "\n".join(lines)
    assert source.read_bytes() == before and not good.exists() and [*other.iterdir()] == [other / "stuff"]
