# SPDX-License-Identifier: Apache-2.0
"""Seeds that depend on their purpose, and not on how often a generator was called before.

Every random draw of a run (batch order, caption choice, augmentation, timestep, noise, dropout) has a seed derived from
the run's seed, its purpose, and counters such as epoch, sample and position in the plan of all processes. A resumed run
draws the same values, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the BLAKE2b hash of the parts as text. It is the same on every machine."""
    text = "\x1f".join(str(p) for p in parts).encode(errors="surrogatepass")  # file names may not be UTF-8
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def python_rng(*parts: int | str) -> random.Random:
    """A `random.Random` seeded with `derive_seed(*parts)`."""
    return random.Random(derive_seed(*parts))


def torch_generator(*parts: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A `torch.Generator` on `device` seeded with `derive_seed(*parts)`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(*parts))
