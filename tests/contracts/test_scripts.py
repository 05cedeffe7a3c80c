# SPDX-License-Identifier: Apache-2.0
"""Every training script as a user runs it: its recipe, its mistakes, and its process killed in the middle."""

from __future__ import annotations

import functools
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.io.state import load_state, newest_state
from tests.families import CASES, anima, flux, flux2, hunyuan_image, lumina, sana, sd, sd3, sdxl
from tests.script_runner import ROOT, run_script
from tests.trainers import child
from tests.trainers.helpers import argv, differing, make_pictures, quick_previews, subset, write_dataset
from tools.make_options_doc import SCRIPTS

PRECIOUS = b"a good file of an earlier run"
RECIPES = {
    "sd_lora": ("train_network.py", "sd1"),
    "sd_full": ("fine_tune.py", "sd1"),
    "dreambooth": ("train_db.py", "sd1"),
    "sd_textual_inversion": ("train_textual_inversion.py", "sd1"),
    "sdxl_lora": ("sdxl_train_network.py", "sdxl"),
    "sdxl_full": ("sdxl_train.py", "sdxl"),
    "sdxl_control_net_lllite": ("sdxl_train_control_net_lllite.py", "sdxl"),
    "flux_lora": ("flux_train_network.py", "flux"),
    "flux_full": ("flux_train.py", "flux"),
    "sd3_lora": ("sd3_train_network.py", "sd35"),
    "sd3_full": ("sd3_train.py", "sd35"),
    "flux2_lora": ("flux2_train_network.py", "flux2"),
    "flux2_full": ("flux2_train.py", "flux2"),
    "lumina_lora": ("lumina_train_network.py", "lumina"),
    "lumina_full": ("lumina_train.py", "lumina"),
    "anima_lora": ("anima_train_network.py", "anima"),
    "anima_full": ("anima_train.py", "anima"),
    "sana_lora": ("sana_train_network.py", "sana"),
    "sana_full": ("sana_train.py", "sana"),
    "hunyuan_image_lora": ("hunyuan_image_train_network.py", "hunyuan_image"),
    "hunyuan_image_full": ("hunyuan_image_train.py", "hunyuan_image"),
}
# What a script needs besides a model and pictures
WORD = {"token_string": "zapcat", "use_object_template": True}
NEEDS: dict[str, dict[str, Any]] = {"train_textual_inversion.py": WORD, "sdxl_train_textual_inversion.py": WORD}
SAME_RECIPE = {"sdxl_train_textual_inversion.py"}  # runs with that of another script
# (script, case): every script with every case of its family
RUNS = [
    (script, name)
    for script, (method, family) in SCRIPTS.items()
    for name, case in CASES.items()
    if case.family == family
]
VARIANTS = (
    "sd2 v",
    "sdxl v",
    "lumina system prompt",
    "flux2 dev",
    "hunyuan_image distilled",
)  # denoisers that other cases have
# every architecture with LoRA, and each other script once
KILLED = [
    run
    for run in RUNS
    if (SCRIPTS[run[0]][0] == "network" and run[1] not in VARIANTS) or run == next(r for r in RUNS if r[0] == run[0])
]


