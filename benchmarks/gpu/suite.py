# SPDX-License-Identifier: Apache-2.0
"""Tests and benchmarks of a machine's card in one command: what `python start.py gpu` runs.

    python benchmarks/gpu/suite.py                        the gpu-marked tests, all benchmarks, output/gpu/RESULTS.md
    python benchmarks/gpu/suite.py --jobs sdxl_lora       options that are not its own go to benchmarks/gpu/run.py

Tests that fail do not stop the benchmarks. Exit code: 0, 1 where a test failed, 2 where there is no card.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import ROOT
from benchmarks.gpu import run
from library.cli import EXIT_STOPPED, guarded
from library.errors import UserError
from library.machine import private

EXIT_TESTS_FAILED = 1  # of pytest, and of this


@dataclass(frozen=True)
class Tested:
    """The outcome of the tests. failures: name of the test and the first line of its error."""

    passed: int
    skipped: int
    failures: tuple[tuple[str, str], ...]
    seconds: float

    def section(self, tests: str) -> str:
        """A section for the file of results."""
        counts = f"{self.passed} passed, {len(self.failures)} failed, {self.skipped} skipped in {self.seconds:.0f} s"
        lines = [f"### Tests on the card\n\n`python -m pytest -m gpu {tests}`: {counts}.", ""]
        return "\n".join([*lines, *(f"- failed: `{name}`: {error}" for name, error in self.failures)]).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu", help="folder (default: output/gpu)")
    parser.add_argument("--tests", default="tests", help="which tests: files or folders, with commas (default: all)")
    settings, rest = parser.parse_known_args(argv)
    return guarded(lambda: run_all(settings.output, settings.tests.replace(",", " "), rest))


def run_all(folder: Path, tests: str, options: list[str]) -> int:
    """Tests, then benchmarks, then all of it in one file."""
    run.checked(options)  # now, not after an hour of tests
    check_card()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "RESULTS.md"
    if results.exists():
        results.replace(folder / "RESULTS.previous.md")
    tested = run_tests(tests.split(), folder / "tests.xml")
    section = private(tested.section(tests))
    print(section, flush=True)
    command = [sys.executable, "benchmarks/gpu/run.py", "--output", str(results.absolute()), *options]
    try:
        code = subprocess.call(command, cwd=ROOT)
    except KeyboardInterrupt:
        code = EXIT_STOPPED  # the rows that were measured are in the file
    with results.open("a", encoding="utf-8") as file:
        file.write(f"\n{section}")
    print(f"\nAll of it is in {results}. It has the form of benchmarks/RESULTS.md: append it there to keep it.")
    return code or (EXIT_TESTS_FAILED if tested.failures else 0)


def check_card() -> None:
    """Raises UserError where torch sees no CUDA device, with the reason where that is known."""
    import torch

    from library.device_report import unused_card

    if not torch.cuda.is_available():
        reason = unused_card() or "torch sees none; `python start.py doctor` says what there is"
        raise UserError(f"the GPU suite needs a card with CUDA: {reason}")


def run_tests(tests: list[str], report: Path) -> Tested:
    """The gpu-marked tests, in a process of their own, shown as they run."""
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report.absolute()}", *tests]
    code = subprocess.call(command, cwd=ROOT)
    found = read_report(report) if report.is_file() else Tested(0, 0, (), 0.0)
    if code in (0, EXIT_TESTS_FAILED):
        return found
    return replace(found, failures=(*found.failures, ("pytest", f"it ended with code {code}, not after all tests")))


def read_report(report: Path) -> Tested:
    """What pytest wrote: JUnit's XML."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    failures = tuple(_failures(suite))
    passed = count["tests"] - count["skipped"] - count["failures"] - count["errors"]
    return Tested(passed, count["skipped"], failures, float(suite.get("time", 0)))


def _failures(suite: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                first = (found.get("message") or kind).strip().partition("\n")[0]
                yield f"{case.get('classname')}::{case.get('name')}", first


if __name__ == "__main__":
    sys.exit(main())
