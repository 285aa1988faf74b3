"""`fomoe status`, `evaluate`, `sample`, `export` and `report`: what is done with a run."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fomoe_flwr.cli.paths import given_path
from fomoe_flwr.errors import InputError


def add_evaluate(commands: Any) -> None:
    """Add `evaluate` to the command line."""
    parser = commands.add_parser("evaluate", help="score a run's newest checkpoint")
    parser.add_argument("folder", type=given_path, metavar="RUN")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--max-tokens", type=int, default=None, help="default: eval.max_tokens")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.stored import StoredRun

    result = StoredRun(options.folder).evaluate(options.split, options.max_tokens)
    print(json.dumps(result, indent=2))
    return 0


def add_sample(commands: Any) -> None:
    """Add `sample` to the command line."""
    parser = commands.add_parser("sample", help="continue a prompt with a run's newest checkpoint")
    parser.add_argument("folder", type=given_path, metavar="RUN")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_sample)


def _sample(options: argparse.Namespace) -> int:
    if options.tokens < 1:
        raise InputError(f"--tokens {options.tokens} is out of range: it must be >= 1")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed} is out of range: it must be >= 0 and < 2**63")
    from fomoe_flwr.run.stored import StoredRun

    print(StoredRun(options.folder).sample(options.prompt, options.tokens, options.seed))
    return 0


def add_export(commands: Any) -> None:
    """Add `export` to the command line."""
    parser = commands.add_parser("export", help="write a transformers checkpoint")
    parser.add_argument("folder", type=given_path, metavar="RUN")
    parser.add_argument("--to", type=given_path, default=None, help="default: RUN/export")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.stored import StoredRun

    print(StoredRun(options.folder).export(options.to))
    return 0


def add_report(commands: Any) -> None:
    """Add `report` to the command line."""
    parser = commands.add_parser(
        "report", help="print a table and draw report.html and the plots again"
    )
    parser.add_argument("folder", type=given_path, metavar="RUN_OR_SWEEP")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from fomoe_flwr import report
    from fomoe_flwr.config import find_run
    from fomoe_flwr.run.directory import RunDirectory
    from fomoe_flwr.sweep.directory import SweepDirectory
    from fomoe_flwr.sweep.table import print_table, write_table

    sweep = SweepDirectory(options.folder)
    if sweep.is_sweep:
        from fomoe_flwr.sweep.page import sweep_page

        write_table(sweep)
        print_table(sweep)
        print(sweep_page(sweep)[0])
        return 0
    run = RunDirectory(find_run(options.folder))
    report.print_end(run)
    print(report.write_report(run)[0])
    return 0


def add_status(commands: Any) -> None:
    """Add `status` to the command line."""
    parser = commands.add_parser("status", help="where a run is, who is missing, what it uses")
    parser.add_argument("folder", type=given_path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.status import run_status, show_status

    status = run_status(options.folder)
    print(json.dumps(status, indent=2) if options.json else show_status(status))
    return 0
