# SPDX-License-Identifier: Apache-2.0
"""Writes configs/memory/*.toml and the tables of docs/memory.md: what the planner chooses for cards of several sizes.

    OMP_NUM_THREADS=1 python tools/make_memory_recipes.py [--only flux_lora,sdxl_full]

A recipe is that of configs/ with the memory options that the planner chose for it, from the shapes of the full-size
model: files with a header and no numbers, no GPU. A few minutes.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import markdown  # noqa: E402
from benchmarks.cpu.audit import MODELS  # noqa: E402
from benchmarks.gpu.models import write_model  # noqa: E402
from library.cli import METHODS, load_attribute  # noqa: E402
from library.families.recipes import Edits, MemoryRecipe  # noqa: E402
from library.families.registry import FAMILIES, open_family  # noqa: E402
from library.io.tensor_file import data_bytes, header_bytes  # noqa: E402
from library.memory.choice import MemoryChoice  # noqa: E402
from library.memory.estimate import Prediction, predict  # noqa: E402
from library.memory.options import GIB  # noqa: E402
from library.optim.optimizers import choose_optimizer  # noqa: E402
from library.options import resolve  # noqa: E402
from library.planner.memory_plan import MemoryPlan, Option, plan_memory  # noqa: E402
from library.trainers.stages import as_planned  # noqa: E402

CARDS = (24, 16, 12, 8)  # GB
SPARE = 768 << 20  # bytes of a card that no recipe takes: a screen, gaps between tensors, what kernels need
# option of a large text encoder -> its name, and its bytes in bf16 with what it takes to encode captions
LARGE_ENCODERS = {"--t5xxl": ("T5", 10 << 30), "--text_encoder": ("Qwen2.5-VL", 14 << 30)}
ENCODER_NOTE = "# {} is too large for this card: encode the captions on the CPU before, see docs/memory.md.\n"
FOLDER = ROOT / "configs" / "memory"
PAGE = ROOT / "docs" / "memory.md"
SECTIONS = {  # where a key goes that the recipe does not have; all others: "training"
    "train_batch_size": "data", "cache_text_encoder_outputs": "data", "cache_text_encoder_outputs_to_disk": "data",
}  # fmt: skip


RECIPES: dict[str, MemoryRecipe] = {
    name: recipe for sheet in FAMILIES.values() for name, recipe in sheet.memory_recipes.items()
}


# ---- text of a recipe -----------------------------------------------------------------------------------------------


def with_values(text: str, edits: Edits) -> str:
    """A recipe with other values of some keys."""
    for key, value in edits.items():
        line = "" if value is None else f"{key} = {value}\n"
        text, count = re.subn(rf"^{key} = .*\n", line, text, flags=re.MULTILINE)
        if not count:
            head = rf"^(\[{SECTIONS.get(key, 'training')}\].*\n)"
            text = re.sub(head, rf"\g<1>{line}", text, count=1, flags=re.MULTILINE)
    return text


def recipe_text(recipe: MemoryRecipe, way: Edits, name: str, card: int) -> str:
    """The recipe of configs/ for this card, without any option of memory."""
    text = (ROOT / "configs" / f"{recipe.base}.toml").read_text(encoding="utf-8")
    rest = text.partition("\n")[2]
    for before, after in {f"configs/{recipe.base}.toml": f"configs/memory/{name}.toml", **recipe.command}.items():
        rest = rest.replace(before, after)
    rest = re.sub(r"^# For Chroma add .*? (?=The command line)", "# ", rest, flags=re.MULTILINE)
    for option, (encoder, size) in LARGE_ENCODERS.items():
        if f"{option} " in rest and card * GIB - SPARE < size:
            note = ENCODER_NOTE.format(encoder)
            rest = re.sub(r"^(# .*The command line wins)", rf"{note}\1", rest, count=1, flags=re.MULTILINE)
    return f"# {recipe.title}: for a card of {card} GB.\n" + with_values(
        rest, {**recipe.edits, **way, "gradient_checkpointing": None}
    )


def memory_section(option: Option) -> str:
    """The part of the recipe that the planner wrote."""
    flags = [flag[2:].partition(" ") for flag in option.choice.flags()]
    lines = [f"{name} = {_toml(value)}" for name, _, value in flags]
    needs = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts(option.needs).items() if size >= GIB // 200)
    return "\n".join(
        [
            "",
            "[memory]                         # chosen by tools/make_memory_recipes.py: see docs/memory.md",
            *(lines or ["# nothing is needed"]),
            f"# Predicted peak {option.needs.peak / GIB:.2f} GB: {needs}.",
            "# From the shapes of model and batch; not measured on a card yet.",
            "",
        ]
    )


def _toml(value: str) -> str:
    if not value:
        return "true"
    return value if re.fullmatch(r"[0-9.]+", value) else f'"{value}"'


def parts(needs: Prediction) -> dict[str, int]:
    return {
        "weights": needs.weights, "gradients": needs.gradients, "optimizer": needs.optimizer,
        "activations": needs.activations, "buffers of moved weights": needs.ring, "CUDA and kernels": needs.workspace,
    }  # fmt: skip


# ---- the planner ----------------------------------------------------------------------------------------------------


def plan_of(recipe: MemoryRecipe, text: str, models: Path) -> MemoryPlan:
    """The plan of a run of the recipe, as for a card."""
    architecture = MODELS[recipe.model]
    entry, (path, options_type) = FAMILIES[architecture.family], METHODS["finetune" if recipe.full else "network"]
    file = models / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    folder = model_folder(recipe.model, models)
    words = ["--config_file", file, "--pretrained_model_name_or_path", folder, "--output_dir", models / "out",
             "--train_data_dir", folder, "--plan"]  # fmt: skip
    options = resolve(options_type, entry.option_groups, [str(word) for word in words], prog="recipes").options
    method = load_attribute(path)(open_family(entry, options.model), options)
    size = max(options.data.resolution) if isinstance(options.data.resolution, tuple) else options.data.resolution
    batch: Any = SimpleNamespace(bucket=(size, size), samples=range(options.data.train_batch_size))
    optimizer = choose_optimizer(options.optimizer)
    planned = as_planned(method, method.learning(), optimizer, batch, device=torch.device("cpu"))
    return plan_memory(replace(planned, dtype=torch.bfloat16, choice=MemoryChoice()))


def model_folder(name: str, models: Path) -> Path:
    """The full-size model. Stable Diffusion's text encoder, which learns, too; that of others does not run."""
    folder = models / name
    if not folder.exists():
        write_model(MODELS[name], folder, tiny=False)
        if name == "sd15":
            _write_clip_l(folder / "text_encoder")
    return folder


