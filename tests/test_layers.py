# SPDX-License-Identifier: Apache-2.0
"""Imports only point down the layers of docs/architecture.md, and options modules import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up; rooms of one row do not know each other, except in the first and the last one.
ORDER = (
    ("errors", "byte_paths", "text_files", "values", "options", "foreign_keys", "types", "rng", "log", "stopping",
     "device", "device_report", "machine", "key_tables", "exchange"),
    ("objectives", "optim", "memory", "io"),
    ("weights",),
    ("adapters",),
    ("data",),
    ("families",),
    ("learning",),
    ("sampling", "planner"),
    ("trainers",),
    ("cli", "networks"),
)  # fmt: skip
LAYERS = {name: row for row, names in enumerate(ORDER) for name in names}
FREE = (0, len(ORDER) - 1)


def room_of(module: str) -> str | None:
    """`library.data.scan` -> `data`; None for what is not ours."""
    parts = module.split(".")
    if parts[0] == "networks":
        return "networks"
    return parts[1] if parts[0] == "library" and len(parts) > 1 else None


def imports_of(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{a.name}" for a in node.names] if node.module == "library" else [node.module]
    return names


def our_files() -> list[Path]:
    return sorted([*ROOT.glob("library/**/*.py"), *ROOT.glob("networks/**/*.py")])


@pytest.mark.parametrize("path", our_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here in (None, "__init__"):
        return
    for module in imports_of(path):
        there = room_of(module)
        if there is None or there == here:
            continue
        assert LAYERS[there] <= LAYERS[here], f"{path.name} imports {module}, which is above it"
        if LAYERS[here] not in FREE:
            assert LAYERS[there] < LAYERS[here], f"{here} and {there} must not know each other"


def test_reading_options_needs_no_torch() -> None:
    code = (
        "import sys; import library.cli; library.cli.option_groups('network', 'sd');"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shared_code_does_not_ask_which_family_or_probe() -> None:
    for path in our_files():
        text = path.read_text(encoding="utf-8")
        for banned in ("is_flux", "is_sdxl", "is_sd3", "hasattr(network", "hasattr(self.network"):
            assert banned not in text, f"{path}: {banned}"
