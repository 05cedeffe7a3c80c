# SPDX-License-Identifier: Apache-2.0
"""Write the README's table of models from the sheets of the families.

python tools/make_readme_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.families.registry import with_scripts  # noqa: E402
from library.families.sheet import Sheet  # noqa: E402

README = ROOT / "README.md"
HEAD = "| model | LoRA | all weights |\n|---|---|---|\n"


def row(sheet: Sheet) -> str:
    """One line: the models, what trains adapters for them and what trains all weights, each with its recipe."""
    adapters = f"`{sheet.scripts['network']}` ([page]({sheet.page}), [recipe]({sheet.recipes['network']}))"
    methods = (("finetune", "recipe"), ("dreambooth", "DreamBooth"))
    whole = [
        f"`{sheet.scripts[method]}` ([{label}]({sheet.recipes[method]}))"
        for method, label in methods
        if method in sheet.scripts
    ]
    return f"| {sheet.models} | {adapters} | {', '.join(whole)} |\n"


def table() -> str:
    return HEAD + "".join(row(sheet) for sheet in with_scripts().values())


def with_table(page: str) -> str:
    """The page with a new table in place of the one that is there."""
    found, count = re.subn(re.escape(HEAD) + r"(?:\|.*\n)*", lambda match: table(), page)
    assert count == 1
    return found


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
