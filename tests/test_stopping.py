# SPDX-License-Identifier: Apache-2.0
"""What asks a run to stop, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from library.errors import EXIT_AT_ONCE, EXIT_STOPPED
from library.stopping import SIGNALS, TOGETHER, StopRequest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor these signals")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As started from a shell, whatever started the tests; and the handlers are what they were."""
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    before = [signal.getsignal(number) for number in SIGNALS]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


def forked(action: Callable[[], None]) -> int:
    """The exit code of a process that does this; 0 where it comes back from it."""
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_interrupts_before_the_training_and_is_noted_in_it(number: signal.Signals) -> None:
    with StopRequest().installed() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.requested
    with StopRequest().installed() as stop:
        stop.interrupts = False
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        stop.check()  # only noted


def test_an_interrupt_that_a_library_swallowed_comes_again() -> None:
    with StopRequest().installed() as stop:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            pass
        with pytest.raises(KeyboardInterrupt):
            stop.check()


def test_an_interrupt_in_a_destructor_is_not_shown_and_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    before, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__
    try:
        with StopRequest().installed() as stop:
            Destroyed()
            assert capsys.readouterr().err == ""
            with pytest.raises(KeyboardInterrupt):
                stop.check()
        assert sys.unraisablehook == sys.__unraisablehook__
    finally:
        sys.unraisablehook = before


def test_two_at_the_same_time_are_one_and_a_later_one_ends_the_process() -> None:
    def later(seconds: float, *numbers: signal.Signals, code: int | None = None) -> int:
        def action() -> None:
            with StopRequest().installed() as stop:
                stop.interrupts, stop.code_of_run = False, code
                for number in numbers:
                    signal.raise_signal(number)
                    time.sleep(seconds)

        return forked(action)

    term, hup, ctrl_c = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    assert later(0, term, term, hup) == 0
    assert later(TOGETHER + 0.1, term, term) == EXIT_AT_ONCE
    assert later(0, ctrl_c, ctrl_c) == EXIT_AT_ONCE  # somebody is impatient
    assert later(0, term, ctrl_c, code=EXIT_STOPPED) == EXIT_STOPPED  # all was saved before
    os.environ["TORCHELASTIC_RUN_ID"] = "x"  # torchrun passes Ctrl-C on: it comes twice. The fixture removes it
    assert later(0, ctrl_c, ctrl_c) == 0
    del os.environ["TORCHELASTIC_RUN_ID"]


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest().installed() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested


def test_a_forked_process_ends_as_any_other() -> None:
    with StopRequest().installed() as stop:
        assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        assert not stop.requested


@pytest.mark.parametrize(("launcher", "expected"), [("ACCELERATE_MIXED_PRECISION", 1), ("", 0)])
def test_the_end_of_the_launcher_is_noticed(launcher: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that ends is none: `nohup python train_network.py &` goes on."""
    if launcher:
        monkeypatch.setenv(launcher, "no")
    out, into = os.pipe()

    def launch() -> None:
        if os.fork() == 0:
            parent, stop = os.getppid(), StopRequest()
            stop.interrupts = False
            assert not stop.requested
            os.write(into, b"!")
            while os.getppid() == parent:
                time.sleep(0.001)
            os.write(into, str(int(stop.requested)).encode())
            os._exit(0)
        os.read(out, 1)

    assert forked(launch) == 0
    assert os.read(out, 1) == str(expected).encode()
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("module", ["", "torch"])
def test_a_signal_during_the_imports(module: str) -> None:
    """Those of library.cli itself, and the heavy ones later."""
    code = (
        "import signal, sys\n"
        "class Told:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module or 'library.foreign_keys'!r}: signal.raise_signal(signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Told())\n"
        "from library.cli import run\n"
        "run('network', 'sd', ['--pretrained_model_name_or_path', 'x', '--output_dir', 'o', '--dataset_config', 'd'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == EXIT_STOPPED and "Traceback" not in done.stderr, done.stderr


def test_a_terminal_that_is_gone(tmp_path: Path) -> None:
    """SIGHUP, and nothing can be written to stderr any more: the exit code is what it should be all the same."""
    code = (
        "import os, pty, signal, sys\n"
        "from library.cli import guarded\n"
        "from library.log import get_logger, progress, setup_logging\n"
        "main, terminal = pty.openpty(); os.dup2(terminal, 2); os.close(terminal)\n"
        "setup_logging(level=None, file=None, simple=True)\n"
        "def action():\n"
        "    os.close(main)\n"
        "    get_logger().info('one')\n"
        "    with progress(2, 'steps') as bar: bar.advance()\n"
        "    signal.raise_signal(signal.SIGHUP)\n"
        "sys.exit(guarded(action))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == EXIT_STOPPED


# A gloo thread that asks for the interpreter's lock while the interpreter is taken apart ends in std::terminate: with
# sys.exit in place of end_process, a rank of these two ends with -6 ("terminate called without an active exception").
TWO_WITH_WORK_UNDER_WAY = """
import sys, time
import torch, torch.distributed as dist
from library.stopping import end_process
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
dist.all_reduce(torch.ones(8))
time.sleep(rank)
dist.all_reduce(torch.ones(8), async_op=True).get_future().then(lambda future: future.value())
end_process(0)
"""


def test_a_process_ends_with_its_code_while_an_exchange_is_under_way(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TWO_WITH_WORK_UNDER_WAY]
    both = [subprocess.Popen([*words, str(rank), str(tmp_path / "meeting")], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
