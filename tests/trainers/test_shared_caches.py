# SPDX-License-Identifier: Apache-2.0
"""Two processes with one cache folder, with one of their own each, and with one that cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.trainers import child
from tests.trainers.helpers import DEFAULTS, differing

CACHED: dict[str, Any] = {
    "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True,
    "max_train_steps": 3,
}  # fmt: skip


def pair(sd1: Path, dataset: Path, folder: Path, name: str, *caches: Path) -> tuple[list[int | None], list[str]]:
    """(exit codes, what was printed) of two processes, each with its cache folder."""
    (port,) = child.free_ports(1)
    values = {**DEFAULTS, **CACHED, "pretrained_model_name_or_path": sd1, "dataset_config": dataset}
    own = [{**values, "output_dir": folder / name, "cache_dir": cache} for cache in caches]
    results = [folder / f"{name} {rank}.safetensors" for rank in (0, 1)]
    both = [child.start(child.rank_of_two, rank, port, own[rank], None, results[rank]) for rank in (0, 1)]
    codes = [child.exit_code(process) for process in both]
    return codes, [result.with_suffix(".log").read_text(encoding="utf-8") for result in results]


def test_who_shares_a_folder_divides_the_work(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    shared, first, second = (tmp_path / name for name in ("shared", "first", "second"))
    codes, logs = pair(sd1, dataset, tmp_path, "one", shared, shared)
    assert codes == [0, 0], logs[0][-3000:]
    # five pictures and five captions: each process wrote an index and a shard of its own
    assert sorted(path.name for path in (shared / "latents").glob("*.sqlite")) == ["index-1.sqlite", "index.sqlite"]
    assert len(list((shared / "latents").glob("*.bin"))) == 2 and list(shared.glob("*/.*.writer")) == []
    codes, logs = pair(sd1, dataset, tmp_path, "two", first, second)
    assert codes == [0, 0], logs[0][-3000:]
    for cache in (first, second):
        assert [path.name for path in (cache / "latents").glob("*.sqlite")] == ["index.sqlite"]
    weights = [load_file(tmp_path / f"{name} 0.safetensors") for name in ("one", "two")]
    assert differing(*weights) == []


def test_all_end_with_one_line_where_one_cannot_write(sd1: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    codes, logs = pair(sd1, dataset, tmp_path, "wrong", tmp_path / "good", tmp_path / "file/folder")
    assert codes == [1, 1]  # the error comes as it is, without the script around it
    for log in logs:
        for what in ("latents", "outputs of clip"):
            place = tmp_path / "file/folder" / ("latents" if what == "latents" else "texts")
            assert f" lacks 5 of 5 {what} in {place}: fill it there with tools/cache_latents.py" in log, log[-3000:]
        assert "Connection" not in log
