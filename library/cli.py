# SPDX-License-Identifier: Apache-2.0
"""From the command line to a run. A user's mistake ends as clear lines and exit code 2, never as a traceback."""

from __future__ import annotations

from library.stopping import StopRequest, end_early, end_process, ignore_signals

end_early()  # before the other imports

# ruff: noqa: E402
import inspect
import io
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from library.data.options import NO_DATA
from library.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_STOPPED, StopTraining, UserError, one_line
from library.families.registry import FAMILIES, open_family
from library.io.atomic import atomic_write
from library.log import get_logger, is_main_process, process_count, setup_logging, to_stderr
from library.options import dump_toml, group_types, resolve
from library.trainers.methods.finetune_options import DreamBoothTrainerOptions, FineTuneTrainerOptions
from library.trainers.methods.lllite_options import LLLiteTrainerOptions
from library.trainers.methods.textual_inversion_options import TextualInversionOptions
from library.trainers.options import NetworkTrainerOptions

Options = TypeVar("Options")

# method -> (its class, its options)
METHODS: dict[str, tuple[str, type]] = {
    "network": ("library.trainers.methods.network:NetworkMethod", NetworkTrainerOptions),
    "finetune": ("library.trainers.methods.finetune:FineTuneMethod", FineTuneTrainerOptions),
    "dreambooth": ("library.trainers.methods.finetune:DreamBoothMethod", DreamBoothTrainerOptions),
    "lllite": ("library.trainers.methods.lllite:LLLiteMethod", LLLiteTrainerOptions),
    "textual_inversion": ("library.trainers.methods.textual_inversion:TextualInversionMethod", TextualInversionOptions),
}


def load_attribute(path: str) -> Any:
    """`package.module:Name` -> the object."""
    return pkgutil.resolve_name(path)


def option_groups(method: str, family: str) -> dict[str, type]:
    """Group name -> options dataclass of one script."""
    return group_types(METHODS[method][1], FAMILIES[family].option_groups)


def run(method: str, family: str, argv: Sequence[str] | None = None) -> None:
    """The whole of a training script: read the options, train, exit with a code that says how it went."""
    # the caller's module docstring is the description: the script says itself what it does
    description = inspect.getdoc(sys.modules["__main__"]) or ""
    stop = StopRequest()
    words = sys.argv[1:] if argv is None else argv
    code = guarded(lambda: _train(method, family, words, description, stop), stop)
    ignore_signals()
    if process_count() > 1:
        end_process(code)
    sys.exit(code)


def guarded(action: Callable[[], int], stop: StopRequest | None = None) -> int:
    """Run `action`; what a user can mend becomes lines on stderr and exit code 2; a diverged run 4; Ctrl-C, SIGTERM 3.

    With --console_log_level DEBUG the traceback of a machine's refusal is shown too; other errors always have theirs.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path's letters that the terminal or the file cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    stop = stop or StopRequest()
    with stop.installed():
        try:
            return _code_of(action, stop)
        except KeyboardInterrupt as error:
            to_stderr(f"stopped before training began: {str(error) or 'nothing was written, except to caches'}\n")
            return EXIT_STOPPED


def run_tool(
    options_type: type[Options], action: Callable[[Options], None], argv: Sequence[str] | None, name: str, about: str
) -> int:
    """Read the options of a tool and do `action` with them. Returns the exit code: 0, or 2 for bad input.

    argv: None when the tool was started as a script. about: its description.
    """
    if argv is None:  # started as a script
        setup_logging(level="INFO", file=None, simple=True)

    def act() -> int:
        words = sys.argv[1:] if argv is None else argv
        found = resolve(options_type, {}, words, prog=name, description=inspect.cleandoc(about))
        for line in found.answers:
            get_logger().info(line)
        action(found.options)
        return 0

    return guarded(act)


def _code_of(action: Callable[[], int], stop: StopRequest) -> int:
    try:
        return action()
    except UserError as error:
        if is_main_process() or error.only_here:
            to_stderr("".join(f"error: {line}\n" for line in error.lines()))
        return error.code
    except StopTraining as error:
        if is_main_process() or error.only_here:
            to_stderr(f"stopped: {one_line(str(error))}\n")
        return EXIT_DIVERGED
    except Exception as error:
        stop.check()  # interrupted, some library answers with an error of its own
        line = refusal_of_machine(error)
        if line is None:
            raise
        get_logger().debug("the run ended here:", exc_info=True)
        to_stderr(f"error: {one_line(line)}\n")
        return EXIT_BAD_INPUT


def refusal_of_machine(error: BaseException) -> str | None:
    """One line for an error that disk, memory or network made; None for a mistake of the program."""
    if isinstance(error, MemoryError):
        return "out of main memory: close other programs, or give a smaller --max_data_loader_n_workers"
    if "torch" in sys.modules:  # what is not loaded has not run out of memory, and takes seconds to load
        from library.device import NEEDS_LESS, is_out_of_memory, reason_of

        if is_out_of_memory(error):
            return f"{reason_of(error)}: {NEEDS_LESS}"
    if not isinstance(error, OSError):
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or str(error).partition(chr(10))[0] or type(error).__name__}"


def write_output_config(text: str, path: Path) -> None:
    """--output_config: refuse to overwrite, then write."""
    if path.exists():
        raise UserError(f"--output_config: {path} exists; give --config_file another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda temp: temp.write_text(text, encoding="utf-8"))
    to_stderr(f"wrote {path}\n")


def _train(method: str, family: str, argv: Sequence[str], description: str, stop: StopRequest) -> int:
    method_path, options_type = METHODS[method]
    entry = FAMILIES[family]
    prog = Path(sys.argv[0]).name or "trainyard"
    missing = lambda options: () if options.data.is_given else (NO_DATA,)
    resolved = resolve(options_type, entry.option_groups, argv, prog=prog, description=description, missing=missing)
    options = resolved.options
    if options.config.output_config:
        if not options.config.config_file:
            raise UserError("--output_config: give the file to write with --config_file")
        write_output_config(dump_toml(options), Path(options.config.config_file).with_suffix(".toml"))
        return 0
    log_options = options.logging
    setup_logging(
        level=log_options.console_log_level, file=log_options.console_log_file, simple=log_options.console_log_simple
    )
    for line in resolved.answers:
        get_logger().info(line)
    start = load_attribute("library.trainers.run:run")
    return start(load_attribute(method_path)(open_family(entry, options.model), options), stop)
