# SPDX-License-Identifier: Apache-2.0
"""tools/cache_latents.py, alone and together with its sister: the training finds everything, of every family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from library.cli import option_groups
from library.data.caches.share import Share, Shares
from library.families.registry import with_scripts
from library.options import group_types, specs
from tests.families import CASES, sd
from tests.trainers.helpers import DEFAULTS, argv, differing, make_pictures, make_trainer, subset, write_dataset
from tools import cache_latents, cache_text_encoder_outputs, caching
from tools.make_options_doc import SCRIPTS

ROOT = Path(__file__).resolve().parents[2]
ONE_OF_EACH = {case.family: name for name, case in reversed(CASES.items())}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, two sizes, both sides round."""
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder / "p", 3)
    make_pictures(folder / "p", 2, size=(64, 128), first=3)
    return write_dataset(folder / "d.toml", subset(folder / "p", flip_aug=True), **BUCKETS)


BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128}


@pytest.fixture(autouse=True)
def own_state() -> None:
    """accelerate keeps precision and processes for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def never(*arguments: Any, **more: Any) -> NoReturn:
    raise AssertionError("a model was loaded to encode something")


def trained(values: dict[str, Any], family: str, *, encodes: bool) -> dict[str, Any]:
    """The LoRA of two steps. encodes: whether VAE and text encoders may be loaded."""
    trainer = make_trainer({**DEFAULTS, **values, "max_train_steps": 2, "network_train_unet_only": True}, family=family)
    if not encodes:
        trainer.family.load_vae = trainer.family.load_text_encoder = never  # type: ignore[method-assign]
    assert trainer.run() == 0
    return load_file(Path(values["output_dir"]) / "x.safetensors")


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_the_training_encodes_nothing(family: str, dataset: Path, tmp_path: Path) -> None:
    """And learns the same as one that encodes for itself, where there is one text encoder, and where there are two."""
    case = CASES[ONE_OF_EACH[family]]
    options = {**case.make(tmp_path / "model"), **case.options, "dataset_config": dataset}
    for tool in (cache_latents, cache_text_encoder_outputs):
        assert tool.main([f"--{family}", *argv({**options, "cache_dir": tmp_path / "cache"})]) == 0
    on_disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    found = trained({**options, **on_disk, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / "a"}, family,
                    encodes=False)  # fmt: skip
    if family not in ("sd", "flux"):
        return
    in_memory = {"cache_latents": True, "cache_text_encoder_outputs": True}
    fresh = trained({**options, **in_memory, "output_dir": tmp_path / "b"}, family, encodes=True)
    assert differing(found, fresh) == []


def test_every_family_is_tried() -> None:
    assert set(ONE_OF_EACH) == set(with_scripts())


@pytest.fixture(scope="module")
def words(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = sd.make(tmp_path_factory.mktemp("model"))
    return argv({**model, "dataset_config": dataset})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_encoded_twice(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*words, "--cache_dir", str(tmp_path)]
    assert cache_latents.main(again) == 0
    assert "10 latents are needed, 0 of them are there" in capsys.readouterr().err
    before = files(tmp_path / "latents")
    monkeypatch.setattr("library.families.sd.model.StableDiffusion.load_vae", never)
    assert cache_latents.main([*again, "--skip_existing"]) == 0
    text = capsys.readouterr().err
    assert "10 latents are needed, 10 of them are there" in text and "always so" in text
    assert files(tmp_path / "latents") == before
    assert not (tmp_path / "texts").exists()


def test_processes_share_the_work(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each encodes the pictures that are its own, plain and mirrored."""
    left: list[int] = []
    monkeypatch.setattr("library.trainers.caching.shares_of", lambda folders: Shares(others=Share(len(left), 2)))

    def half(run: caching.CacheRun) -> None:
        cache_latents.fill(run)
        assert run.caches.latents is not None
        left.append(sum(count for count, _ in run.caches.latents.lacking(run.data.encoding_jobs()).values()))

    flags = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": False}
    for _ in range(2):
        assert caching.run([*words, "--cache_dir", str(tmp_path)], half, "x", "", **flags) == 0
    assert left == [4, 0]


