# SPDX-License-Identifier: Apache-2.0
"""Names, retention, checks before the training, and what is in a saved file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.errors import StopTraining, UserError
from library.io.checkpoint import (
    check_output,
    epoch_name,
    epochs_between_saves,
    in_precision,
    last_name,
    outdated_epoch,
    outdated_step,
    remove_save,
    remove_state,
    require_present,
    save_tensors,
    saves_after_epoch,
    saves_after_step,
    state_name,
    states_to_keep,
    step_name,
)
from library.io.options import HubOptions, MetadataOptions, SaveOptions, StateOptions, cross_problems
from library.io.tensor_file import check_safetensors, write_safetensors


def test_names_are_as_users_know_them() -> None:
    assert last_name("my", ".safetensors") == "my.safetensors"
    assert epoch_name("my", 1, ".safetensors") == "my-000001.safetensors"
    assert step_name("my", 500, ".ckpt") == "my-step00000500.ckpt"
    assert state_name(epoch_name("my", 1)) == "my-000001-state"
    assert state_name(step_name("my", 500)) == "my-step00000500-state"
    assert state_name(last_name("my")) == "my-state"
    assert (last_name(None), epoch_name(None, 2), step_name(None, 3)) == ("last", "epoch-000002", "at-step00000003")


# ---- retention ----------------------------------------------------------------------------------------------------


def kept_epochs(total: int, every: int, keep: int | None) -> list[int]:
    there: set[int] = set()
    for epoch in range(1, total + 1):
        if saves_after_epoch(epoch, total=total, every=every):
            there.add(epoch)
            there.discard(outdated_epoch(epoch, every=every, keep=keep) or 0)
    return sorted(there)


def kept_steps(total: int, every: int, keep: int | None) -> list[int]:
    there: set[int] = set()
    for step in range(1, total + 1):
        if saves_after_step(step, every=every):
            there.add(step)
            there.discard(outdated_step(step, every=every, keep=keep) or 0)
    return sorted(there)


def test_the_newest_epochs_stay_and_the_last_has_only_the_runs_name() -> None:
    assert kept_epochs(10, 1, None) == list(range(1, 10))
    assert kept_epochs(10, 1, 2) == [8, 9]
    assert kept_epochs(10, 2, 1) == [8]
    assert kept_epochs(3, 5, 1) == []


def test_steps_stay_while_they_are_young_enough() -> None:
    assert kept_steps(1000, 100, None) == list(range(100, 1001, 100))
    assert kept_steps(1000, 100, 200) == [800, 900, 1000]
    assert kept_steps(1000, 100, 250) == [800, 900, 1000]
    assert kept_steps(1000, 100, 50) == [1000]


def test_ratio_and_states_have_their_own_numbers() -> None:
    assert epochs_between_saves(SaveOptions(save_every_n_epochs=3), 10) == 3
    assert epochs_between_saves(SaveOptions(save_n_epoch_ratio=4), 10) == 2
    assert epochs_between_saves(SaveOptions(save_n_epoch_ratio=40), 10) == 1
    assert epochs_between_saves(SaveOptions(), 10) is None
    save = SaveOptions(save_last_n_epochs=2, save_last_n_steps=30)
    assert states_to_keep(save, StateOptions()) == (2, 30)
    assert states_to_keep(save, StateOptions(save_last_n_epochs_state=1, save_last_n_steps_state=0)) == (1, 30)


def test_only_what_is_a_save_or_a_state_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a-000001.safetensors").write_text("x")
    (tmp_path / "a-000002.safetensors").mkdir()
    (tmp_path / "a-000001-state").mkdir()
    (tmp_path / "a-000002-state").mkdir()
    (tmp_path / "a-000002-state" / "train_state.json").write_text("{}")
    assert remove_save(tmp_path, "a-000001.safetensors")
    assert not remove_save(tmp_path, "a-000002.safetensors") and not remove_save(tmp_path, "a-000003.safetensors")
    assert remove_state(tmp_path, "a-000002-state")
    assert not remove_state(tmp_path, "a-000001-state")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-000001-state", "a-000002.safetensors"]


# ---- before the training ------------------------------------------------------------------------------------------


def problems_of(*args: object, **kwargs: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_output(*args, **kwargs)  # type: ignore[arg-type]
    return caught.value.problems


def test_a_good_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = tmp_path / "出力 Straße" / "b"
    assert check_output(folder, "モデル_ß", files=["モデル_ß.safetensors"], needed_bytes=1000) == []
    assert list(folder.iterdir()) == []


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    assert problems_of(tmp_path / "out", "a") == [f"--output_dir: {tmp_path / 'out'} is a file; give a folder"]
    assert problems_of(tmp_path / "out" / "sub", "a") == [f"--output_dir: {tmp_path / 'out'} is a file; give a folder"]


def test_all_problems_of_the_output_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "a-state").write_text("x")
    found = problems_of(tmp_path, "x/a", files=["a.safetensors"], states=["a-state"], needed_bytes=1 << 60)
    assert len(found) == 4
    assert "plain file name" in found[0] and "is a folder" in found[1] and "is a file" in found[2]
    assert f"needs {1 << 60:,}" in found[3]


@pytest.mark.skipif(os.name == "nt", reason="rights of POSIX")
def test_a_folder_without_rights() -> None:
    code = (
        "import os, sys\nfrom library.errors import UserError\nfrom library.io.checkpoint import check_output\n"
        "os.setuid(65534) if os.geteuid() == 0 else None\n"
        "try:\n    check_output(sys.argv[1], 'a')\nexcept UserError as error:\n    print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent) / "locked"
        folder.mkdir(mode=0o555)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, text=True)
    assert done.stdout == f"--output_dir: cannot write into {folder}: Permission denied\n", done.stderr


# ---- the file -----------------------------------------------------------------------------------------------------


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    return {
        "b.lora_up.weight": base.T,
        "a.alpha": torch.tensor(4.0),
        "a.half": base[:2].to(torch.bfloat16),
        "a.slice": base[1:3, 2:4],
        "a.count": torch.arange(5),
        "a.none": torch.zeros(0, 3),
        "a.flag": torch.tensor([True, False, True]),
        "ü": torch.ones(3, dtype=torch.float16),
    }


def test_safetensors_reads_back_with_the_package(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", tensors(), {"ss_x": 'ü "quoted"\n\x01', "modelspec.title": "t"})
    again = load_file(str(path))
    assert again.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert again[name].dtype == expected.dtype and torch.equal(again[name], expected), name
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_x"] == 'ü "quoted"\n\x01' and len(metadata["sshs_model_hash"]) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_file_equals_the_one_of_the_safetensors_package(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    ready = {name: t.contiguous().clone() for name, t in tensors().items()}
    save_file(ready, tmp_path / "theirs.safetensors", metadata={"ss_x": "é\x01\n"})
    write_safetensors(tmp_path / "ours.safetensors", ready, {"ss_x": "é\x01\n"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".ckpt"])
def test_saved_in_a_number_format(tmp_path: Path, ending: str) -> None:
    path = save_tensors(tmp_path / f"a{ending}", tensors(), {"k": "v"}, dtype=torch.float16)
    again = load_file(str(path)) if ending == ".safetensors" else torch.load(path, weights_only=True)
    assert again.keys() == tensors().keys()
    assert again["a.alpha"].dtype == torch.float16 and again["a.count"].dtype == torch.int64
    assert torch.equal(again["b.lora_up.weight"], tensors()["b.lora_up.weight"].half())


def test_a_pickle_holds_no_more_than_the_tensors(tmp_path: Path) -> None:
    big = torch.zeros(1_000_000)
    path = save_tensors(tmp_path / "a.pt", {"w": big[:10]}, {})
    assert path.stat().st_size < 10_000


def test_nonfinite_weights_are_never_written_over_a_good_file(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", tensors(), {})
    before = path.read_bytes()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(StopTraining, match=r"1 of 2 tensors are not finite \(x\)"):
            save_tensors(path, {"x": torch.tensor([1.0, bad]), "y": torch.ones(2)}, {})
    with pytest.raises(StopTraining, match=r"1 of 2 tensors are empty \(x\)"):
        require_present({"x": torch.zeros(0), "y": torch.ones(2)}, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_has_no_place_in_the_precision_is_written_in_float32(
    dtype: torch.dtype, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training of days is not thrown away because of one number. An adapter's values may be too small, too."""
    largest = {torch.float16: 1e5, torch.bfloat16: 3.4e38}[dtype]  # float32 has it
    given = {"large": torch.tensor([1.0, largest]), "ok": torch.ones(2), "zero": torch.zeros(2)}
    path = save_tensors(tmp_path / f"a.{ending}", given, {}, dtype=dtype)
    found = load_file(path) if ending == "safetensors" else torch.load(path)
    wide = {"large"}
    assert {name: t.dtype for name, t in found.items()} == {n: torch.float32 if n in wide else dtype for n in given}
    assert all(torch.equal(found[name], given[name]) for name in wide)
    assert caplog.text.count("are written in float32, they have no place in") == 1
    small = {"small": torch.tensor([1e-9, 0.0]), "some": torch.tensor([1e-9, 1.0])}
    kept = in_precision(small, torch.float16, path)
    assert {name: tensor.dtype for name, tensor in kept.items()} == {"small": torch.float32, "some": torch.float16}


