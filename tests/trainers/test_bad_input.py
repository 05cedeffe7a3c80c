# SPDX-License-Identifier: Apache-2.0
"""Bad input: the script ends with code 2 and clear lines, all at once, without traceback, and nothing is touched."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.data.config import load_dataset_config
from library.data.lint import check
from library.data.options import DataOptions
from library.data.scan import scan
from library.device import DistributedSettings, make_accelerator
from library.errors import UserError
from library.trainers.options import DistributedOptions
from tests.script_runner import Ended, run_script
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import DEFAULTS, argv, differing, make_pictures, subset, train, write_dataset

PRECIOUS = b"a good file of an earlier run"


@pytest.fixture
def base(sd1: Path, dataset: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a good run; a test spoils some. The folder of the output holds a file that must stay as it is."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "x.safetensors").write_bytes(PRECIOUS)
    own = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": output}
    return {**DEFAULTS, **own, "max_train_steps": 2}


def run(values: dict[str, Any], *words: str, **how: Any) -> Ended:
    return run_script(*argv(values), *words, **how)


def refused(base: dict[str, Any], *words: str, fresh: bool = False, **spoilt: Any) -> list[str]:
    """The lines with which the script refuses `base` with `spoilt` and `words`."""
    output = Path(base["output_dir"])
    ended = run({**base, **spoilt}, *words, fresh=fresh)
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    assert [path.name for path in output.iterdir()] == ["x.safetensors"]
    assert (output / "x.safetensors").read_bytes() == PRECIOUS
    assert ended.errors, ended.text
    return ended.errors


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---- options: refused before anything heavy is imported -------------------------------------------------------------


def test_command_line(base: dict[str, Any]) -> None:
    lines = refused(
        base, "--learning_rat", "3", "--output_nam=y", "--max_train_steps", "ten", "--train_batch_size", "0",
        "--mixed_precision", "bf61", "--network_alpha", "-1", "--v2", "maybe", "--clip_skip", "1.5",
        "--resolution", "a,b", "--lr_warmup_steps", "many", "more", fresh=True,
    )  # fmt: skip
    assert lines == [
        "Unknown option --learning_rat. Did you mean --learning_rate?",
        "Unknown option --output_nam. Did you mean --output_name?",
        "'more' belongs to no option: values with spaces need quotes, and options start with --",
        "--network_alpha must be at least 0, got -1.0",
        "--max_train_steps expects a whole number, got 'ten'",
        "--train_batch_size must be at least 1, got 0",
        "--mixed_precision 'bf61' is not one of no, fp16, bf16. Did you mean 'bf16'?",
        "--v2 expects true or false, got 'maybe'",
        "--clip_skip expects a whole number, got 1.5",
        "--resolution expects a whole number or [width, height], got 'a,b'",
        "--lr_warmup_steps expects steps, a fraction below 1 or a percentage, got 'many'",
    ]


def test_an_option_without_its_value(base: dict[str, Any]) -> None:
    assert refused(base, "--seed") == ["Argument --seed: expected one argument"]


CONFIG = """
[heading]
learning_rat = 1
max_train_steps = -4
network_dim = "x"

