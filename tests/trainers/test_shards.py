# SPDX-License-Identifier: Apache-2.0
"""Training from tar shards and parquet files: what a folder of the same pictures trains, whole, killed and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from library.io.state import newest_state
from tests.shard_files import parquet_of, tars_of
from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, Run, assert_same_run, differing, subset, train, write_dataset

CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
CACHED |= {"network_train_unet_only": True}
OWN: dict[str, Any] = {"shuffle_caption": True, "flip_aug": True}


@pytest.fixture(scope="module")
def tars(ground: Path, pictures: Path) -> Path:
    return write_dataset(ground / "tars.toml", {"shards": tars_of(pictures, ground / "tars"), **OWN})


@pytest.fixture(scope="module")
def parquet(ground: Path, pictures: Path) -> Path:
    pytest.importorskip("pyarrow")
    path = parquet_of(pictures, ground / "pictures.parquet")
    return write_dataset(ground / "parquet.toml", {"parquet": str(path), **OWN})


@pytest.mark.parametrize("values", [{}, CACHED], ids=["plain", "cached"])
def test_tars_train_what_a_folder_does(
    values: dict[str, Any], sd1: Path, tars: Path, ground: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = write_dataset(ground / "same.toml", subset(pictures, **OWN))
    expected = train(sd1, folder, tmp_path / "folder", cache_dir=tmp_path / "of folder", **values)
    found = train(sd1, tars, tmp_path / "tars", cache_dir=tmp_path / "of tars", **values)
    assert found.losses == expected.losses and differing(found.weights, expected.weights) == []


@pytest.mark.parametrize("source", ["tars", "parquet"])
def test_two_processes_killed_and_resumed(
    source: str, sd1: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Two runs of two processes: one to its end, one that is killed with its caches half filled or later."""
    dataset = request.getfixturevalue(source)

    def pair(name: str, number: int, until: Callable[[], bool] | None = None, **more: Any) -> list[int | None]:
        (port,) = child.free_ports(1)
        values = {
            **DEFAULTS, **CACHED, "pretrained_model_name_or_path": sd1, "dataset_config": dataset, "save_state": True,
            "output_dir": tmp_path / name, "cache_dir": tmp_path / f"cache of {name}", "save_every_n_steps": 1,
            "max_train_steps": 10, **more,
        }  # fmt: skip
        results = [tmp_path / f"{name} {number} {rank}.safetensors" for rank in (0, 1)]
        both = [child.start(child.rank_of_two, rank, port, values, None, results[rank]) for rank in (0, 1)]
        if until is not None:
            child.wait_until(until, both[0], results[0].with_suffix(".log"))
            for process in both:
                process.kill()
        codes = [child.exit_code(process) for process in both]
        assert until is not None or codes == [0, 0], results[0].with_suffix(".log").read_text(encoding="utf-8")[-3000:]
        return codes

    pair("whole", 0)
    assert differing(*(load_file(tmp_path / f"whole 0 {rank}.safetensors") for rank in (0, 1))) == []
    folder = tmp_path / "killed"
    assert pair("killed", 0, until=lambda: bool(child.states(folder))) == [-9, -9]
    state = newest_state(folder, "x")
    assert state is not None and not (folder / "x.safetensors").exists()
    pair("killed", 1, resume=state)
    assert_same_run(Run(None, 0, folder), Run(None, 0, tmp_path / "whole"))  # type: ignore[arg-type]
