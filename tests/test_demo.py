# SPDX-License-Identifier: Apache-2.0
"""The README's first command, shortened: a LoRA of the built-in model learns a thing that the model has never seen."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.script_runner import run_script

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from score_lora import score_lora  # noqa: E402

STEPS = 150  # of configs/demo.toml's several hundred


def test_the_demo_learns_the_rocket_and_keeps_what_is_known(tmp_path: Path) -> None:
    ended = run_script(
        "--config_file", "configs/demo.toml", "--output_dir", str(tmp_path), "--logging_dir", str(tmp_path / "logs"),
        "--max_train_steps", str(STEPS), "--sample_at_first", "false", "--sample_every_n_steps", "0",
    )  # fmt: skip
    assert ended.code == 0, ended.text
    model, lora = ROOT / "examples" / "base_model", tmp_path / "rocket.safetensors"
    before = score_lora(model, None, seeds=(11,), per_thing=1)
    after = score_lora(model, lora, seeds=(11,), per_thing=1)
    assert before.concept.rocket_nearest <= 1 / 8
    assert before.known.thing_right >= 7 / 8
    assert after.concept.mean_rocket_similarity >= before.concept.mean_rocket_similarity + 0.05
    assert after.known.thing_right >= 6 / 8
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
