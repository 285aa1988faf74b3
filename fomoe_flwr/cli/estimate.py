"""`fomoe costs` and `plan`: what a run would take, before there is one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_flwr.cli.paths import given_path

if TYPE_CHECKING:
    from fomoe_flwr.plan import Plan


def add_costs(commands: Any) -> None:
    """Add `costs` to the command line."""
    parser = commands.add_parser("costs", help="what a run would cost, without running it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--explain", action="store_true", help="each formula, and the numbers put in"
    )
    parser.add_argument(
        "--sweep",
        type=given_path,
        default=None,
        metavar="FOLDER",
        help="draw sweeps there, as PNGs",
    )
    parser.set_defaults(run=_costs)


def _costs(options: argparse.Namespace) -> int:
    from fomoe_flwr import costs
    from fomoe_flwr.config import expand_files, load_settings
    from fomoe_flwr.model.source import settle

    settings = load_settings(expand_files(options.overrides), settle)
    sheet = costs.lines(settings)
    if options.json:
        print(json.dumps({line.key: line.value for line in sheet}, indent=2))
    else:
        print(costs.show(sheet, explain=options.explain))
    if options.sweep is not None:
        from fomoe_flwr.report.cost_curves import draw_costs

        for path in draw_costs(settings, options.sweep):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def add_plan(commands: Any) -> None:
    """Add `plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="workers, overlap, layout and local steps for given sites and a model",
        description="Minimise the time to a token budget (costs.tokens) within the sites' memory. "
        "The sites file: a list `sites` with name, memory_gib, teraflops, up_mbps and down_mbps of "
        "each, and if need be latency_seconds, mfu and state_gb_per_second; and server_mbps.",
    )
    parser.add_argument("sites", type=given_path, metavar="SITES.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    parser.add_argument(
        "--to",
        type=given_path,
        default=None,
        metavar="PLAN.yaml",
        help="write the run's "
        "overrides there, and beside it as .toml for `flwr run . --run-config`",
    )
    parser.add_argument("--max-local-steps", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--min-overlap",
        type=int,
        default=0,
        help="default: half of the workers, 4 from eight workers on",
    )
    parser.add_argument(
        "--headroom",
        type=float,
        default=0.2,
        help="share of memory to leave to activations, default: %(default)s",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        help="sequences of a step over all workers, default: those of the settings",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from fomoe_flwr import plan
    from fomoe_flwr.config import expand_files, load_settings
    from fomoe_flwr.model.source import settle

    bounds = plan.Bounds(
        options.max_local_steps, options.min_overlap, options.headroom, options.batch
    )
    given = expand_files(options.overrides)
    made = plan.make_plan(load_settings(given, settle), plan.read_sites(options.sites), bounds)
    overrides = plan.plan_overrides(made, given)
    # A plan that no run would take is none.
    load_settings(overrides, settle)
    print(plan.plan_json(made, overrides) if options.json else plan.show_plan(made))
    if options.to is not None:
        _write_plan(options.to, made, overrides)
    return 0


def _write_plan(path: Path, made: Plan, overrides: Sequence[str]) -> None:
    from fomoe_flwr import plan
    from fomoe_flwr.config import SettingsError
    from fomoe_flwr.errors import refusal
    from fomoe_flwr.files import check_file

    toml = path.with_suffix(".toml")
    if path.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"--to={path} must end in .yaml: that is how `fomoe run` knows a file")
    for target in (path, toml):
        check_file(target, "--to", plan.MARK)
    try:
        path.write_text(plan.plan_yaml(made, overrides), encoding="utf-8")
        toml.write_text(plan.plan_toml(overrides), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write the plan: {refusal(error)}") from error
    print(
        f"wrote {path} and {toml}: fomoe run {path}, or flwr run . --run-config {toml}",
        file=sys.stderr,
    )
