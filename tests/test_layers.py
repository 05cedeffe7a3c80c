# SPDX-License-Identifier: Apache-2.0
"""Imports only point down the layers of docs/architecture.md, and options modules import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    "library.cli": 4, "library.trainers": 4,
    "library.sampling": 3,
    "library.models": 2, "library.data": 2,
    "library.objectives": 1, "library.optim": 1, "library.memory": 1, "library.io": 1, "networks": 1,
    "library.errors": 0, "library.byte_paths": 0, "library.text_files": 0, "library.values": 0, "library.options": 0,
    "library.foreign_keys": 0, "library.types": 0, "library.rng": 0, "library.log": 0, "library.stopping": 0,
    "library.device": 0, "library.device_report": 0, "library.machine": 0, "library.names": 0,
}  # fmt: skip


def room_of(module: str) -> str | None:
    """`library.data.scan` -> `library.data`; None for what is not ours."""
    parts = module.split(".")
    if parts[0] == "networks":
        return "networks"
    return ".".join(parts[:2]) if parts[0] == "library" and len(parts) > 1 else None


def imports_of(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{a.name}" for a in node.names] if node.module == "library" else [node.module]
    return names


# What several tools for the command line share: above everything, as they are
OF_TOOLS = {"tool_files.py", "tool_options.py"}


def our_files() -> list[Path]:
    return sorted([*ROOT.glob("library/**/*.py"), *ROOT.glob("networks/**/*.py")])


@pytest.mark.parametrize("path", our_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    is_tool = path.name in OF_TOOLS or '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    if here in (None, "library.__init__") or is_tool:
        return  # a tool for the command line stands above everything, wherever it lies
    for module in imports_of(path):
        there = room_of(module)
        if there is None or there == here or path.name == "options.py":
            continue
        assert LAYERS[there] <= LAYERS[here], f"{path.name} imports {module}, which is above it"
        if LAYERS[here] in (1, 2):
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
