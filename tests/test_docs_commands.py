# SPDX-License-Identifier: Apache-2.0
"""Every command of every page: script, files and options exist, PowerShell says the same, and a newcomer's runs."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

from library.cli import METHODS
from library.families.registry import FAMILIES
from library.options import resolve
from tests.families import sdxl
from tests.script_runner import ROOT, run_script
from tests.test_docs import FENCE, PAGES, commands, fenced
from tests.trainers.helpers import make_pictures, quick_previews
from tools.make_memory_recipes import SPARE
from tools.make_options_doc import SCRIPTS

FIRST_LORA = ROOT / "docs" / "first_lora.md"
WITH_COMMANDS = [page for page in PAGES if "```" in page.read_text(encoding="utf-8")]
ACTIVATE = {"shell": "source .venv/bin/activate", "powershell": r".venv\Scripts\Activate.ps1"}
POWERSHELL_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""")
OF_EACH_SYSTEM = ROOT / "docs" / "install.md"  # has a section for Windows and one for Linux


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- PowerShell -----------------------------------------------------------------------------------------------------


def powershell_lines(block: str) -> list[list[str]]:
    """The commands of a block as words: a backtick joins lines, quotes group, a backslash is a letter like others."""
    lines = [re.sub(r"(?<!\S)#.*", "", line) for line in block.replace("`\n", " ").splitlines()]
    return [[re.sub("[\"']", "", word) for word in POWERSHELL_WORD.findall(line)] for line in lines if line.strip()]


def shell_lines(block: str) -> list[list[str]]:
    """The commands of a block for bash as words."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def test_words_of_powershell() -> None:
    block = 'python "my script.py" --a C:\\b `\n    --c \'d e\' f="g h"  # not read\n.venv\\Scripts\\Activate.ps1\n'
    assert powershell_lines(block) == [
        ["python", "my script.py", "--a", "C:\\b", "--c", "d e", "f=g h"],
        [".venv\\Scripts\\Activate.ps1"],
    ]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_powershell_says_the_same(page: Path) -> None:
    """What would fail in PowerShell (lines joined by a backslash, `source`) has its twin directly below."""
    blocks = list(FENCE.finditer(text_of(page)))
    twins = [index for index, found in enumerate(blocks) if found[1] == "powershell"]
    if page != OF_EACH_SYSTEM:
        needed = [
            i for i, found in enumerate(blocks) if found[1] != "powershell" and re.search(r"\\\n|^source ", found[2])
        ]
        assert [index + 1 for index in needed] == twins, (
            "a block for PowerShell is missing, or has nothing to stand below"
        )
        for index in needed:
            shell, twin = blocks[index], blocks[index + 1]
            assert text_of(page)[shell.end() : twin.start()] == "\n\nPowerShell:\n\n"
            said = [ACTIVATE["shell"].split() if words == [ACTIVATE["powershell"]] else words
                    for words in powershell_lines(twin[2])]  # fmt: skip
            assert said == shell_lines(shell[2])
    for index in twins:
        assert not re.search(r"\\$|` +$|^source ", blocks[index][2], flags=re.MULTILINE)


# ---- scripts, files, options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_scripts_and_recipes_exist(page: Path) -> None:
    words = {word for line in commands(text_of(page)) for word in line}
    named = {word for word in words if re.fullmatch(r"[\w/]+\.py|configs/[\w/]+\.\w+", word)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_training_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All options exist, have values of the right kind, and go together."""
    monkeypatch.chdir(ROOT)
    for line in commands(text_of(page)):
        script = next((word for word in line if word in SCRIPTS), None)
        if script is not None and "my_run.toml" not in line:  # a file of the reader's own
            method, family = SCRIPTS[script]
            words = line[line.index(script) + 1 :]
            resolve(METHODS[method][1], FAMILIES[family].option_groups, words, prog=script)


# ---- files from the hub ---------------------------------------------------------------------------------------------


def downloads(text: str) -> list[tuple[str, list[str]]]:
    """Repository and files (or patterns) of each `hf download` of a page; all go to `models`."""
    found = []
    for block in fenced(text):
        for line in block.splitlines():
            if line.startswith("hf download "):
                *words, option, folder = shlex.split(line)
                assert (option, folder) == ("--local-dir", "models"), line
                found.append((words[2], [word for word in words[3:] if word != "--include"]))
    return found


DOWNLOADED = [f"models/{file}" for page in PAGES for _, files in downloads(text_of(page)) for file in files]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_downloads_are_what_commands_name(page: Path) -> None:
    text = text_of(page)
    for repository, files in downloads(text):
        assert f"[{repository}](https://huggingface.co/{repository})" in text or page == FIRST_LORA
        assert all("*" in file or f"`{Path(file).name}`" in text or page == FIRST_LORA for file in files)
    named = {word for line in commands(text) for word in line if word.startswith("models/")}
    missing = [name for name in named if not any(fnmatch.fnmatch(name, pattern) for pattern in DOWNLOADED)]
    assert missing == []


