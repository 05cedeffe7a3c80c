# SPDX-License-Identifier: Apache-2.0
"""Options of full training, the method that trains a model's own weights. A family adds what it lets learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options import option

PLAIN_STEP = "comes with the memory options; until then the plain optimizer step is used, with the same result"


@dataclass(frozen=True)
class FineTuneOptions:
    """What full training has in every family. `ModelFamily.learning_parts` and `denoiser_groups` read a subclass."""

    fused_optimizer_groups: int | None = option(
        None, help="Number of groups of weights that are stepped during the backward pass.", answer=PLAIN_STEP
    )
    blockwise_fused_optimizers: bool = option(
        False, help="Step each block's weights during the backward pass.", answer=PLAIN_STEP
    )
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

    def idle(self) -> Iterator[str]:
        """Options that do nothing beside the others, which graphical programs leave in: for warnings."""
        yield from ()
