# SPDX-License-Identifier: Apache-2.0
"""The cases of every architecture: a module for each family, collected by the names in the registry."""

from __future__ import annotations

import importlib

from library.families.registry import FAMILIES
from tests.families.base import Case

CASES: dict[str, Case] = {
    name: case
    for family in FAMILIES
    for name, case in importlib.import_module(f"tests.families.{family}").CASES.items()
}