[another]
mixed_precision = "fp61"
cache_latents = "maybe"
text_encoder_lr = [1e-4, "fast"]
epoch = 3
"""


def test_config_file(base: dict[str, Any], tmp_path: Path) -> None:
    config = written(tmp_path / "options.toml", CONFIG)
    given = {**base, "max_train_steps": None, "network_dim": None}
    assert refused(given, config_file=config, fresh=True) == [
        f"{config}: unknown key 'learning_rat'. Did you mean 'learning_rate'?",
        f"{config}: max_train_steps must be greater than 0, got -4",
        f"{config}: network_dim expects a whole number, got 'x'",
        f"{config}: mixed_precision 'fp61' is not one of no, fp16, bf16. Did you mean 'fp16'?",
        f"{config}: cache_latents expects true or false, got 'maybe'",
        f"{config}: text_encoder_lr expects a number, got 'fast'",
    ]


def test_config_files_that_cannot_be_read(base: dict[str, Any], tmp_path: Path) -> None:
    syntax = written(tmp_path / "syntax.toml", "seed = 1\nnetwork_dim = \n")
    assert refused(base, config_file=syntax) == [f"--config_file: {syntax}, line 2 is not valid TOML: Invalid value"]
    open_array = written(tmp_path / "open.toml", "seed = 1\ntext_encoder_lr = [1, 2\n")
    assert refused(base, config_file=open_array)[0].startswith(
        f"--config_file: {open_array}, line 2 is not valid TOML:"
    )
    assert refused(base, config_file=tmp_path / "nothing") == [f"--config_file: {tmp_path}/nothing.toml does not exist"]
    latin = tmp_path / "latin.toml"
    latin.write_bytes('output_name = "é"'.encode("latin-1"))
    assert refused(base, config_file=latin) == [f"--config_file: {latin} is not UTF-8 text (byte 15)"]


def test_what_is_missing(base: dict[str, Any]) -> None:
    assert refused({**base, "pretrained_model_name_or_path": None}, output_dir=None) == [
        "--pretrained_model_name_or_path is missing: give a checkpoint file, a diffusers folder or a hub id",
        "give --output_dir, the folder for everything that the run writes",
    ]
    no_data = "no training data: give --dataset_config FILE.toml, or --train_data_dir FOLDER and --resolution"
    assert refused(base, dataset_config=None) == [no_data]
    assert refused(base, dataset_config=None, output_dir=None, fresh=True) == [
        "give --output_dir, the folder for everything that the run writes", no_data,
    ]  # fmt: skip


NO_EFFECT = {
    "reg_data_dir": "there",
    "min_bucket_reso": 512, "max_bucket_reso": 256,
    "skip_cache_check": True,
    "min_timestep": 900, "max_timestep": 100,
    "adaptive_noise_scale": 0.1, "noise_offset_random_strength": True, "ip_noise_gamma_random_strength": True,
    "use_8bit_adam": True, "use_lion_optimizer": True, "optimizer_type": "AdamW",
    "full_fp16": True, "cpu_offload_checkpointing": True, "torch_compile": True, "dynamo_backend": "ofi",
    "zero3_init_flag": True, "offload_param_device": "nvme",
    "loss_type": "huber", "huber_scale": 2,
    "no_metadata": True, "training_comment": "mine",
    "save_last_n_epochs": 2, "save_last_n_steps": 5, "save_last_n_steps_state": 5,
    "resume": "somewhere", "initial_epoch": 2,
    "sample_every_n_steps": 1,
    "log_with": "tensorboard",
    "huggingface_path_in_repo": "a", "resume_from_huggingface": False, "save_state_to_huggingface": True,
    "network_train_unet_only": True, "network_train_text_encoder_only": True,
    "dim_from_weights": True, "base_weights_multiplier": 1, "network_args": ["conv_dim"],
}  # fmt: skip


def test_options_that_have_no_effect_together(base: dict[str, Any]) -> None:
    assert refused(base, fresh=True, **NO_EFFECT) == [
        "--reg_data_dir has no effect with --dataset_config: give one of them, not both",
        "--min_bucket_reso 512 is larger than --max_bucket_reso 256",
        "--skip_cache_check has no effect without --cache_latents_to_disk or the same for text outputs",
        "--min_timestep 900 is above --max_timestep 100",
        "--ip_noise_gamma_random_strength has no effect without --ip_noise_gamma",
        "--adaptive_noise_scale adds to --noise_offset and has no effect without it: give --noise_offset too",
        "--noise_offset_random_strength has no effect without --noise_offset",
        "--huber_scale has no effect with --huber_schedule snr: give constant or exponential",
        "--use_8bit_adam and --use_lion_optimizer and --optimizer_type each name an optimizer: give one of them",
        "--full_fp16 needs --mixed_precision fp16",
        "--cpu_offload_checkpointing has no effect without --gradient_checkpointing",
        "--dynamo_backend ofi is gone from torch: use inductor",
        "--offload_param_device has no effect without --deepspeed",
        "--offload_param_device nvme needs --offload_param_nvme_path",
        "--training_comment has no effect with --no_metadata, which leaves it out of the file",
        "--save_last_n_epochs has no effect without --save_every_n_epochs",
        "--save_last_n_steps has no effect without --save_every_n_steps",
        "--initial_epoch and --initial_step do not go with --resume: the state knows where it stopped",
        "--save_last_n_steps_state has no effect without --save_state",
        "--sample_every_n_steps needs --sample_prompts, a .txt, .toml or .json file",
        "--log_with tensorboard needs --logging_dir",
        "--huggingface_path_in_repo has no effect without --huggingface_repo_id",
        "--save_state_to_huggingface has no effect without --huggingface_repo_id",
        "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train: give one",
        "--dim_from_weights has no effect without --network_weights",
        "--base_weights_multiplier has no effect without --base_weights",
        "--network_args: 'conv_dim' is not key=value",
        "--save_last_n_steps_state has no effect without --save_every_n_steps",
        "--save_state_to_huggingface has no effect without --save_state or --save_state_on_train_end",
    ]  # fmt: skip


def test_caches_that_would_hide_what_was_asked_for(base: dict[str, Any]) -> None:
    assert refused(base, cache_text_encoder_outputs=True) == [
        "--cache_text_encoder_outputs fixes the text encoder's outputs, which are being trained: "
        "add --network_train_unet_only, or leave the cache out"
    ]
    (line,) = refused(base, cache_latents=True, random_crop=True)
    assert line.startswith("random_crop cannot vary pictures that --cache_latents encodes once")
    (line,) = refused(base, masked_loss=True)
    assert line == "--masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask = true"
    ways = "has no effect: no picture has a mask (give --masked_loss and conditioning_data_dir, or alpha_mask)"
    assert refused(base, masked_loss_normalize=True, masked_prior_weight=1) == [
        f"--masked_loss_normalize {ways}", f"--masked_prior_weight {ways}"
    ]  # fmt: skip
    (line,) = refused(base, masked_prior_weight=-1)
    assert line == "--masked_prior_weight must be at least 0, got -1.0"


# ---- everything that is read before a model is loaded: all of it in one list ----------------------------------------

DATASET = """
[general]
flip_augg = true
num_repeats = "x"