def test_every_family_says_where_its_files_come_from() -> None:
    for name in ("train_network", "sdxl", "flux", "flux2", "sd3", "lumina", "anima", "sana", "hunyuan_image"):
        section = text_of(ROOT / "docs" / f"{name}.md").partition("\n## Files you need\n")[2].partition("\n## ")[0]
        assert "licence" in section and downloads(section) and "`--pretrained_model_name_or_path`" in section, name


# ---- the first LoRA -------------------------------------------------------------------------------------------------


def test_memory_of_each_card_is_that_of_its_recipe() -> None:
    rows = re.findall(r"^\| (\d+) GB \| .* \| `([\d.]+)GB` \|(.*)\|$", text_of(FIRST_LORA), flags=re.MULTILINE)
    assert [int(card) for card, _, _ in rows] == [8, 12, 16, 24]
    for card, budget, cells in rows:
        assert float(budget) == int(card) - SPARE / (1 << 30)
        recipes = re.findall(r"\[([\d.]+)\]\(\.\./(configs/memory/\w+_(\d+)gb\.toml)\)", cells)
        assert recipes and {made_for for _, _, made_for in recipes} == {card}
        for peak, recipe, _ in recipes:
            said = re.search(r"Predicted peak ([\d.]+) GB", (ROOT / recipe).read_text(encoding="utf-8"))
            assert said is not None and f"{float(said[1]):.1f}" == peak, recipe


RECOMPUTED = {"sdxl": ["Stable Diffusion XL"], "flux": ["FLUX.1 dev", "Chroma"],
              "sd3": ["SD3.5 medium", "SD3.5 large"], "lumina": ["Lumina-Image 2.0"],
              "anima": ["Anima"], "sana": ["SANA 1.6B"],
              "flux2": ["FLUX.2 klein base 4B", "FLUX.2 klein base 9B"],
              "hunyuan_image": ["HunyuanImage-2.1"]}  # fmt: skip


@pytest.mark.parametrize("name", RECOMPUTED)
def test_memory_that_a_recipe_takes(name: str) -> None:
    """A family's page says of its recipe, which recomputes all, what the table of savings says."""
    found = re.search(r"^The recipe takes (.*?)\. On a card", text_of(ROOT / "docs" / f"{name}.md"), flags=re.MULTILINE)
    assert found is not None
    savings = text_of(ROOT / "docs" / "memory.md").partition("<!-- savings")[2]
    rows = [
        next(row for row in savings.splitlines() if row.startswith(f"| LoRA for {title} |"))
        for title in RECOMPUTED[name]
    ]
    assert re.findall(r"([\d.]+) GB", found[1]) == [row.split("|")[4].strip() for row in rows]


def test_first_lora_trains(tmp_path: Path) -> None:
    """The folder, the prompts and the command of the page, with a tiny model and small pictures."""
    text = text_of(FIRST_LORA)
    (line,) = [words for words in commands(text) if "sdxl_train_network.py" in words]
    (tree,) = [block for block in fenced(text) if block.startswith("pictures/")]
    folder = make_pictures(tmp_path / "pictures" / tree.splitlines()[1].strip(" /"), 1)
    (prompts,) = [block for block in fenced(text) if block.startswith("a photo of sks dog on a beach --d")]
    smaller = [f"{prompt} --w 64 --h 64 --s 1" for prompt in prompts.splitlines()]
    (tmp_path / "prompts.txt").write_text("\n".join(smaller), encoding="utf-8")
    model = sdxl.make(tmp_path / "model")["pretrained_model_name_or_path"]
    own = {"models/sd_xl_base_1.0.safetensors": model, "pictures": folder.parent, "output": tmp_path / "output",
           "prompts.txt": tmp_path / "prompts.txt"}  # fmt: skip
    words = [str(own.get(word, word)) for word in line[line.index("sdxl_train_network.py") + 1 :]]
    ended = run_script(
        *words, "--optimizer_type", "AdamW", "--max_train_epochs", "1", "--resolution", "64", "--min_bucket_reso", "64",
        "--max_data_loader_n_workers", "0", "--logging_dir", str(quick_previews(tmp_path)["logging_dir"]),
        script="sdxl_train_network.py",
    )  # fmt: skip
    assert ended.code == 0, ended.text
    assert "GB predicted of 11.25 GB" in ended.text
    assert (tmp_path / "output" / "sks_dog.safetensors").is_file()
    assert len(list((tmp_path / "output" / "sample").glob("sks_dog_*.png"))) == 2 * len(smaller) + 1
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
