# SPDX-License-Identifier: Apache-2.0
"""What the pages and recipes say is true: commands run, options exist, links lead somewhere, lists are complete."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.cli import option_groups
from library.data.buckets import BucketManager
from library.data.config import key_specs
from library.data.records import BucketRules
from library.families.registry import FAMILIES, scripts, with_scripts
from library.optim.optimizers import OPTIMIZERS
from library.optim.schedulers import OTHER_NAMES, SCHEDULES
from library.options import read_toml, resolve, specs
from library.sampling.options import SAMPLER_NAMES
from library.sampling.prompts import INLINE
from library.trainers.options import NetworkTrainerOptions
from networks.lora import BUILDER
from tests.script_runner import ROOT, Ended, run_script
from tests.tiny import make_tiny_sd
from tests.trainers.helpers import argv, make_pictures, quick_previews
from tools import make_options_doc, make_readme_table
from tools.setup.commands import WORDS

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.md")),
    ]
)
GUIDE = (ROOT / "docs" / "train_network.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "start.py").read_text(encoding="utf-8")
OPTIONS = specs(option_groups("network", "sd"))
FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# Options of other programs, and the inline ones of preview prompts
FOREIGN = {
    "torch",
    "num_processes",
    "quiet",
    "logdir",
    "check",
    "name",
    "help",
    "local",
    *INLINE,
}  # local: of --local-dir


def fenced(text: str) -> list[str]:
    """The contents of the code blocks of a page, but for those of PowerShell, which say the same again."""
    return [block for kind, block in FENCE.findall(text) if kind != "powershell"]


def commands(text: str) -> list[list[str]]:
    """The commands in the code blocks of a page that start one of our scripts, as words."""
    found = []
    for block in fenced(text):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(("python ", "accelerate launch ")):
                found.append(shlex.split(line, comments=True))
    return found


def training(text: str) -> list[list[str]]:
    """The words after `train_network.py` of the training commands of a page."""
    return [words[words.index("train_network.py") + 1 :] for words in commands(text) if "train_network.py" in words]


# ---- options --------------------------------------------------------------------------------------------------------


def test_list_of_options_is_up_to_date() -> None:
    written = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert written == make_options_doc.text(), "run python tools/make_options_doc.py"
    assert all(f"| `--{name}` |" in written for name in OPTIONS)


def test_table_of_models_is_up_to_date() -> None:
    assert make_readme_table.with_table(README) == README, "run python tools/make_readme_table.py"
    shown = [word for sheet in with_scripts().values() for word in (sheet.page, *sheet.recipes.values())]
    assert all((ROOT / path).is_file() for path in (*shown, *scripts()))


@pytest.mark.parametrize("text", [README, GUIDE], ids=["README", "guide"])
def test_options_that_pages_name_exist(text: str) -> None:
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", text))
    wrong_on_purpose = {"learning_rat"}
    assert named and named - OPTIONS.keys() - FOREIGN - wrong_on_purpose == set()


@pytest.mark.parametrize(
    ("what", "names"),
    {
        "keys of a dataset file": key_specs(),
        "keys of --network_args": specs(BUILDER.arguments),
        "optimizers": OPTIMIZERS,
        "schedules": {**SCHEDULES, OTHER_NAMES[0]: None},
        "samplers": SAMPLER_NAMES,
        "options of the objective": [n for n, s in OPTIONS.items() if s.group in ("objective", "loss")],
        "options of the cache": [n for n, s in OPTIONS.items() if s.group == "cache"],
    }.items(),
)
def test_guide_is_complete(what: str, names: list[str]) -> None:
    code = re.findall(r"`([^`\n]+)`", GUIDE)
    words = {word.lstrip("-") for text in code for word in re.split(r"[\s,=]+", text)}
    assert [name for name in names if name not in words] == []


# ---- commands -------------------------------------------------------------------------------------------------------


def test_commands_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = training(README) + training(GUIDE)
    assert len(found) == 3
    for words in found:
        options = resolve(NetworkTrainerOptions, FAMILIES["sd"].option_groups, words, prog="train_network.py").options
        assert options.save.output_dir == "output"


def test_recipes_of_1024_let_wide_pictures_keep_their_area() -> None:
    found = 0
    for path in sorted((ROOT / "configs").rglob("*.toml")):
        table = read_toml(path, "recipe")
        values = {
            key: value for part in (table, *table.values()) if isinstance(part, dict) for key, value in part.items()
        }
        if values.get("enable_bucket") and values.get("resolution", 512) >= 1024:
            rules = BucketRules((1024, 1024), True, max_bucket_reso=values.get("max_bucket_reso", 1024))
            sizes = [BucketManager(rules).select(size).reso for size in ((4000, 3000), (1920, 1080), (1000, 2000))]
            assert all(width * height > 0.9 * 1024**2 for width, height in sizes), path
            found += 1
    assert found > 10


def test_the_two_commands_of_the_readme() -> None:
    words = [words[2] for words in commands(README) if words[:2] == ["python", "start.py"]]
    assert words == ["demo", "test"]
    assert {"setup", *words} <= set(WORDS)
    assert all(f"python start.py {word} " in START for word in WORDS)
    scripts = {word for page in (README, GUIDE) for words in commands(page) for word in words if word.endswith(".py")}
    assert all((ROOT / script).is_file() for script in scripts)
    assert "python start.py test" in (ROOT / ".ci" / "run").read_text().replace("python3", "python")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    make_tiny_sd(folder, layout="single")
    make_pictures(folder / "pictures" / "10_my character", 2)
    make_pictures(folder / "pictures" / "my_character", 2)
    for number, name in enumerate(("girls", "regularisation")):
        make_pictures(folder / "regular" / name, 1, first=5 + number)
    return folder


def run_small(words: list[str], place: Path, output: Path) -> Ended:
    """A command of a page with its files in `place`, on pictures of 64 x 64 and for two steps."""
    files = {
        "model.safetensors": str(place / "model.safetensors"),
        "pictures": str(place / "pictures"),
        "dataset.toml": str(place / "dataset.toml"),
        "output": str(output),
    }
    words = [files.get(word, word) for word in words]
    if importlib.util.find_spec("bitsandbytes") is None:  # there is none for macOS
        words = ["AdamW" if word.lower() == "adamw8bit" else word for word in words]
        words += ["--optimizer_type", "AdamW"] if "--config_file" in words else []
    if "--config_file" in words:
        (output / "previews").mkdir(parents=True, exist_ok=True)
        previews = quick_previews(output / "previews")
        words += [word for option, path in previews.items() for word in (f"--{option}", str(path))]
    words += ["--max_train_epochs", "0", "--max_train_steps", "2", "--max_data_loader_n_workers", "0"]
    if "--train_data_dir" in words:
        words += ["--resolution", "64", "--min_bucket_reso", "64"]
    return run_script(*words)


def smaller(text: str, place: Path) -> str:
    """A dataset file of a page with the pictures in `place` and at 64 x 64."""
    text = re.sub(r"(resolution|min_bucket_reso|max_bucket_reso) = \d+", r"\1 = 64", text)
    if "min_bucket_reso" not in text:
        text = text.replace("resolution = 64", "resolution = 64\nmin_bucket_reso = 64", 1)
    text = re.sub(r'"pictures/(girls|regularisation)"', f'"{place.as_posix()}/regular/\\1"', text)
    return text.replace('"pictures/', f'"{place.as_posix()}/pictures/')


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_command_of_the_readme_trains(place: Path, tmp_path: Path) -> None:
    (words,) = training(README)
    ended = run_small(words, place, tmp_path)
    assert ended.code == 0, ended.text
    said = metadata(tmp_path / "my_lora.safetensors")
    assert (said["ss_network_dim"], said["ss_steps"], said["ss_mixed_precision"]) == ("16", "2", "bf16")
    shutil.rmtree(place / "pictures" / "10_my character" / ".trainyard", ignore_errors=True)


def test_quick_start_trains(place: Path, tmp_path: Path) -> None:
    words, _ = training(GUIDE)
    ended = run_small(words, place, tmp_path)
    assert ended.code == 0, ended.text
    assert metadata(tmp_path / "my_character.safetensors")["ss_network_alpha"] == "8.0"


def test_full_example_trains(place: Path, tmp_path: Path) -> None:
    (table,) = [block for block in fenced(GUIDE) if block.startswith("[general]")]
    (place / "dataset.toml").write_text(smaller(table, place), encoding="utf-8")
    _, words = training(GUIDE)
    ended = run_small(words, place, tmp_path)
    assert ended.code == 0, ended.text
    said = metadata(tmp_path / "full_example.safetensors")
    assert "AdamW" in said["ss_optimizer"] and '"loraplus_lr_ratio": "4"' in said["ss_network_args"]
    with safe_open(tmp_path / "full_example.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(name.endswith(".dora_scale") for name in names)
    assert any("resnets" in name for name in names)
    assert (tmp_path / "full_example-state").is_dir()


def test_prompts_of_the_guide(place: Path, tmp_path: Path) -> None:
    from library.sampling.prompts import load_prompts

    (text,) = [block for block in fenced(GUIDE) if block.startswith("# comments")]
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    (prompt,) = load_prompts(tmp_path / "prompts.txt")
    assert (prompt.width, prompt.height, prompt.seed, prompt.sample_sampler) == (512, 768, 1, "euler_a")


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_recipes_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipes = sorted((ROOT / "configs").glob("*.toml"))
    assert len(recipes) >= 4
    for path in recipes:
        table = read_toml(path, "configs")
        if "datasets" in table:
            continue
        words = ["--config_file", str(path), "--pretrained_model_name_or_path", "m", "--output_dir", "o"]
        resolve(NetworkTrainerOptions, FAMILIES["sd"].option_groups, words, prog="test")


def test_recipe_of_a_dataset_trains(place: Path, tmp_path: Path) -> None:
    recipe = (ROOT / "configs" / "dataset_folder.toml").read_text(encoding="utf-8")
    table = tmp_path / "d.toml"
    table.write_text(smaller(recipe, place), encoding="utf-8")
    ended = run_script(
        "--config_file", "configs/sd_lora.toml", "--dataset_config", str(table), "--optimizer_type", "AdamW",
        "--pretrained_model_name_or_path", str(place / "model.safetensors"), "--output_dir", str(tmp_path / "out"),
        "--max_train_epochs", "0", "--max_train_steps", "1", "--max_data_loader_n_workers", "0",
        *argv(quick_previews(tmp_path)),
    )  # fmt: skip
    assert ended.code == 0, ended.text
    assert "2 pictures, 20 with repeats, 1 regularisation pictures used 20 times" in ended.text


def test_demo_shortened(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sks rocket on a blue background --w 64 --h 64 --s 1 --d 1\n")
    ended = run_script(
        "--config_file", "configs/demo.toml", "--output_dir", str(tmp_path), "--logging_dir", str(tmp_path / "logs"),
        "--max_train_steps", "1", "--sample_every_n_steps", "1", "--sample_prompts", str(prompts),
        "--cache_dir", str(tmp_path / "cache"),
    )  # fmt: skip
    assert ended.code == 0, ended.text
    assert (tmp_path / "rocket.safetensors").is_file()
    assert Image.open(tmp_path / "sample" / "rocket_before_after.png").size[0] > 64
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
