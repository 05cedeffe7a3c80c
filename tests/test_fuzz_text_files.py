# SPDX-License-Identifier: Apache-2.0
"""Damaged text files, 200 of each kind with a fixed seed: read, or refused in at most ten lines, in bounded time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from library.cli import METHODS
from library.data.config import load_dataset_config
from library.data.lint import check
from library.data.options import DataOptions
from library.data.scan import scan
from library.errors import UserError
from library.families.registry import FAMILIES
from library.options import resolve
from library.sampling.prompts import load_prompts
from library.trainers.options import LoggingOptions
from library.trainers.tracking import tracker_settings
from tests.trainers.helpers import make_pictures

FILES, MOST_LINES, MOST_SECONDS = 200, 10, 5.0

DATASET = """[general]
resolution = 64
caption_extension = ".txt"
enable_bucket = false
keep_tokens = 1

[[datasets]]
batch_size = 2
network_multiplier = 1.0

  [[datasets.subsets]]
  image_dir = "PICTURES"
  num_repeats = 2
  caption_dropout_rate = 0.1
  class_tokens = "cat"
"""
DATASET_JSON = """{"general": {"resolution": [64, 64], "caption_separator": ","},
 "datasets": [{"batch_size": 2, "subsets": [{"image_dir": "PICTURES", "num_repeats": 1, "class_tokens": "cat",
 "flip_aug": true, "custom_attributes": {"diff_output_preservation": false}}]}]}"""
CONFIG = """pretrained_model_name_or_path = "model.safetensors"
output_dir = "out"
train_data_dir = "PICTURES"
resolution = "64,64"
[training]
learning_rate = 1e-4
max_train_steps = 10
lr_warmup_steps = 0.1
text_encoder_lr = [1e-4, 5e-5]
optimizer_args = ["weight_decay=0.01"]
cache_latents = true
network_dim = 8
seed = 42
epoch = 3
"""
METADATA = """{"p00.png": {"caption": "a cat", "tags": "cat, small", "train_resolution": [64, 64]},
 "p01.png": {"caption": "a dog", "tags": ""}}"""
METADATA_LINES = """{"image_path": "p00.png", "caption": "a cat", "score": 0.5}
{"image_path": "p01.png", "tags": "a, b", "caption": null}
"""
PROMPTS = """# previews
a red rocket --n blurry --w 64 --h 64 --d 42 --s 3 --l 7.5 --ss euler_a
a cat, small --d 9007199254740993
"""
PROMPTS_TOML = """[prompt]
width = 64
negative_prompt = "blurry"
[[prompt.subset]]
prompt = "a rocket"
seed = 42
scale = 7.5
[[prompt.subset]]
prompt = "a cat"
"""
PROMPTS_JSON = """["a cat --w 64 --d 3", {"prompt": "a rocket", "seed": 42, "scale": 7.5, "sample_steps": 3}]"""
TRACKERS = """[tensorboard]
max_queue = 5
comment = "mine"
[wandb]
tags = ["a"]
"""

EXTREME = (
    "9" * 5000, "1e400", "-1", "nan", "inf", "1e30", "9007199254740993", '""', "true", "[]", "{}", "null", '"\\u0000"',
    '"\\ud800"', "[" * 20000, '{"a":' * 5000, "a.b." * 500 + "c = 1\n", "\n" * 3000, "x" * 50000, "\0", '"a\\nb"',
    "0x" + "f" * 5000, "1979-13-77", "'''", '"""', "=", ",", ":", "{{|}}", "--", "--w 1e9", "\u2028", "\ud800",
)  # fmt: skip


def damaged(text: str, draw: random.Random) -> bytes:
    """`text` with one to three damages."""
    data = text.encode()
    for _ in range(draw.randint(1, 3)):
        first = draw.randrange(len(data) + 1)
        last = min(len(data), first + draw.randint(0, 30))
        new = draw.choice(EXTREME).encode(errors="surrogatepass")
        values = [at for at, byte in enumerate(data) if byte in b"=:,"]
        match draw.randrange(8):
            case 0:
                data = data[:first]
            case 1:
                data = data[:first] + data[last:]
            case 2:
                data = data[:first] + data[first:last] * draw.randint(2, 200) + data[last:]
            case 3:
                data = data[:first] + bytes(draw.randrange(256) for _ in range(8)) + data[last:]
            case 4:
                data = data[:first] + new + data[first:]
            case 5 | 6 if values:
                at = draw.choice(values) + 1
                end = next((i for i in range(at, len(data)) if data[i] in b",\n}]"), len(data))
                data = data[:at] + b" " + new + data[end:]
            case _:
                lines = data.split(b"\n")
                draw.shuffle(lines)
                data = b"\n".join([*lines, *lines[: draw.randint(0, 2)]])
    return data


def read_dataset(path: Path) -> None:
    configs = load_dataset_config(DataOptions(dataset_config=str(path)), bucket_step=64)
    found = check(scan(configs, cache_dir=str(path.parent / "cache")))
    if found.problems:
        raise UserError(found.problems)


def read_metadata(path: Path) -> None:
    options = DataOptions(in_json=str(path), train_data_dir=str(path.parent / "pictures"), resolution=(64, 64))
    found = check(scan(load_dataset_config(options, bucket_step=64), cache_dir=str(path.parent / "cache")))
    if found.problems:
        raise UserError(found.problems)


def read_config(path: Path) -> None:
    resolve(METHODS["network"][1], FAMILIES["sdxl"].option_groups, ["--config_file", str(path)], prog="t")


def read_trackers(path: Path) -> None:
    tracker_settings(LoggingOptions(log_tracker_config=str(path)))


KINDS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "dataset.toml": ("d.toml", DATASET, read_dataset),
    "dataset.json": ("d.json", DATASET_JSON, read_dataset),
    "config.toml": ("c.toml", CONFIG, read_config),
    "metadata.json": ("m.json", METADATA, read_metadata),
    "metadata.jsonl": ("m.jsonl", METADATA_LINES, read_metadata),
    "prompts.txt": ("p.txt", PROMPTS, load_prompts),
    "prompts.toml": ("p.toml", PROMPTS_TOML, load_prompts),
    "prompts.json": ("p.json", PROMPTS_JSON, load_prompts),
    "trackers.toml": ("t.toml", TRACKERS, read_trackers),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    name, text, read = KINDS[kind]
    text = text.replace("PICTURES", str(make_pictures(tmp_path / "pictures", 2)).replace("\\", "/"))
    path, draw, refused = tmp_path / name, random.Random(kind), 0
    path.write_text(text, encoding="utf-8")
    read(path)  # whole, it is good
    for number in range(FILES):
        path.write_bytes(damaged(text, draw))
        started = time.monotonic()
        try:
            read(path)
        except UserError as error:
            refused += 1
            lines = [*error.lines()]
            assert 0 < len(lines) <= MOST_LINES, (number, lines)
            assert all(line.isprintable() or "\ud800" in line or max(line) >= "\udc80" for line in lines), (
                number,
                lines,
            )
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {path.read_bytes()[:300]!r}") from error
        assert time.monotonic() - started < MOST_SECONDS, number
    assert refused > FILES // 4