def test_another_content_on_disk_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_safetensors(path, tensors(), {})
    check_safetensors(path, digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="other content"):
        check_safetensors(path, digest)
    path.write_bytes(data[:-10])
    with pytest.raises(UserError, match="does not read back"):
        check_safetensors(path, digest)


# ---- options ------------------------------------------------------------------------------------------------------


def test_good_options_have_no_problems() -> None:
    save = SaveOptions("out", "name", save_every_n_epochs=1, save_last_n_epochs=2, save_every_n_steps=0)
    assert list(save.problems()) == []
    assert list(StateOptions(save_state=True, save_last_n_steps_state=3).problems()) == []
    assert list(HubOptions("me/it", async_upload=True).problems()) == []
    assert list(cross_problems(save, StateOptions(), HubOptions())) == []
    assert SaveOptions().save_model_as == "safetensors"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (SaveOptions(), "give --output_dir"),
        (SaveOptions("o", "a/b"), "leave out /"),
        (SaveOptions("o", "a:b?"), "leave out : ?"),
        (SaveOptions("o", ".."), "not a file name"),
        (SaveOptions("o", "ü" * 101), "202 bytes"),
        (SaveOptions("o", save_last_n_epochs=1), "--save_every_n_epochs"),
        (SaveOptions("o", save_last_n_steps=1), "--save_every_n_steps"),
        (SaveOptions("o", save_n_epoch_ratio=1, save_every_n_epochs=1), "only one"),
        (StateOptions(save_last_n_epochs_state=1), "--save_state"),
        (StateOptions(save_last_n_steps_state=1), "--save_state"),
        (StateOptions(resume="x", initial_step=3), "--resume"),
        (StateOptions(initial_epoch=2, initial_step=3), "only one"),
        (MetadataOptions(metadata_thumbnail="nothing.png"), "no file nothing.png"),
        (HubOptions("name"), "user/name"),
        (HubOptions(async_upload=True), "--huggingface_repo_id"),
    ],
)
def test_options_that_make_no_sense(options: SaveOptions, word: str) -> None:
    found = list(options.problems())
    assert len(found) == 1 and word in found[0]


def test_problems_over_several_groups() -> None:
    state = StateOptions(save_last_n_epochs_state=1, save_last_n_steps_state=1)
    hub = HubOptions("me/it", save_state_to_huggingface=True, resume_from_huggingface=True)
    assert len(list(cross_problems(SaveOptions("o"), state, hub))) == 4
