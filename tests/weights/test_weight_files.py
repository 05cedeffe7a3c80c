# SPDX-License-Identifier: Apache-2.0
"""Weight files: what is read, what is refused, what never runs, and how much memory it takes."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import UserError
from library.weights.weight_files import CompletedFile, open_weights

ROOT = Path(__file__).parents[2]
TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.float16),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "count": torch.tensor([7]),
    "brain": torch.ones(3, dtype=torch.bfloat16),
}


@pytest.fixture
def safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path, metadata={"k": "v"})
    return path


def line(path):
    """The one line that opening the file gives."""
    with pytest.raises(UserError) as caught:
        open_weights(path)
    (problem,) = caught.value.problems
    assert str(path) in problem and "\n" not in problem
    return problem


def test_safetensors_keep_dtype_and_value(safetensors):
    file = open_weights(safetensors)
    assert file.shapes == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert file.metadata == {"k": "v"}
    for name, expected in TENSORS.items():
        tensor = file.tensor(name)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_casts_floats_only(safetensors):
    file = open_weights(safetensors)
    assert torch.equal(file.tensor("a", torch.bfloat16), TENSORS["a"].bfloat16())
    assert file.tensor("b", torch.float32).dtype == torch.float32
    assert file.tensor("count", torch.float16).dtype == torch.int64
    assert file.tensor("scalar", torch.float16).tolist() == 2.5 and file.tensor("empty", torch.float16).shape == (0, 3)


def test_a_long_tensor_is_cast_whole(tmp_path):
    long = torch.randn(3, 1 << 20)[:, 1:].contiguous()
    save_file({"x": long}, tmp_path / "m.safetensors")
    assert torch.equal(open_weights(tmp_path / "m.safetensors").tensor("x", torch.float16), long.half())


def test_changing_a_tensor_never_changes_the_file(safetensors):
    before = safetensors.read_bytes()
    open_weights(safetensors).tensor("a").fill_(9)
    assert safetensors.read_bytes() == before
    assert torch.equal(open_weights(safetensors).tensor("a"), TENSORS["a"])


def test_a_mapped_tensor_has_a_storage_of_its_own(safetensors):
    assert open_weights(safetensors).tensor("a").untyped_storage().nbytes() == 6 * 4


def test_data_that_are_not_aligned_are_read(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((5 - len(header)) % 8)  # the data start at 8 n + 5
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert open_weights(path).tensor("x").tolist() == [1.5, -2.0]


def test_truncated_files(safetensors):
    whole = safetensors.read_bytes()
    for size, words in ((len(whole) - 1, "cut short"), (100, "cut short"), (20, "cut short"), (9, "no"), (0, "empty")):
        safetensors.write_bytes(whole[:size])
        assert words in line(safetensors)


def test_missing_file(tmp_path):
    assert "does not exist" in line(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>sign in</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(60), "rename it to .ckpt"),
        (b"hello world, this is text", "does not begin like one"),
        ((12).to_bytes(8, "little") + b"{not json at}", "header is not readable"),
        ((64).to_bytes(8, "little") + b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'.ljust(64), "damaged"),
        ((64).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'.ljust(64), "damaged"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, words):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert words in line(path)


def test_unknown_ending(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert ".safetensors, .ckpt" in line(path)


def test_split_files(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "1.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    file = open_weights(index)
    assert torch.equal(file.tensor("a"), TENSORS["a"]) and torch.equal(file.tensor("b"), TENSORS["b"])
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors"}}))
    assert "2.safetensors lacks a" in line(index)
    index.write_text("[]")
    assert "index" in line(index)


PARTS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_one_part_stands_for_all(tmp_path):
    for name, key in zip(PARTS, ("a", "b", "scalar")):
        save_file({key: TENSORS[key]}, tmp_path / name)
    for name in PARTS:
        file = open_weights(tmp_path / name)
        assert sorted(file.shapes) == ["a", "b", "scalar"] and file.path == tmp_path / name
        assert all(torch.equal(file.tensor(key), TENSORS[key]) for key in file.shapes)
        assert set(file.files) == {tmp_path / part for part in PARTS}
    (tmp_path / PARTS[1]).unlink()
    assert line(tmp_path / PARTS[0]).endswith(f"is one of 3 parts, and {PARTS[1]} is not beside it")
    assert "does not exist" in line(tmp_path / PARTS[1])


def test_an_index_that_names_a_missing_file(tmp_path):
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match=f"^{tmp_path / 'gone.safetensors'} does not exist$"):
        open_weights(tmp_path / "m.index.json")


def test_a_file_with_what_it_lacks(safetensors):
    file = CompletedFile(open_weights(safetensors), {"a": torch.zeros(1), "more": torch.tensor([0.5, 2.0])})
    assert file.shapes["more"] == (2,) and file.files == (safetensors,)
    assert torch.equal(file.tensor("a"), TENSORS["a"])  # what the file has comes from the file
    assert file.tensor("more", torch.float16).tolist() == [0.5, 2.0]


# ---- 8 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_fp8_is_cast_exactly(tmp_path, dtype, suffix):
    values, path = torch.randn(7, 5).to(dtype), tmp_path / f"m{suffix}"
    save_file({"x": values}, path) if suffix == ".safetensors" else torch.save({"x": values}, path)
    file = open_weights(path)
    assert file.is_float8 and file.tensor("x").dtype == dtype
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(file.tensor("x", wanted), values.to(wanted))


def test_other_files_are_not_fp8(safetensors):
    assert not open_weights(safetensors).is_float8


SCALED = torch.tensor([[1.0, -448.0], [0.5, 2.0], [0.0, 16.0]])
QUANT = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


@pytest.mark.parametrize(
    "extras, marker",
    [
        ({"scale_weight": torch.tensor(0.25), "scale_input": torch.ones(1)}, {"scaled_fp8": torch.zeros(0)}),
        ({"scale_weight": torch.tensor([0.25])}, {"t5.scaled_fp8": torch.zeros(2)}),
        ({"weight_scale": torch.tensor([[0.25]]), "input_scale": torch.tensor(1.0), "comfy_quant": QUANT}, {}),
        ({"weight_scale": torch.tensor([0.25, 0.25, 0.25])}, {}),
    ],
)
def test_scaled_fp8(tmp_path, extras, marker):
    path = tmp_path / "m.safetensors"
    tensors = {
        "t5.q.weight": SCALED.to(torch.float8_e4m3fn),
        "t5.q.bias": torch.ones(3),
        "t5.norm.weight": torch.ones(2),
    }
    tensors |= {f"t5.q.{name}": tensor for name, tensor in extras.items()}
    save_file(tensors | {n: t.to(torch.float8_e4m3fn) for n, t in marker.items()}, path)
    file = open_weights(path)
    assert dict(file.shapes) == {"t5.q.weight": (3, 2), "t5.q.bias": (3,), "t5.norm.weight": (2,)}
    assert file.is_float8 and file.files == (path,)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        weight = file.tensor("t5.q.weight", dtype)
        assert weight.dtype == (dtype or torch.float32) and torch.equal(weight.float(), SCALED * 0.25)
    assert torch.equal(file.tensor("t5.q.bias"), torch.ones(3))


def test_a_scale_per_row(tmp_path):
    scales = torch.tensor([1.0, 2.0, 4.0])
    for shape in ((3,), (3, 1)):
        tensors = {"q.weight": SCALED.to(torch.float8_e4m3fn), "q.weight_scale": scales.reshape(shape)}
        save_file(tensors, tmp_path / "m.safetensors")
        weight = open_weights(tmp_path / "m.safetensors").tensor("q.weight")
        assert torch.equal(weight, SCALED * scales[:, None])


@pytest.mark.parametrize(
    "content, kind", [(b'{"format": "nvfp4"}', "nvfp4"), (b"\xff", "unreadable"), (b"[]", "unread")]
)
def test_other_quantisations_are_refused(tmp_path, content, kind):
    quant = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    tensors = {
        "q.weight": torch.zeros(2, 2, dtype=torch.uint8),
        "q.weight_scale": torch.ones(2),
        "q.comfy_quant": quant,
    }
    save_file(tensors, tmp_path / "m.safetensors")
    problem = line(tmp_path / "m.safetensors")
    assert kind in problem and "q.comfy_quant" in problem and "float8_e4m3fn" in problem


# ---- torch checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("nest", [lambda d: d, lambda d: {"state_dict": d, "epoch": 3}])
def test_ckpt_with_and_without_state_dict(tmp_path, nest, new_format):
    path = tmp_path / "m.ckpt"
    torch.save(nest(dict(TENSORS)), path, _use_new_zipfile_serialization=new_format)
    file = open_weights(path)
    assert file.shapes == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert all(torch.equal(file.tensor(n), t) for n, t in TENSORS.items())
    assert file.tensor("a", torch.float16).dtype == torch.float16


class RunsCode:
    """Unpickling it creates the file `marker`."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("writer", ["torch", "torch_old", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path, writer):
    path, marker = tmp_path / "m.ckpt", tmp_path / "was_run"
    content = {"state_dict": {"a": torch.zeros(1)}, "x": RunsCode(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    assert "refused" in line(path)
    assert not marker.exists()
    if writer == "torch":  # the same file does run code when it is trusted: the test can fail
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_the_refusal_names_what_was_to_run(tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save({"x": RunsCode(tmp_path / "no")}, path)
    assert "mkdir" in line(path) and ".safetensors" in line(path)


def test_a_class_name_of_lightning_is_harmless(tmp_path, monkeypatch):
    """Old Stable Diffusion checkpoints list their callbacks by class."""
    names = "pytorch_lightning.callbacks.model_checkpoint"
    modules = [".".join(names.split(".")[: i + 1]) for i in range(3)]
    module = type(sys)(modules[-1])
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": modules[-1]})
    for name in modules[:-1]:
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, modules[-1], module)
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"a": TENSORS["a"]}, "callbacks": {module.ModelCheckpoint: {"best": None}}}, path)
    assert torch.equal(open_weights(path).tensor("a"), TENSORS["a"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"no pickle at all"])