def test_pictures_held_out_depend_on_the_seed(
    words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = [*words, "--cache_dir", str(tmp_path), "--validation_split", "0.4"]
    assert cache_latents.main(split) == 0
    assert "give the same --validation_seed here and in the training" in capsys.readouterr().err
    assert cache_latents.main([*split, "--seed", "1"]) == 0
    assert "validation_seed" not in capsys.readouterr().err


def test_control_images(words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ControlNet-LLLite, by the network module or by its own script."""
    pictures = dataset.parent / "p"
    data = write_dataset(tmp_path / "d.toml", subset(pictures, conditioning_data_dir=str(pictures)), **BUCKETS)
    words = [*words, "--dataset_config", str(data), "--cache_dir", str(tmp_path / "cache")]
    assert "conditioning_data_dir has no effect" in refused(capsys, *words)[0]
    assert cache_latents.main([*words, "--network_module", "networks.control_net_lllite"]) == 0
    assert "5 latents are needed, 0 of them are there" in capsys.readouterr().err
    assert cache_latents.main([*words, "--control_images"]) == 0
    assert "5 latents are needed, 5 of them are there" in capsys.readouterr().err


def test_every_option_of_a_training_is_taken() -> None:
    for method, family in SCRIPTS.values():
        taken = specs(group_types(caching.CachingOptions, caching.option_groups_of(family)))
        assert specs(option_groups(method, family)).keys() <= taken.keys()


def test_recipes_are_taken() -> None:
    """With what they say of learning, saving and logging."""
    recipes = [path for path in (ROOT / "configs").glob("*.toml") if path.stem.endswith(("_lora", "_full"))]
    assert len(recipes) >= 7
    for path in recipes:
        family = path.stem.rpartition("_")[0]
        found, resolved = caching.read_options(
            ["--architecture", family, "--config_file", str(path), "--pretrained_model_name_or_path", "x"],
            prog="x",
            description="",
        )
        assert found == family
        assert resolved.options.optimizer.learning_rate > 0


def test_as_a_script_from_any_folder(tmp_path: Path) -> None:
    for tool in ("cache_latents.py", "cache_text_encoder_outputs.py"):
        command = [sys.executable, "-P", str(ROOT / "tools" / tool), "--flux", "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--t5xxl" in done.stdout and "--architecture" in done.stdout and "--dataset_config" in done.stdout


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert cache_latents.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


def test_bad_input(words: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert refused(capsys, *words, *cache, "--sd", "--sdxl") == ["--sd and --sdxl: give one architecture"]
    [line] = refused(capsys, *words, *cache, "--architecture", "fulx")
    assert line.startswith("--architecture 'fulx' is not one of ") and line.endswith("Did you mean 'flux'?")
    lines = refused(capsys, *words, *cache, "--t5xxl", "t5.safetensors")
    assert lines[0].startswith("Unknown option --t5xxl") and "no architecture is given" in lines[1]
    assert len(refused(capsys, *words, *cache, "--sd", "--t5xxl", "t5.safetensors")) == 1
    assert "training script" in refused(capsys, *words, "--config_file", tmp_path / "x", "--output_config")[0]
    (tmp_path / "c.toml").write_text("flux = true\n")
    [line] = refused(capsys, *words, *cache, "--config_file", tmp_path / "c.toml")
    assert line == "the architecture cannot stand in --config_file: give it on the command line"

    gone = {"pretrained_model_name_or_path": tmp_path / "no.safetensors", "dataset_config": tmp_path / "no.toml"}
    lines = refused(capsys, *argv(gone), *cache)
    assert any("no.safetensors does not exist" in line for line in lines), lines
    assert any("no.toml does not exist" in line for line in lines), lines
    random = write_dataset(tmp_path / "r.toml", subset(dataset.parent / "p", random_crop=True), **BUCKETS)
    [line] = refused(capsys, *words, *cache, "--dataset_config", random)
    assert "random_crop" in line
    assert not (tmp_path / "cache" / "latents").exists()
