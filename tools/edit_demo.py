# SPDX-License-Identifier: Apache-2.0
"""Train the two stages of docs/domain_training.md on the built-in model, and show what its edits are worth.

    python tools/edit_demo.py

Draws pairs of pictures, trains a LoRA of the domain (configs/domain_stage1.toml), and on top of it one that makes
things red (configs/domain_stage2_edit.toml). Then it edits pictures of things that were in no pair, and scores them
without a learned model (tools/base_model/score.py). On two cores of a CPU it takes ten minutes.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script, from any folder
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from library.families.registry import FAMILIES, open_family  # noqa: E402
from networks.lora import create_network_from_weights  # noqa: E402
from tools.base_model.draw import COLOURS, PICTURE_SIZE, RGB, THINGS, Canvas, Scene, draw_scene  # noqa: E402
from tools.base_model.score import BACKGROUND_TOLERANCE, ScoredPrompt, known_prompts, known_report, score  # noqa: E402

MODEL = ROOT / "examples" / "base_model"
INSTRUCTION, COLOUR = "make it red", "red"
HELD_OUT = ("star", "heart")  # in no pair
PAIR_SEED = 21
TEXT_SCALE, IMAGE_SCALE, STEPS, BATCH = 4.0, 1.5, 20, 16


@dataclass(frozen=True)
class Edit:
    """A picture to edit, and what must stay of it."""

    thing: str
    background: str
    picture: Image.Image


# ---- pictures -------------------------------------------------------------------------------------------------------


def scenes(things: Sequence[str], count: int, rng: random.Random) -> list[Scene]:
    """Things of every other colour on backgrounds that are not red, evenly."""
    names = [name for name in COLOURS if name != COLOUR]
    found = []
    for index in range(count):
        thing, colour = things[index % len(things)], names[index // len(things) // 2 % len(names)]
        background = rng.choice([name for name in names if name != colour])
        centre = (0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.06, 0.06))
        found.append(Scene(thing, colour, background, centre, rng.uniform(0.27, 0.34), INSTRUCTION))
    return found


def random_shape(scene: Scene, colour: RGB, rng: random.Random) -> Image.Image:
    """A shape with three to nine corners at random in place of the scene's thing: any shape can be recoloured."""
    corners = rng.randint(3, 9)
    radii = [rng.uniform(0.4, 1.1) for _ in range(corners)]
    angles = [2 * math.pi * (corner + rng.random() / 2) / corners for corner in range(corners)]
    canvas = Canvas(PICTURE_SIZE, COLOURS[scene.background], scene.centre, scene.radius)
    canvas.polygon([(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)], colour)
    return canvas.finish()


