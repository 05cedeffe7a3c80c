# SPDX-License-Identifier: Apache-2.0
"""Score how well a LoRA of the built-in model draws the rocket, and whether the model still knows everything else.

    python tools/score_lora.py output/demo/rocket.safetensors

The score (tools/base_model/score.py) finds the nearest drawing after normalising position and size; it needs no learned
model. Pictures before and after start from the same noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base_model.assemble import load_pipeline, sample
from base_model.draw import CONCEPT, contact_sheet
from base_model.score import ConceptReport, KnownReport, concept_report, known_prompts, known_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from networks.lora import create_network_from_weights  # noqa: E402

BACKGROUNDS = ("blue", "black", "green", "purple", "orange", "red", "white", "yellow")


@dataclass(frozen=True)
class LoraScore:
    """Scores of the model as shipped or with the LoRA merged into it."""

    concept: ConceptReport
    known: KnownReport


def score_lora(
    model: Path,
    lora: Path | None,
    *,
    seeds: Sequence[int] = (11, 22, 33),
    per_thing: int = 4,
    sheet: Path | None = None,
) -> LoraScore:
    """Draw the rocket on every background with every seed, and `per_thing` pictures of each known thing."""
    pipeline = load_pipeline(model)
    if lora is not None:
        network, _ = create_network_from_weights(1.0, lora, pipeline.vae, pipeline.text_encoder, pipeline.unet)
        network.merge_into()
    backgrounds = [name for _ in seeds for name in BACKGROUNDS]
    captions = [f"a sks {CONCEPT} on a {name} background" for name in BACKGROUNDS]
    rockets = [image for seed in seeds for image in sample(pipeline, captions, seed=seed)]
    prompts = known_prompts(per_thing)
    known = sample(pipeline, [prompt.caption for prompt in prompts], seed=1000)
    if sheet is not None:
        contact_sheet([*rockets, *known], 8).save(sheet)
    return LoraScore(concept_report(rockets, backgrounds), known_report(known, prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lora", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "base_model")
    parser.add_argument("--sheet", type=Path, help="also write the pictures as one PNG")
    parser.add_argument("--only_after", action="store_true", help="leave out the model without the LoRA")
    options = parser.parse_args()
    print("| | rocket nearest | rocket similarity | known thing right | known colour right | taken for a rocket |")
    print("|---|---|---|---|---|---|")
    for name, lora in (("before", None), ("after", options.lora)):
        if lora is None and options.only_after:
            continue
        found = score_lora(options.model, lora, sheet=options.sheet if lora else None)
        c, k = found.concept, found.known
        print(
            f"| {name} | {c.rocket_nearest:.0%} of {c.count} | {c.mean_rocket_similarity:.3f} | "
            f"{k.thing_right:.0%} of {k.count} | {k.colour_right:.0%} | {k.taken_for_rocket:.0%} |"
        )


if __name__ == "__main__":
    main()
