# SPDX-License-Identifier: Apache-2.0
"""--deepspeed with ZeRO 1 and 2 on two processes: they learn what one process learns with twice the accumulation, and
a run that is stopped goes on bit by bit as if it had not been.

DeepSpeed runs on the CPU here, where it builds an extension first; that takes minutes, so it is tested where the
package is installed: pip install deepspeed ninja, and a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.io.state import load_state
from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, differing, make_pictures, make_trainer, subset, write_dataset

missing = [name for name in ("deepspeed", "ninja") if importlib.util.find_spec(name) is None]
missing += [] if shutil.which("g++") else ["g++"]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"DeepSpeed cannot be built here without {', '.join(missing)}")
BUILD = 600  # seconds


def pair(values: dict[str, Any], folder: Path, name: str = "", interrupt_in: int | None = None) -> None:
    """Two processes that train with DeepSpeed."""
    (port,) = child.free_ports(1)
    both = [child.start(child.deepspeed_rank, rank, port, values, folder, name, interrupt_in) for rank in (0, 1)]
    codes = [child.exit_code(process, seconds=BUILD) for process in both]
    assert codes == [0, 0], (folder / "0.log").read_text(encoding="utf-8")[-3000:]


@pytest.mark.parametrize(("stage", "precision"), [(1, "no"), (2, "bf16")])
def test_two_processes_learn_what_one_does(stage: int, precision: str, sd1: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "five", 5)
    data = write_dataset(tmp_path / "five.toml", subset(pictures), batch_size=1)
    values: dict[str, Any] = {
        **DEFAULTS, "pretrained_model_name_or_path": sd1, "dataset_config": data, "max_train_steps": 4,
        "save_state": True, "ema_decay": 0.9,
    }  # fmt: skip
    zero = {**values, "deepspeed": True, "zero_stage": stage, "mixed_precision": precision}
    if precision == "no":
        sgd = {"optimizer_type": "SGDNesterov", "ema_decay": None, "save_state": False}
        alone = make_trainer({**values, **sgd, "output_dir": tmp_path / "alone", "gradient_accumulation_steps": 2})
        assert alone.run() == 0
        pair({**zero, **sgd, "output_dir": tmp_path / "two"}, tmp_path)
        expected = torch.tensor([report.loss for report in alone.reports])
        torch.testing.assert_close(load_file(tmp_path / "0.safetensors")["losses"], expected, rtol=1e-5, atol=0)
        files = [load_file(tmp_path / name / "x.safetensors") for name in ("two", "alone")]
        assert files[0].keys() == files[1].keys()
        for name, weight in files[1].items():
            torch.testing.assert_close(files[0][name], weight, rtol=1e-4, atol=1e-5)
    pair({**zero, "output_dir": tmp_path / "whole"}, tmp_path, "whole")
    pair({**zero, "output_dir": tmp_path / "parts"}, tmp_path, "first", interrupt_in=2)
    (stopped,) = child.states(tmp_path / "parts")  # after the step in which both know of it
    pair({**zero, "output_dir": tmp_path / "parts", "resume": stopped}, tmp_path, "last")
    files = [load_file(tmp_path / name / "x.safetensors") for name in ("whole", "parts")]
    assert differing(*files) == []
    states = [load_state(tmp_path / name / "x-state") for name in ("whole", "parts")]
    assert differing(states[0].optimizer, states[1].optimizer) == [] and states[0].optimizer["state"]
    assert differing(states[0].weights, states[1].weights) == [] and differing(states[0].ema, states[1].ema) == []
    shapes = [value.shape for value in states[0].optimizer["float32 weights"]]
    assert [own["exp_avg"].shape for own in states[0].optimizer["state"].values()] == shapes  # whole tensors
    losses = [load_file(tmp_path / f"{name}0.safetensors")["losses"] for name in ("whole", "first", "last")]
    assert torch.equal(losses[0], torch.cat(losses[1:]))
