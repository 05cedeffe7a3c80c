# SPDX-License-Identifier: Apache-2.0
"""Chroma for the contract tests. Its models and its loss are in tests/families/flux.py, beside those of FLUX.1."""

from __future__ import annotations

from functools import partial

from tests.families.base import Case
from tests.families.flux import DEEP, SLOWER, USUAL, loss, make

make_chroma = partial(make, variant="chroma", layout="diffusers")
CASES: dict[str, Case] = {
    "chroma": Case("flux", make_chroma, loss, USUAL, overfit=SLOWER, make_deep=partial(make_chroma, blocks=DEEP)),
}