@dataclass(frozen=True)
class Ground:
    """Tiny models by case, and a dataset of three batches an epoch."""

    models: dict[str, dict[str, Any]]
    datasets: dict[bool, Path]  # with control images or without

    def options(self, script: str, case: str) -> dict[str, Any]:
        """Of a good run, as far as models and data go."""
        data = self.datasets["control_net" in script]
        return {**self.models[case], **NEEDS.get(script, {}), "dataset_config": data}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("scripts")
    pictures = make_pictures(folder / "pictures", 5)
    controls = make_pictures(folder / "controls", 5)
    plain = write_dataset(folder / "plain.toml", subset(pictures))
    controlled = write_dataset(folder / "controlled.toml", subset(pictures, conditioning_data_dir=str(controls)))
    models = {name: {**case.make(folder / f"m{i}"), **case.options} for i, (name, case) in enumerate(CASES.items())}
    yield Ground(models, {False: plain, True: controlled})


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_every_recipe_is_run() -> None:
    recipes = {path.stem for path in (ROOT / "configs").glob("*.toml")} - {
        "demo", "demo_dataset", "dataset_folder", "domain_stage1", "domain_stage2_edit", "domain_pairs",
    }  # fmt: skip
    assert recipes == set(RECIPES)
    assert {script for script, _ in RECIPES.values()} | SAME_RECIPE == set(SCRIPTS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name: str, ground: Ground, tmp_path: Path) -> None:
    """As it is, but for the paths, the length of the run and an optimizer that needs a GPU."""
    script, case = RECIPES[name]
    own = {
        "output_dir": tmp_path, "optimizer_type": "AdamW", "optimizer_args": [],
        "max_train_epochs": 0, "max_train_steps": 1, "max_data_loader_n_workers": 0, "cache_dir": tmp_path / "cache",
        "min_bucket_reso": 64, "max_bucket_reso": 64, **quick_previews(tmp_path),
    }  # fmt: skip
    if "control_net" in name:  # previews of it need a control image
        del own["sample_prompts"]
    words = argv({"config_file": f"configs/{name}.toml", **ground.options(script, case), **own})
    ended = run_script(*words, "--optimizer_args", script=script)
    assert ended.code == 0, ended.text
    assert load_file(next(tmp_path.glob("*.safetensors")))
    assert bool(list((tmp_path / "sample").glob("*.png"))) is ("sample_prompts" in own)
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert "has no effect" not in ended.text and "ignored" not in ended.text


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]} {run[1]}")
def base(request: pytest.FixtureRequest, ground: Ground, tmp_path: Path) -> tuple[str, str, dict[str, Any]]:
    """Script, case and the options of a good run. The folder of the output holds a file that must stay as it is."""
    script, name = request.param
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.safetensors").write_bytes(PRECIOUS)
    own = {"output_dir": tmp_path / "out", "output_name": "x", "max_train_steps": 2, "save_model_as": "safetensors"}
    return script, name, {**ground.options(script, name), **own}


def refused(script: str, values: dict[str, Any], *words: str) -> list[str]:
    """The lines with which the script refuses these options."""
    ended = run_script(*argv(values), *words, script=script)
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text
    output = Path(values["output_dir"])
    assert [path.name for path in output.iterdir()] == ["x.safetensors"]
    assert (output / "x.safetensors").read_bytes() == PRECIOUS
    assert ended.errors, ended.text
    return ended.errors


