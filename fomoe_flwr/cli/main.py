"""The `fomoe` command: words in, one command run, an exit status out."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from fomoe_flwr import __version__, events
from fomoe_flwr.cli import bench, estimate, federation, inspect_run, train
from fomoe_flwr.cli.streams import guard_streams, lost_output
from fomoe_flwr.errors import InputError, RunError, check_text, reason_of, refusal

_COMMANDS = (
    train.add_run,
    train.add_sweep,
    estimate.add_costs,
    estimate.add_plan,
    inspect_run.add_evaluate,
    inspect_run.add_sample,
    inspect_run.add_export,
    inspect_run.add_report,
    train.add_worker,
    bench.add_bench,
    inspect_run.add_status,
    federation.add_federation,
)
"""In the order of `fomoe --help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 1 failed, 2 refused)."""
    guard_streams()
    try:
        options = _parse(arguments)
    except InputError as error:
        if _asks_for_json(arguments):
            events.use_format("json")
        status = _fail(str(error), 2)
        events.tell_if_json("end", exit_status=status)
        return status
    except SystemExit as ended:  # Help, the version, or a refusal of the words.
        if isinstance(ended, _Refusal) and ended.tells and _asks_for_json(arguments):
            events.use_format("json")
            events.tell("error", ended.reason)
            events.tell("end", exit_status=2)
        if (lost := lost_output()) is None:
            raise
        return _lost(lost)
    options.is_process = arguments is None
    tells = "log_format" in options
    events.use_format(options.log_format if tells else "text")
    status = 1
    try:
        status = _run(options)
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            status = error.code
        events.tell_if_json("error", reason_of(error))
        raise
    finally:
        events.tell_if_json("end", exit_status=status)
    lost = lost_output()
    # What was trained is in the run directory; what was only asked for is lost.
    return status if lost is None else _lost(lost, status, is_asked=not tells)


def _lost(lost: OSError, status: int = 0, is_asked: bool = True) -> int:
    print(f"{'error' if is_asked else 'warning'}: stdout: {lost.strerror}", file=sys.stderr)
    return status or int(is_asked)


def _run(options: argparse.Namespace) -> int:
    # So that `finally` runs, and the processes that a run started end with it.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (InputError, RunError) as error:
        return _fail(str(error), 2 if isinstance(error, InputError) else 1)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        return _fail(refusal(error), 1)
    except RuntimeError as error:
        if "home directory" not in str(error):  # `Path.expanduser` has no narrower class.
            raise
        return _fail("~ stands for no folder that is known: write it out", 2)


def _fail(reason: str, status: int) -> int:
    print(f"error: {reason}", file=sys.stderr)
    events.tell_if_json("error", reason)
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    check_text(sys.argv[1:] if arguments is None else arguments)
    parser = command_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one piece only, not before and after an option.
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in options]
    if unknown and "overrides" in options:
        from fomoe_flwr.config import refuse_option

        refuse_option(unknown[0])
    if unknown:
        parser.refuse(f"unrecognized arguments: {' '.join(unknown)}", "log_format" in options)
    if rest:
        options.overrides += rest
    return options


class _Refusal(SystemExit):
    """Words that are no command; `tells` if the command may have to tell it as an event."""

    def __init__(self, reason: str, tells: bool) -> None:
        super().__init__(2)
        self.reason, self.tells = reason, tells


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.refuse(message, "--log-format" in self._option_string_actions)

    def refuse(self, reason: str, tells: bool) -> NoReturn:
        """Say how the command is used, and raise what ends it."""
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {reason}", file=sys.stderr)
        raise _Refusal(reason, tells)


def _asks_for_json(arguments: Sequence[str] | None) -> bool:
    """Read the format from words that could not be parsed, else from the environment."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    if "--log-format" in words[:-1]:
        return words[words.index("--log-format") + 1] == "json"
    given = [word for word in words if word.startswith("--log-format=")]
    return given[-1].endswith("=json") if given else os.environ.get(events.VARIABLE) == "json"


def command_parser() -> _Parser:
    """Return the parser of all commands; each sets `run`, the function that does its work."""
    parser = _Parser(prog="fomoe", description="Federated pre-training of MoE language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


def _terminate(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
