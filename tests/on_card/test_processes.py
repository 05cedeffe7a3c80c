# SPDX-License-Identifier: Apache-2.0
"""Two processes with a card each."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, differing, make_trainer, settle

pytestmark = [pytest.mark.gpu, pytest.mark.simulated]


def rank_of_two(rank: int, port: int, values: dict[str, Any], result: Path) -> None:
    """One of two machines with a card each; its weights go to `result`, and its exit code is the script's."""
    where = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    settle()
    child.redirect(result.with_suffix(".log"))
    torch.distributed.init_process_group("gloo")  # accelerate would want NCCL
    trainer = make_trainer(values)
    code = trainer.run()
    assert trainer.device.type == "cuda"
    save_file(trainer.network.state(None), result)
    sys.exit(code)


@pytest.mark.parametrize("saving", [{}, {"blocks_to_swap": 4, "fp8_base": True}], ids=["plain", "swapped"])
def test_two_processes_learn_the_same(saving: dict[str, Any], sd1: Path, dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"pretrained_model_name_or_path": sd1, "dataset_config": dataset, "output_dir": tmp_path / "out"}
    values = {**DEFAULTS, **given, "max_train_steps": 2, **saving}
    files = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    both = [child.start(rank_of_two, rank, port, values, files[rank]) for rank in (0, 1)]
    codes = [child.exit_code(process) for process in both]
    assert codes == [0, 0], files[0].with_suffix(".log").read_text(encoding="utf-8")[-3000:]
    one, other = (load_file(file) for file in files)
    assert differing(one, other) == []
    assert any(bool(tensor.count_nonzero()) for name, tensor in one.items() if "up" in name)
