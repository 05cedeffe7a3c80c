# SPDX-License-Identifier: Apache-2.0
"""A script of the project, or a module, on the simulated card, in a process of its own.

    python -m tests.cuda_simulation train_network.py --pretrained_model_name_or_path ...
    python -m tests.cuda_simulation -m accelerate.commands.launch train_network.py ...
    python -m tests.cuda_simulation benchmarks/gpu/run.py --tiny

Python processes that it starts have the card, too. Exit code and output are the script's; 3 where there is no card.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.cuda_simulation.build import CannotSimulate
from tests.cuda_simulation.simulate import simulate


def main(words: list[str]) -> int:
    """The command."""
    if not words or words[0] in ("-h", "--help") or words == ["-m"]:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        simulate()
    except CannotSimulate as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)  # as Python has it when it runs a script
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
