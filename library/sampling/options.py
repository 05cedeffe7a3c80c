# SPDX-License-Identifier: Apache-2.0
"""Options of the previews. No torch here: `--help` reads this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.options import Idle, option

SAMPLER_NAMES = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip


@dataclass(frozen=True)
class SampleOptions:
    """Pictures during the training. An interval of 0 or less means not given."""

    sample_every_n_steps: int | None = option(None, help="Make previews after every so many steps.")
    sample_at_first: bool = option(False, help="Make previews before the first step, too.")
    sample_every_n_epochs: int | None = option(None, help="Make previews after every so many epochs; wins over steps.")
    sample_prompts: str | None = option(None, help="File of preview prompts: .txt, .toml or .json.", path=True)
    sample_sampler: str = option("ddim", choices=SAMPLER_NAMES, help="Sampler of prompts that name none.")

    @property
    def wanted(self) -> bool:
        """True when this run makes previews at some time."""
        return bool(self.sample_prompts) and (self.sample_at_first or self.every_n_steps > 0 or self.every_n_epochs > 0)

    @property
    def every_n_steps(self) -> int:
        """Steps between previews, 0: none."""
        return max(0, self.sample_every_n_steps or 0)

    @property
    def every_n_epochs(self) -> int:
        """Epochs between previews, 0: none."""
        return max(0, self.sample_every_n_epochs or 0)

    def problems(self) -> Iterator[str]:
        """Combinations that make no sense, one line each."""
        asked = [
            n for n in ("sample_every_n_steps", "sample_at_first", "sample_every_n_epochs") if (vars(self)[n] or 0) > 0
        ]
        if asked and not self.sample_prompts:
            yield from (Idle(f"--{name} needs --sample_prompts, a .txt, .toml or .json file") for name in asked)
