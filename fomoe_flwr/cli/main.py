"""The `fomoe` command: words in, one command run, an exit status out."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Sequence

from fomoe_flwr import __version__
from fomoe_flwr.cli import bench, estimate, federation, inspect_run, train
from fomoe_flwr.errors import InputError, RunError, refusal

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
    options = _parse(arguments)
    # So that `finally` runs, and the processes that a run started end with it.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        print(f"error: {refusal(error)}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "home directory" not in str(error):  # `Path.expanduser` has no narrower class.
            raise
        print("error: ~ stands for no folder that is known: write it out", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one piece only, not before and after an option.
    if unknown := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, the function that does its work."""
    parser = argparse.ArgumentParser(
        prog="fomoe", description="Federated pre-training of MoE language models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(commands)
    return parser


def _terminate(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