def test_damaged_ckpt(tmp_path, content):
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    assert "damaged" in line(path)


def test_truncated_ckpt(tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged" in line(path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"lr": 0.1}])
def test_ckpt_without_weights(tmp_path, content):
    path = tmp_path / "m.ckpt"
    torch.save(content, path)
    assert "no named weights" in line(path)


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
from library.weights.weight_files import open_weights

def memory(field):  # MiB; the kernel's peak, which a child process does not inherit, unlike ru_maxrss
    return next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith(field))

dtype = getattr(torch, sys.argv[2]) if sys.argv[2] != "None" else None
before = memory("VmRSS")
file = open_weights(Path(sys.argv[1]))
kept = [file.tensor(name, dtype) for name in file.shapes]
print(memory("VmHWM") - before)
total = sum(float(t.float().sum()) for t in kept)  # touches every page
print(memory("VmHWM") - before, total)
"""


@pytest.fixture(scope="module")
def big_file(tmp_path_factory):
    """256 MB of float16."""
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    save_file({f"w{i}": torch.ones(8, 1024, 1024, dtype=torch.float16) for i in range(16)}, path)
    yield path
    path.unlink()


def measure(path, dtype):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded, touched, total = run.stdout.split()
    assert float(total) == 16 * 8 * 1024 * 1024
    return int(loaded), int(touched)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_maps_and_copies_nothing(big_file):
    loaded, touched = measure(big_file, "None")
    assert loaded < 30  # MiB, of a 256 MiB file
    assert touched < 256 + 60


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cast_costs_no_more_than_its_result(big_file):
    loaded, touched = measure(big_file, "float32")
    assert 500 < loaded < 512 + 60
    assert touched < 512 + 60


RELEASE = """
import sys
from pathlib import Path
from library.weights.weight_files import open_weights

def memory():  # MiB
    return next(int(l.split()[1]) // 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))

file = open_weights(Path(sys.argv[1]))
before = memory()
kept = [file.tensor(name) for name in file.shapes]
total = sum(float(t.sum(dtype=__import__("torch").float32)) for t in kept)
touched = memory() - before
file.release()
held = memory() - before
del kept
print(touched, held, memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_released_mapping_goes_with_its_last_tensor(big_file):
    run = subprocess.run(
        [sys.executable, "-c", RELEASE, str(big_file)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    touched, held, after = map(int, run.stdout.split())
    assert touched > 250 and held > 250 and after < 30