[[datasets]]
resolution = 64
batch_sise = 2

  [[datasets.subsets]]
  image_dir = "{pictures}"
  caption_dropout_rate = 2
  resolution = 64

  [[datasets.subsets]]
  class_tokens = "cat"

  [[datasets.subsets]]
  image_dir = "{almost}"

[[dataset]]
"""


def test_all_files_and_arguments_at_once(base: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    almost = pictures.with_name("picture")
    table = written(tmp_path / "d.toml", DATASET.format(pictures=pictures, almost=almost))
    prompts = written(tmp_path / "prompts.txt", "a cat --sz 3\n")
    model = Path(base["pretrained_model_name_or_path"])
    wrong = model.with_name("sd11")
    lines = refused(
        base,
        fresh=True,
        pretrained_model_name_or_path=wrong,
        dataset_config=table,
        network_args=["conv_dimm=3", "conv_alpha=x", "rank_dropout=2"],
        network_weights=tmp_path / "none.safetensors",
        base_weights=[tmp_path / "none.pt"],
        resume=tmp_path / "none-state",
        sample_prompts=prompts,
        sample_at_first=True,
        optimizer_args=["weight_decai=1", "lr=3"],
        lr_scheduler="cosin",
        logging_dir=prompts,
    )
    assert lines == [
        f"--pretrained_model_name_or_path: {wrong} does not exist. Did you mean {model}?",
        "--network_args: unknown key 'conv_dimm'. Did you mean 'conv_dim'?",
        "--network_args: conv_alpha expects a number, got 'x'",
        "--network_args: rank_dropout must be between 0 and 0.999, got 2.0",
        f"--network_weights: {tmp_path}/none.safetensors does not exist",
        f"--base_weights: {tmp_path}/none.pt does not exist",
        f"--resume: {tmp_path}/none-state does not exist",
        f"{prompts}, line 1: unknown option --sz. Did you mean --s?",
        f"--logging_dir: {prompts} cannot be made or used: File exists",
        "--optimizer_args: unknown key 'weight_decai'. Did you mean 'weight_decay'?",
        "--optimizer_args: lr: give it as --learning_rate",
        "--lr_scheduler: unknown name 'cosin'. Did you mean 'cosine'?",
        f"{table}: unknown key 'dataset'. Did you mean 'datasets'?",
        f"{table}: general: unknown key 'flip_augg'. Did you mean 'flip_aug'?",
        f"{table}: general: num_repeats expects a whole number, got 'x'",
        f"{table}: datasets[0]: unknown key 'batch_sise'. Did you mean 'batch_size'?",
        f"{table}: datasets[0].subsets[0]: caption_dropout_rate must be between 0 and 1, got 2.0",
        f"{table}: datasets[0].subsets[0]: resolution cannot stand here; it belongs in [general] or [[datasets]]",
        f"{table}: datasets[0].subsets[1]: image_dir is missing (or metadata_file, shards or parquet)",
        f"{table}: datasets[0].subsets[2]: image_dir {almost} does not exist. Did you mean {pictures}?",
    ]


def test_names_that_mean_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    lines = refused(
        base,
        optimizer_type="AdanW8bit",
        lr_scheduler="cosin",
        network_module="networks.lroa",
        sample_every_n_steps=1,
        sample_prompts=tmp_path / "prompts.txt",
        vae=tmp_path / "vae.pt",
    )
    assert lines == [
        f"--vae: {tmp_path}/vae.pt does not exist",
        "--network_module networks.lroa cannot be imported: No module named 'networks.lroa'. "
        "Did you mean networks.lora?",
        f"--sample_prompts: {tmp_path}/prompts.txt does not exist",
        "--optimizer_type: unknown name 'AdanW8bit'. Did you mean 'AdamW8bit'?",
        "--lr_scheduler: unknown name 'cosin'. Did you mean 'cosine'?",
    ]


def test_dataset_files_that_cannot_be_read(base: dict[str, Any], tmp_path: Path) -> None:
    syntax = written(tmp_path / "s.toml", "[general]\nresolution = 64\n[[datasets]\n")
    (line,) = refused(base, dataset_config=syntax)
    assert line.startswith(f"--dataset_config: {syntax}, line 3 is not valid TOML: ")
    syntax = written(tmp_path / "s.json", '{\n "general": {\n }')
    (line,) = refused(base, dataset_config=syntax)
    assert line.startswith(f"--dataset_config: {syntax}, line 3 is not valid JSON: ")
    folder = tmp_path / "10 cats"
    folder.mkdir()
    (line,) = refused(base, dataset_config=None, train_data_dir=tmp_path, resolution=64)
    assert "needs subfolders named <repeats>_<class words>, such as 10_my dog; it has only 10 cats" in line


# ---- pictures and captions ------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A whole PNG file that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_bad_picture_and_caption_is_named(base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "broken", 2)
    whole = Image.open(folder / "p00.png")
    for suffix in ("jpg", "webp", "bmp", "png"):
        path = folder / f"cut.{suffix}"
        whole.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (folder / "zero.png").write_bytes(b"")
    (folder / "fake.jpg").write_text("<html>not found</html>")
    (folder / "huge.png").write_bytes(png_header(200_000, 200_000))
    (folder / "p01.txt").write_bytes("naïve".encode("latin-1"))
    lines = refused(base, dataset_config=write_dataset(tmp_path / "d.toml", subset(folder)), output_name="x")
    assert [line.split(" (")[0] for line in lines] == [
        f"{folder}/cut.bmp: is truncated",
        f"{folder}/cut.jpg: is truncated or damaged",
        f"{folder}/cut.png: is truncated or damaged",
        f"{folder}/cut.webp: is truncated",
        f"{folder}/fake.jpg: is not a picture",
        f"{folder}/huge.png: is 200000x200000 pixels: more than 65,535 on a side or 178,956,970 in all",
        f"{folder}/p01.txt: is not UTF-8 text",
        f"{folder}/zero.png: is empty",
    ]


def test_nothing_to_train_on(base: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "a.txt").write_text("cat")
    lines = refused(base, dataset_config=write_dataset(tmp_path / "d.toml", subset(folder)))
    assert lines == [f"{folder}: no picture found (png, jpg, webp, bmp, avif, jxl); it holds 1 .txt"]
    bare = make_pictures(tmp_path / "bare", 3)
    for caption in bare.glob("*.txt"):
        caption.unlink()
    assert refused(base, dataset_config=write_dataset(tmp_path / "d.toml", subset(bare))) == [
        "none of the 3 pictures has a caption: add caption files (.txt is looked for; see caption_extension) "
        "or class_tokens"
    ]
    seen = make_pictures(tmp_path / "seen", 3)
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("p00.png", "p01.png", "p02.png"):
        Image.new("L", (64, 64)).save(masks / name)
    masked = write_dataset(tmp_path / "d.toml", subset(seen, conditioning_data_dir=str(masks)))
    (line,) = refused(base, dataset_config=masked, masked_loss=True)
    assert line.startswith(
        f"all masks are black where their pictures are trained, so nothing would be learned: {masks}"
    )


def test_warnings_and_the_run_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "odd", 5, size=(40, 50))
    (folder / "p00.txt").write_text("cat " * 80)
    (folder / "p01.txt").write_text("dog, " * 60)
    (folder / "p02.txt").unlink()
    (folder / "p03.txt").write_text("\n")
    shutil.copy(folder / "p04.png", folder / "p04.bmp")
    ended = run({**base, "dataset_config": write_dataset(tmp_path / "d.toml", subset(folder)), "max_train_steps": 1})
    assert ended.code == 0, ended.text
    assert ended.warnings == [
        f"{folder}: 1 picture has no caption (.txt) and no class_tokens: they get an empty one: p02.png",
        f"{folder}: 1 picture has an empty caption and no class_tokens: p03.png",
        f"{folder}: pictures of one stem share a caption (1 times): p04.bmp + p04.png",
        "6 pictures are smaller than their bucket and will be enlarged (see bucket_no_upscale): "
        f"{folder}/p00.png (40x50 to 64x64), {folder}/p01.png (40x50 to 64x64), {folder}/p02.png (40x50 to 64x64) "
        "and 3 more",
        "2 captions are longer than 75 tokens and will be cut (see --max_token_length): "
        f"{folder}/p00.png (80 tokens), {folder}/p01.png (120 tokens)",
    ]
    longer = {"dataset_config": tmp_path / "d.toml", "max_train_steps": 1, "max_token_length": 150}
    assert "longer than" not in run({**base, **longer}).text


def is_counted(text: str, what: str, count: int) -> bool:
    """Whether a progress bar has come to its end."""
    return re.search(rf"{what}: 100%.* {count}/{count} \[", text) is not None


def test_damaged_cache_is_encoded_again(base: dict[str, Any], tmp_path: Path) -> None:
    cache = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True}
    cached = {**base, **cache, "cache_dir": tmp_path / "cache"}
    assert is_counted(run(cached).text, "caching latents", 5)
    good = load_file(tmp_path / "out" / "x.safetensors")
    assert "caching" not in run(cached).text
    for kind in ("latents", "texts"):
        (file,) = (tmp_path / "cache" / kind).glob("*.bin")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 255
        file.write_bytes(data)
    ended = run(cached)
    assert ended.code == 0, ended.text
    assert is_counted(ended.text, "caching latents", 1) and is_counted(ended.text, "caching captions", 1)
    kinds = [line.split(" are damaged and encoded again: ")[0] for line in ended.warnings]
    assert kinds == ["1 cached captions", "1 cached latents"]
    assert differing(load_file(tmp_path / "out" / "x.safetensors"), good) == []
    assert run(cached).warnings == []


# ---- checkpoints ----------------------------------------------------------------------------------------------------

KINDS = {
    "is an SDXL checkpoint: use sdxl_train_network.py": [
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ],
    "is a FLUX.1 checkpoint: use flux_train_network.py": ["double_blocks.0.img_mod.lin.weight"],
    "is an SD3 checkpoint: use sd3_train_network.py": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "is a LoRA or other adapter, not a checkpoint: it belongs to --network_weights or --base_weights": [
        "lora_unet_mid_block.lora_down.weight"
    ],
    "is a VAE, not a checkpoint: it belongs to --vae": ["encoder.conv_in.weight"],
    "is no Stable Diffusion checkpoint: it has no model.diffusion_model.* weights": ["something.weight"],
}


@pytest.mark.parametrize("answer", KINDS)
def test_checkpoint_of_another_kind(base: dict[str, Any], tmp_path: Path, answer: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(2, 2) for name in KINDS[answer]}, path)
    assert refused(base, pretrained_model_name_or_path=path) == [f"{path} {answer}"]


@pytest.fixture(scope="module")
def single(ground: Path) -> Path:
    return make_tiny_sd(ground / "single", layout="single")


@pytest.fixture(scope="module")
def single2(ground: Path) -> Path:
    return make_tiny_sd(ground / "single2", version=2, layout="single")


def test_checkpoint_of_the_other_version(base: dict[str, Any], single: Path, single2: Path) -> None:
    assert refused(base, pretrained_model_name_or_path=single2) == [
        f"{single2} is a Stable Diffusion 2.x model: add --v2 (and --v_parameterization if it is a 768-v one)"
    ]
    assert refused(base, pretrained_model_name_or_path=single, v2=True) == [
        f"{single} is a Stable Diffusion 1.x model: leave out --v2"
    ]


def test_damaged_checkpoints(base: dict[str, Any], single: Path, tmp_path: Path) -> None:
    whole = single.read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    again = "download or copy it again"
    assert refused(base, pretrained_model_name_or_path=path) == [
        f"{path} is cut short: {len(whole) // 2} of {len(whole)} bytes are there; {again}"
    ]
    path.write_bytes(b"")
    assert refused(base, pretrained_model_name_or_path=path) == [
        f"{path} is not a safetensors file: it is empty; {again}"
    ]
    ckpt = tmp_path / "model.ckpt"
    torch.save({"state_dict": Harmful(str(tmp_path / "harm"))}, ckpt)
    (line,) = refused(base, pretrained_model_name_or_path=ckpt)
    assert line.startswith(f"{ckpt} is refused: it wants to run code") and not (tmp_path / "harm").exists()
    assert refused(base, pretrained_model_name_or_path="someone/some-model") == [
        "--pretrained_model_name_or_path: someone/some-model does not exist here, is not in the hub's cache, and "
        "the hub cannot be reached; give the path of a file or folder"
    ]


class Harmful:
    """What a pickle must not do to us: make a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_network_weights_that_do_not_fit(base: dict[str, Any], tmp_path: Path) -> None:
    made = run({**base, "output_name": "small", "max_train_steps": 1})
    assert made.code == 0, made.text
    weights = Path(base["output_dir"], "small.safetensors").rename(tmp_path / "small.safetensors")
    Path(base["output_dir"], "small.config.toml").unlink()
    (line,) = refused(base, network_weights=weights, network_dim=8)
    assert line.startswith(f"--network_weights {weights}: the adapter file does not fit: ")
    assert "has rank 4, this network has 8 (set --network_dim, or use --dim_from_weights)" in line
    weights.write_bytes(weights.read_bytes()[:-30])
    (line,) = refused(base, network_weights=weights)
    assert line.startswith(f"--network_weights {weights}: not a readable adapter file")


