#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Set up and try Trainyard with nothing but Python 3.10 to 3.13.

    python start.py demo     make the environment (.venv), train a LoRA on the built-in model, show before and after
    python start.py test     make the environment and run the tests
    python start.py setup    make the environment only
    python start.py doctor   print machine, drivers, versions and what is missing, for you or for a bug report
    python start.py gpu      make the environment, run tests and benchmarks on this machine's GPU, write tables

    --torch auto|keep|cu130|cu126|cu132|rocm7.2|xpu|cpu|mps
                             which build of torch, for all but doctor (docs/torch_builds.md). auto: the one that fits
                             the machine, keep: the one that is there. What was given holds until another is

Linux, macOS and Windows; standard library only. Other arguments are passed on (to the training, pytest, benchmarks).
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script is what an older Python runs first
        sys.exit(f"Trainyard needs Python 3.10 or newer; this is {sys.version.split()[0]}")
    for stream in (sys.stdout, sys.stderr):  # a path's letters that the terminal or the file cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from library.errors import UserError, unknown
    from tools.setup.commands import WORDS

    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return
    try:
        if sys.argv[1] not in WORDS:
            raise UserError(unknown("start.py", sys.argv[1], WORDS, kind="command"))
        WORDS[sys.argv[1]](sys.argv[2:])
    except UserError as error:
        for problem in error.lines():
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