def _write_clip_l(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    config = CLIPTextConfig(vocab_size=49408, projection_dim=768, **sizes)
    with torch.device("meta"):
        module: Any = CLIPTextModel(config)
    config.save_pretrained(folder)
    tensors = module.to(torch.bfloat16).state_dict()
    header = header_bytes(tensors, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data_bytes(tensors))


@dataclass(frozen=True)
class Chosen:
    """What a card gets: the text of the recipe and the way to run it; or the smallest that was found."""

    way: Edits
    option: Option
    fits: bool


def choose(recipe: MemoryRecipe, plans: Mapping[int, MemoryPlan], card: int) -> Chosen:
    """plans: one for each of the recipe's ways."""
    for number, plan in plans.items():
        option = plan.within(card * GIB - SPARE)
        if option is not None:
            return Chosen(recipe.ways[number], option, fits=True)
    number, plan = min(plans.items(), key=lambda pair: pair[1].smallest.needs.peak)
    return Chosen(recipe.ways[number], plan.smallest, fits=False)


# ---- tables ---------------------------------------------------------------------------------------------------------

RECOMPUTED = {"activation_budget": 0.0}
COLUMNS: dict[str, dict[str, Any]] = {
    "nothing": {}, "half recomputed": {"activation_budget": 0.5}, "recomputed": RECOMPUTED,
    "+ offload": {**RECOMPUTED, "offload": True}, "+ hoisted": {**RECOMPUTED, "hoist": True},
    "+ half swapped": {**RECOMPUTED, "swap": 0.5}, "+ all swapped": {**RECOMPUTED, "swap": 1.0},
    "+ fp8": {**RECOMPUTED, "storage": "fp8"}, "+ nf4": {**RECOMPUTED, "storage": "nf4"},
}  # fmt: skip
SAVINGS_HEAD = ("", *COLUMNS)
CHOICES_HEAD = ("", *(f"{card} GB" for card in CARDS))


def savings_row(recipe: MemoryRecipe, plan: MemoryPlan) -> tuple[str, ...]:
    """Peaks in GB with each way of saving memory."""
    return (recipe.title, *(_cell(plan, dict(values)) for values in COLUMNS.values()))


def _cell(plan: MemoryPlan, values: dict[str, Any]) -> str:
    """Empty where the model or the method cannot do it."""
    weights, most = plan.case.weights, plan.case.most_swapped
    may_swap = any(option.choice.blocks_to_swap for option in plan.options)
    possible = {
        "storage": values.get("storage") in (None, *weights.blocks),
        "hoist": bool(weights.modulations),
        "swap": may_swap,
    }
    if not all(possible.get(key, True) for key in values):
        return ""
    count = round(values.pop("swap", 0) * most)
    needs = predict(plan.case, MemoryChoice(blocks_to_swap=count, **values))
    return f"{needs.peak / GIB:.1f}"


def choice_cell(name: str, card: int, chosen: Chosen) -> str:
    peak = f"{round(chosen.option.needs.peak / GIB, 2):.1f}"  # as the recipe says it
    if not chosen.fits:
        return f"does not fit: {peak} is the least"
    return f"[{peak}](../configs/memory/{name}_{card}gb.toml) `{chosen.option.flags}`"


def put_between(page: str, mark: str, table: str) -> str:
    """The page with a new table between the comments `mark` and `end of mark`."""
    pattern = rf"(<!-- {mark}[^\n]*-->\n).*?(<!-- end of {mark} -->)"
    return re.sub(pattern, lambda found: found[1] + table.strip() + "\n" + found[2], page, flags=re.DOTALL)


# ---- all of it ------------------------------------------------------------------------------------------------------


def make(name: str, recipe: MemoryRecipe, models: Path) -> tuple[dict[int, Chosen], tuple[str, ...]]:
    """Writes the recipes; returns what was chosen by card, and the row of the table of savings."""
    plans = {
        number: plan_of(recipe, recipe_text(recipe, way, name, CARDS[0]), models)
        for number, way in enumerate(recipe.ways)
    }
    found = {card: choose(recipe, plans, card) for card in CARDS}
    for card, chosen in found.items():
        file = FOLDER / f"{name}_{card}gb.toml"
        if chosen.fits:
            text = recipe_text(recipe, chosen.way, file.stem, card)
            file.write_text(text.rstrip() + "\n" + memory_section(chosen.option), encoding="utf-8")
        else:
            file.unlink(missing_ok=True)
    return found, savings_row(recipe, plans[0])


def rows(only: str | None) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    wanted = only.split(",") if only else list(RECIPES)
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            found, savings = make(name, RECIPES[name], Path(folder))
            choices = (RECIPES[name].title, *(choice_cell(name, card, chosen) for card, chosen in found.items()))
            print("\n".join(choices), flush=True)
            print(" ".join(savings), flush=True)
            yield choices, savings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="some of " + ", ".join(RECIPES) + "; the page then stays as it is")
    only = parser.parse_args().only
    FOLDER.mkdir(exist_ok=True)
    choices, savings = zip(*rows(only), strict=True)
    if only is None:
        page = PAGE.read_text(encoding="utf-8")
        page = put_between(page, "recipes", markdown(CHOICES_HEAD, choices))
        PAGE.write_text(put_between(page, "savings", markdown(SAVINGS_HEAD, savings)), encoding="utf-8")


if __name__ == "__main__":
    main()