# ---- what the run writes, and states --------------------------------------------------------------------------------


def test_output_folder_that_cannot_be_used(base: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path / "file", "")
    for unusable in (file, file / "below"):
        ended = run({**base, "output_dir": unusable})
        assert (ended.code, ended.errors) == (2, [f"--output_dir: {file} is a file; give a folder"])
    assert refused(base, output_name="a/b") == [
        "--output_name 'a/b' is not a plain file name: leave out / (folders belong into --output_dir)"
    ]
    assert refused(base, console_log_file=file / "log.txt") == [
        f"--console_log_file: {file}/log.txt cannot be written: Not a directory"
    ]


def test_read_only_output_folder(base: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "read only"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    ended = run({**base, "output_dir": folder})
    assert (ended.code, ended.errors) == (2, [f"--output_dir: cannot write into {folder}: Permission denied"])


@pytest.fixture(scope="module")
def stopped(sd1: Path, dataset: Path, ground: Path) -> Path:
    """The folder of a finished run of four steps with states of step 2 and of the end."""
    own = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": ground / "stopped"}
    ended = run({**DEFAULTS, **own, "save_state": True, "save_every_n_steps": 2})
    assert ended.code == 0, ended.text
    return ground / "stopped"


def test_state_of_another_run(base: dict[str, Any], stopped: Path, pictures: Path, tmp_path: Path) -> None:
    state = stopped / "x-step00000002-state"
    other = write_dataset(tmp_path / "d.toml", subset(make_pictures(tmp_path / "other", 4)))
    changed = {"network_dim": 8, "optimizer_type": "Lion", "dataset_config": other, "seed": 9}
    (line,) = refused(base, resume=state, **changed, max_train_steps=4)
    start = f"--resume: {state} is a state of another run: "
    end = ". Give the same settings, or start anew from the file beside it"
    assert line.startswith(start) and line.endswith(end)
    found = line[len(start) : -len(end)].split("; ")
    assert found[:6] == [
        "--optimizer_type was AdamW, is Lion",
        "--network_dim was 4, is 8",
        "seed was 7, is 9",
        "batches per epoch was 3, is 2",
        "dataset subset 1 folder was pictures, is other",
        found[5],
    ]
    assert found[5].startswith("dataset subset 1 pictures was 5 (")
    copy = shutil.copytree(pictures, tmp_path / "pictures")
    (copy / "p01.txt").write_text("edited")
    edited = write_dataset(tmp_path / "d.toml", subset(copy))
    (line,) = refused(base, resume=state, dataset_config=edited, max_train_steps=4)
    assert line.startswith(f"{start}dataset subset 1 captions was ") and "; " not in line


def test_states_that_cannot_be_continued(base: dict[str, Any], stopped: Path, tmp_path: Path) -> None:
    finished = stopped / "x-state"
    assert refused(base, resume=finished, max_train_steps=4) == [
        "the run starts at step 4 and ends at step 4: nothing is left to train. "
        "Raise --max_train_steps or --max_train_epochs"
    ]
    cut = shutil.copytree(finished, tmp_path / "cut-state")
    data = (cut / "optimizer.pt").read_bytes()
    (cut / "optimizer.pt").write_bytes(data[:-100])
    (line,) = refused(base, resume=cut)
    assert line.endswith(f"optimizer.pt has {len(data) - 100:,} of {len(data):,} bytes; use another state")
    (cut / "optimizer.pt").write_bytes(data[:-100] + b"x" * 100)
    (line,) = refused(base, resume=cut)
    assert line.endswith("optimizer.pt is damaged (its content is not what was written); use another state")
    foreign = tmp_path / "foreign-state"
    foreign.mkdir()
    for name in ("optimizer.bin", "model.safetensors", "random_states_0.pkl"):
        (foreign / name).write_bytes(b"x")
    assert refused(base, resume=foreign) == [
        f"--resume: {foreign} is a state of sd-scripts, which cannot be continued; "
        f"start from its weights with --network_weights {foreign}/model.safetensors"
    ]
    assert refused(base, resume=stopped / "x-step00000003-state") == [
        f"--resume: {stopped}/x-step00000003-state does not exist. Did you mean {stopped}/x-step00000002-state?"
    ]
    assert refused(base, resume="a/b", resume_from_huggingface=True) == [
        "--resume: with --resume_from_huggingface expects user/name/folder[:revision[:type]], got 'a/b'"
    ]


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8(single: Path, tmp_path: Path) -> None:
    """Everything lies below such names: the run, its caches, curves, previews and states work as with others."""
    root = tmp_path / "caf\udce9"
    root.mkdir()
    model = shutil.copytree(single.parent, root / "m\udce9") / single.name
    folder = make_pictures(root / "img" / "2_cat \udce9", 2)
    for path in [*folder.iterdir()]:
        path.rename(path.with_name(path.name.replace("p0", "p\udce9")))
    prompts = written(root / "p\udce9.txt", "a cat --w 64 --h 64 --s 1\n")
    own = {
        **DEFAULTS, "dataset_config": None, "pretrained_model_name_or_path": model, "train_data_dir": folder.parent,
        "resolution": 64, "caption_extension": ".txt", "output_dir": root / "o", "cache_dir": root / "c",
        "logging_dir": root / "l", "sample_prompts": prompts, "sample_at_first": True, "cache_latents_to_disk": True,
        "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True, "save_state": True,
        "log_config": True, "max_train_steps": 1,
    }  # fmt: skip
    ended = run(own)
    assert ended.code == 0, ended.text
    assert load_file(shutil.copy(root / "o" / "x.safetensors", tmp_path / "x.safetensors"))
    assert list((root / "l").rglob("events.*")) and list((root / "o" / "sample").glob("*.png"))
    again = run({**own, "max_train_steps": 2, "resume": root / "o" / "x-state"})
    assert again.code == 0 and "caching" not in again.text, again.text
    for path in folder.glob("*.txt"):
        path.unlink()  # now the name of the folder is the caption, and that must be text
    data = DataOptions(train_data_dir=str(folder.parent), resolution=(64, 64), caption_extension=".txt")
    (line,) = check(scan(load_dataset_config(data, bucket_step=64), cache_dir=str(root / "c"))).problems
    assert "captions of 2 pictures: is not valid text" in line


# ---- the machine ----------------------------------------------------------------------------------------------------


def test_what_this_machine_has_not(base: dict[str, Any]) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has a GPU")
    assert refused(base, mixed_precision="fp16") == [
        "--mixed_precision fp16 needs a GPU; on the CPU use --mixed_precision bf16 or no"
    ]
    if importlib.util.find_spec("deepspeed") is None:
        assert refused(base, deepspeed=True) == [
            "--deepspeed: the package is not installed: pip install deepspeed (Linux with CUDA)"
        ]
    if importlib.util.find_spec("wandb") is None:
        assert refused(base, log_with="wandb") == ["--log_with wandb: the package is not installed: pip install wandb"]


@pytest.mark.parametrize(
    ("variable", "kind", "instead"),
    [
        ("FSDP", "FSDP", "--shard_base"), ("MEGATRON_LM", "Megatron-LM", "--multi_gpu"),
        ("DEEPSPEED", "DeepSpeed and --deepspeed is not given", "--multi_gpu"),
    ],
)  # fmt: skip
def test_what_accelerate_was_configured_for(
    variable: str, kind: str, instead: str, sd1: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` says so in the environment; nobody would notice that the training does not do it."""
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UserError, match=f"^accelerate's configuration asks for {kind}: .*{instead}"):
        train(sd1, dataset, tmp_path)


def test_deepspeed_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name)
    monkeypatch.setattr("library.device.accelerator_present", lambda: False)
    with pytest.raises(UserError, match=r"^--deepspeed needs a GPU"):
        make_accelerator("no", DistributedSettings(deepspeed={"zero_stage": 2}))
    assert "--zero_stage 3 splits the weights" in "".join(DistributedOptions(deepspeed=True, zero_stage=3).problems())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full(base: dict[str, Any], small_disk: Path) -> None:
    older = small_disk / "x.safetensors"
    older.write_bytes(PRECIOUS)
    ended = run({**base, "output_dir": small_disk})
    assert (ended.code, len(ended.errors)) == (2, 1), ended.text
    assert ended.errors[0].startswith(f"{small_disk}: no room left for x.safetensors: ")
    assert "Traceback" not in ended.text and older.read_bytes() == PRECIOUS


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of that kind")
def test_file_that_cannot_grow(base: dict[str, Any]) -> None:
    older = Path(base["output_dir"], "x.safetensors")
    ended = run(base, file_limit=32768)
    assert (ended.code, len(ended.errors)) == (2, 1), ended.text
    assert ended.errors[0].startswith(f"{older.parent}: no room left for x.safetensors: ")
    assert "Traceback" not in ended.text and older.read_bytes() == PRECIOUS
