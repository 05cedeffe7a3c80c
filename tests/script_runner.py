# SPDX-License-Identifier: Apache-2.0
"""Runs our scripts as a user does, each in a process of its own, without paying five seconds of imports every time.

A server process imports what the scripts import and then forks one child per run; the child runs the script file as
`__main__`. `fresh=True`, and systems without fork, start a new Python instead. Both end with the script's exit code.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What a run of train_network.py imports, from its first line to its end
IMPORTED = (
    "library.cli", "library.families.sd.model", "library.trainers.methods.network", "library.trainers.checks",
    "library.trainers.trainer", "library.planner.memory_plan", "torch.utils.tensorboard", "numpy.ma",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a run ended. `text`: stdout and stderr together."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line.removeprefix("error: ") for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def warnings(self) -> list[str]:
        """The warnings, without time and level."""
        return [line.partition(" WARNING ")[2] for line in self.text.splitlines() if " WARNING " in line]


def run_script(
    *words: str, script: str = "train_network.py", fresh: bool = False, file_limit: int | None = None
) -> Ended:
    """`python <script> <words>` in the project's folder. file_limit: bytes at which a file is full."""
    if (fresh and file_limit is None) or sys.platform == "win32":
        command = [sys.executable, script, *words]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=alone, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return Ended(done.returncode, done.stdout)
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "output")
        request = {"script": script, "words": words, "output": output, "file_limit": file_limit}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Ended(code, Path(output).read_text(encoding="utf-8"))


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The server of this test session."""
    command = [sys.executable, "-m", "tests.script_runner"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=alone, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.kill)
    return server


# ---- the server -----------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer each request on stdin with an exit code on stdout."""
    from library.weights.quick_import import import_diffusers

    for name in IMPORTED:
        importlib.import_module(name)
    import_diffusers()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _run(request: dict[str, Any]) -> None:
    """In the child: the script, then the end of the process."""
    file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    if request["file_limit"] is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    sys.argv = [request["script"], *request["words"]]
    code = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
