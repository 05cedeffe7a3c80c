# SPDX-License-Identifier: Apache-2.0
"""Options of full training, the method that trains a model's own weights. A family adds what it lets learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options import option


@dataclass(frozen=True)
class FineTuneOptions:
    """What full training has in every family. `ModelFamily.learning_parts` and `denoiser_groups` read a subclass."""

    mem_eff_save: bool = option(
        False,
        help="Save with little memory.",
        answer="always so: tensors are written one after the other",
    )
    skip_latents_validity_check: bool = option(
        False,
        help="Do not look into cached latents at the start.",
        answer="looking takes no time, the cache keeps an index; --skip_cache_check trusts that without the pictures",
    )

    @property
    def encoders_until(self) -> int | None:
        """The optimizer step from which on text encoders stay as they are; None: those that learn learn to the end."""
        return None

    @property
    def swaps_blocks(self) -> bool:
        """Whether options of the family's own say which blocks wait in main memory."""
        return False

    def idle(self) -> Iterator[str]:
        """Options that do nothing beside the others, which graphical programs leave in: for warnings."""
        yield from ()
