# SPDX-License-Identifier: Apache-2.0
"""Options that ask for predictions of the untrained model beside those of the model in training."""

from __future__ import annotations

from library.data.scan import Scan
from library.errors import first_names, raise_problems
from library.learning import Learning
from library.trainers.options import TrainerOptions


def asking_for_untrained(options: TrainerOptions, found: Scan) -> list[str]:
    """The options given that ask for it, as messages name them."""
    asking = ["--masked_prior_weight"] if options.loss.masked_prior_weight else []
    subsets = {id(subset.config): subset.config for subset in found.subsets}.values()
    keeping = [subset.name for subset in subsets if subset.custom_attributes.get("diff_output_preservation")]
    if keeping:
        asking.append(f"custom_attributes.diff_output_preservation ({first_names(keeping)})")
    return asking


def check_untrained(options: TrainerOptions, learning: Learning, found: Scan) -> None:
    """Raises UserError for such options in a method that changes the model itself."""
    if not learning.keeps_untrained:
        raise_problems(
            f"{asking} needs the untrained model, which only adapters leave as it was: leave it out, or train a network"
            for asking in asking_for_untrained(options, found)
        )