def write_pairs(folder: Path, count: int) -> None:
    """Draw `before/NNN.png`, `after/NNN.png` (the same picture, the thing red) and `after/NNN.txt`.

    Every second picture shows a random shape.
    """
    for name in ("before", "after"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    things = [thing for thing in THINGS if thing not in HELD_OUT]
    for index, scene in enumerate(scenes(things, count, random.Random(PAIR_SEED))):
        for name, colour in (("before", scene.colour), ("after", COLOUR)):
            rng = random.Random(index)
            if index // len(things) % 2:
                picture = random_shape(scene, COLOURS[colour], rng)
            else:
                picture = draw_scene(replace(scene, colour=colour), rng)
            picture.save(folder / name / f"{index:03d}.png")
        (folder / "after" / f"{index:03d}.txt").write_text(f"{INSTRUCTION}\n", encoding="utf-8")


def held_out_edits(count: int) -> list[Edit]:
    """Pictures of things that no pair shows."""
    rng = random.Random(PAIR_SEED + 1)
    return [Edit(s.thing, s.background, draw_scene(s, rng)) for s in scenes(HELD_OUT, count, rng)]


# ---- training and editing -------------------------------------------------------------------------------------------


def train(recipe: str, *words: str) -> None:
    """Run a recipe as a user does. Raises CalledProcessError."""
    command = [sys.executable, "train_network.py", "--config_file", f"configs/{recipe}.toml", *words]
    subprocess.run(command, cwd=ROOT, check=True)


def load_editor(adapters: Sequence[Path]) -> Any:
    """diffusers' own pipeline for edits, with the built-in model and these LoRAs in it."""
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline
    from transformers import CLIPTokenizer

    sheet = FAMILIES["sd"]
    options = sheet.option_groups["model"](pretrained_model_name_or_path=str(MODEL), task="edit")
    family = open_family(sheet, options)
    unet, vae = family.load_denoiser(torch.float32, "cpu"), family.load_vae(torch.float32, "cpu")
    encoder = family.load_text_encoder("clip", torch.float32, "cpu")
    for file in adapters:
        network, _ = create_network_from_weights(1.0, file, vae, encoder, unet, for_inference=True)
        network.merge_into()
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=encoder, unet=unet, tokenizer=CLIPTokenizer.from_pretrained(MODEL / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(MODEL / "scheduler"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edited(
    pipeline: Any, texts: Sequence[str], pictures: Sequence[Image.Image] | None, *, seed: int, steps: int = STEPS
) -> list[Image.Image]:
    """The pictures that the pipeline makes of `pictures`, or without any (None) of the texts alone."""
    found: list[Image.Image] = []
    for start in range(0, len(texts), BATCH):
        rows = slice(start, start + BATCH)
        count = len(texts[rows])
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(count)]
        image = torch.zeros(count, 4, 16, 16) if pictures is None else list(pictures[rows])
        drawn = pipeline(
            list(texts[rows]), image=image, num_inference_steps=steps, guidance_scale=TEXT_SCALE,
            image_guidance_scale=1.0 if pictures is None else IMAGE_SCALE, generator=generators,
        )  # fmt: skip
        found += drawn.images
    return found


# ---- scores ---------------------------------------------------------------------------------------------------------


def is_right(edit: Edit, result: Image.Image) -> bool:
    """Whether the thing is red, and the thing and its background are those of the picture."""
    found = score(result, edit.background)
    kept = found.thing == edit.thing and found.background_error < BACKGROUND_TOLERANCE
    return kept and found.colour == COLOUR


def known_right(pipeline: Any, prompts: Sequence[ScoredPrompt]) -> float:
    """Share of the known things that are still drawn, in the right colour, from a text alone."""
    pictures = edited(pipeline, [prompt.caption for prompt in prompts], None, seed=1000)
    report = known_report(pictures, prompts)
    return min(report.thing_right, report.colour_right)


def sheet_of(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Rows of pictures of one size on white."""
    side = rows[0][0].width + gap
    sheet = Image.new("RGB", (len(rows[0]) * side + gap, len(rows) * side + gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (gap + x * side, gap + y * side))
    return sheet


def show(options: argparse.Namespace) -> None:
    """Edit and score with the domain's LoRA alone, then with that of the edits too; write the picture."""
    edits, prompts = held_out_edits(options.edits), known_prompts(options.known_per_thing)
    pictures = [edit.picture for edit in edits]
    domain, edit_lora = options.output / "domain.safetensors", options.output / "make_it_red.safetensors"
    print("| LoRAs | held-out edits right | known things right |\n|---|---|---|")
    results = []
    for name, files in (("domain", [domain]), ("domain + make it red", [domain, edit_lora])):
        pipeline = load_editor(files)
        results.append(edited(pipeline, [INSTRUCTION] * len(edits), pictures, seed=500))
        right = np.mean([is_right(edit, result) for edit, result in zip(edits, results[-1], strict=True)])
        known = known_right(pipeline, prompts)
        print(f"| {name} | {right:.0%} of {len(edits)} | {known:.0%} of {len(prompts)} |", flush=True)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet_of([row[: options.columns] for row in (pictures, *results)]).save(options.picture, optimize=True)
    print(f"before, with the domain's LoRA, with both: {options.picture}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("pairs", "train", "score"), help="one of the three parts")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "domain", help="that of the recipes")
    parser.add_argument("--pairs", type=int, default=504, help="pictures to learn from")
    parser.add_argument("--edits", type=int, default=64, help="held-out pictures to edit")
    parser.add_argument("--known_per_thing", type=int, default=4, help="pictures of each known thing")
    parser.add_argument("--columns", type=int, default=8, help="edits in the picture")
    parser.add_argument("--picture", type=Path, default=ROOT / "output" / "domain" / "edit_before_after.png")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.only in (None, "pairs"):
        write_pairs(options.output / "pairs", options.pairs)
    if options.only in (None, "train"):
        train("domain_stage1")
        train("domain_stage2_edit")
    if options.only in (None, "score"):
        show(options)


if __name__ == "__main__":
    main()