def test_mistakes_are_all_told_at_once(base: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    script, _, values = base
    lines = refused(script, values, "--learning_rat", "3", "--max_train_steps", "ten", "--mixed_precision", "bf61")
    assert lines[0] == "Unknown option --learning_rat. Did you mean --learning_rate?"
    assert "--max_train_steps expects a whole number, got 'ten'" in lines and len(lines) == 3

    lines = refused(script, {**values, "pretrained_model_name_or_path": tmp_path / "gone.safetensors",
                             "dataset_config": tmp_path / "gone.toml"})  # fmt: skip
    assert any("gone.safetensors" in line for line in lines) and any("gone.toml" in line for line in lines)


def test_models_of_other_architectures_and_broken_ones(
    base: tuple[str, str, dict[str, Any]], ground: Ground, tmp_path: Path
) -> None:
    script, name, values = base
    family = CASES[name].family
    is_first = (script, name) == next(run for run in RUNS if run[0] == script)
    others = [other for other, case in CASES.items() if case.family != family]
    for other in others if is_first else others[:1]:
        foreign = ground.models[other]["pretrained_model_name_or_path"]
        lines = refused(script, {**values, "pretrained_model_name_or_path": foreign})
        assert any(str(foreign) in line for line in lines), lines

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((1000).to_bytes(8, "little") + b'{"a"')
    lines = refused(script, {**values, "pretrained_model_name_or_path": broken})
    assert any(str(broken) in line and "cut short" in line for line in lines), lines

    if is_first:
        model, lost = with_a_hole(values["pretrained_model_name_or_path"], tmp_path)
        gone = tmp_path / "gone.toml"
        lines = refused(script, {**values, "pretrained_model_name_or_path": model, "dataset_config": gone})
        assert any(lost in line for line in lines) and any(str(gone) in line for line in lines), lines


def with_a_hole(model: Path, folder: Path) -> tuple[Path, str]:
    """A copy of a model that lacks one weight of the denoiser's last block, and the name of that weight."""
    place = Path(shutil.copytree(model if model.is_dir() else model.parent, folder / "hole"))
    denoisers = [path for part in ("unet", "transformer") for path in (place / part).glob("*.safetensors")]
    file = denoisers[0] if model.is_dir() else place / model.name
    tensors = load_file(file)
    lost = max(name for name in tensors if "blocks" in name or name.startswith("layers."))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    return (place if model.is_dir() else file), lost


# ---- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", KILLED, indirect=True, ids=lambda run: f"{run[0]} {run[1]}")
def test_killed_in_the_middle(base: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    """SIGKILL after the second save: what is there is whole, and the next process ends with the very same weights."""
    script, _, values = base
    method, family = SCRIPTS[script]
    values = {
        **values, "seed": 7, "save_state": True, "max_train_steps": 8, "learning_rate": 1e-3,
        "max_data_loader_n_workers": 0, "network_dim": 4 if method == "network" else None,
    }  # fmt: skip
    output = tmp_path / "output.txt"
    whole = child.start(child.script, {**values, "output_dir": tmp_path / "whole"}, output, method, family)
    assert child.exit_code(whole) == 0, output.read_text(encoding="utf-8")[-3000:]

    folder = tmp_path / "killed"
    values = {**values, "output_dir": folder, "save_every_n_steps": 1}
    process = child.start(child.script, values, output, method, family)
    child.wait_until(lambda: len(child.states(folder)) > 1, process, output)
    time.sleep(random.Random(script).uniform(0, 0.05))
    process.kill()
    assert child.exit_code(process) == -signal.SIGKILL
    for path in folder.glob("[!.]*.safetensors"):
        with safe_open(path, "pt") as file:
            assert list(file.keys())
    state = newest_state(folder, "x")
    assert state is not None and load_state(state).step >= 2

    more = {"resume": state, "save_every_n_steps": None}
    again = child.start(child.script, {**values, **more}, output, method, family)
    assert child.exit_code(again) == 0, output.read_text(encoding="utf-8")[-3000:]
    assert differing(load_file(folder / "x.safetensors"), load_file(tmp_path / "whole" / "x.safetensors")) == []


# ---- input forms ----------------------------------------------------------------------------------------------------

# family -> its maker, and the forms in which people have such models
FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sd": (sd.make, ("diffusers", "single")),
    "sdxl": (sdxl.make, ("diffusers", "single")),
    "flux": (flux.make, ("diffusers", "files", "comfy", "parts")),
    "sd3": (sd3.make, ("diffusers", "single", "files")),
    "flux2": (flux2.make, ("diffusers", "whole", "comfy")),
    "lumina": (lumina.make, ("diffusers", "whole", "files")),
    "anima": (anima.make, ("diffusers", "files", "parts", "adapter")),
    "sana": (sana.make, ("diffusers", "files", "plain")),
    "hunyuan_image": (hunyuan_image.make, ("diffusers", "comfy", "files")),
}
OPTIONS_OF_FAMILY = {"flux": flux.CASES["flux"].options}


@pytest.fixture(scope="module")
def model_in_form(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """Family and form -> the options that name a tiny model; made once."""

    @functools.cache
    def make(family: str, form: str) -> dict[str, Any]:
        return FORMS[family][0](tmp_path_factory.mktemp("form"), layout=form)

    return make


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_input_form_trains_the_same(
    script: str, ground: Ground, model_in_form: Callable[[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    """The same weights in each form of file or folder: one step leads to the same result."""
    method, family = SCRIPTS[script]
    forms = FORMS[family][1]
    results = []
    for form in forms:
        own = {
            **model_in_form(family, form), **OPTIONS_OF_FAMILY.get(family, {}), **NEEDS.get(script, {}),
            "dataset_config": ground.datasets["control_net" in script], "output_dir": tmp_path / f"{form} out",
            "output_name": "x", "max_train_steps": 1, "seed": 7, "optimizer_type": "SGD", "learning_rate": 1e-2,
            "max_data_loader_n_workers": 0, "network_dim": 4 if method == "network" else None,
            "save_model_as": "safetensors",
        }  # fmt: skip
        ended = run_script(*argv(own), script=script)
        assert ended.code == 0, (form, ended.text)
        results.append(load_file(tmp_path / f"{form} out" / "x.safetensors"))
    first = results[0]
    for form, other in zip(forms[1:], results[1:]):
        both = first.keys() & other.keys()  # a source may have what no other form has
        assert len(both) >= 0.9 * max(len(first), len(other)), form
        assert [name for name in both if not torch.allclose(first[name], other[name], rtol=1e-4, atol=1e-6)] == [], form
