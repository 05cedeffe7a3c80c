# SPDX-License-Identifier: Apache-2.0
"""--deepspeed with ZeRO 1 and 2 on two processes: they learn what one process learns with twice the accumulation.

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

from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, make_pictures, make_trainer, subset, write_dataset

missing = [name for name in ("deepspeed", "ninja") if importlib.util.find_spec(name) is None]
missing += [] if shutil.which("g++") else ["g++"]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"DeepSpeed cannot be built here without {', '.join(missing)}")
BUILD = 600  # seconds


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_learn_what_one_does(stage: int, sd1: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "five", 5)
    data = write_dataset(tmp_path / "five.toml", subset(pictures), batch_size=1)
    values: dict[str, Any] = {
        **DEFAULTS, "pretrained_model_name_or_path": sd1, "dataset_config": data, "max_train_steps": 4,
        "optimizer_type": "SGDNesterov",
    }  # fmt: skip
    alone = make_trainer({**values, "output_dir": tmp_path / "alone", "gradient_accumulation_steps": 2})
    assert alone.run() == 0
    (port,) = child.free_ports(1)
    given = {**values, "output_dir": tmp_path / "two", "deepspeed": True, "zero_stage": stage}
    both = [child.start(child.deepspeed_rank, rank, port, given, tmp_path) for rank in (0, 1)]
    codes = [child.exit_code(process, seconds=BUILD) for process in both]
    assert codes == [0, 0], (tmp_path / "0.log").read_text(encoding="utf-8")[-3000:]
    expected = torch.tensor([report.loss for report in alone.reports])
    torch.testing.assert_close(load_file(tmp_path / "0.safetensors")["losses"], expected, rtol=1e-5, atol=0)
    files = [load_file(tmp_path / name / "x.safetensors") for name in ("two", "alone")]
    assert files[0].keys() == files[1].keys()
    for name, weight in files[1].items():
        torch.testing.assert_close(files[0][name], weight, rtol=1e-4, atol=1e-5)
