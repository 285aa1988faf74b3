"""`fomoe bench`: the speed of this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fomoe_flwr.cli.paths import given_path
from fomoe_flwr.errors import InputError

_STEP_EXAMPLES = """examples:
  fomoe bench step                                   # the demo's model, on this machine
  fomoe bench step model=olmoe-fine local.threads=2 data.sequence_length=256
  fomoe bench step model=olmoe-1b4 local.precision=bfloat16_parameters \\
      local.batch_size=16 data.sequence_length=1024  # a GPU of 80 GB
"""

_MARK = {"written by": "fomoe bench step"}
_START = json.dumps(_MARK, indent=2).removesuffix("\n}")


def add_bench(commands: Any) -> None:
    """Add `bench` and its own commands to the command line."""
    bench = commands.add_parser("bench", help="measure speed on this machine")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    step = benches.add_parser(
        "step",
        help="the training step, against its FLOP limit and transformers' own",
        epilog=_STEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    step.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    step.add_argument(
        "--share",
        action="append",
        type=float,
        help="resident share of the experts, repeatable (default: 1, .75, .5, .25, .125)",
    )
    step.add_argument("--steps", type=int, default=15, help="timed steps (default: 15)")
    step.add_argument("--warmup", type=int, default=5, help="steps before those (default: 5)")
    step.add_argument("--own-only", action="store_true", help="leave out transformers' steps")
    step.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    step.add_argument(
        "--to", type=given_path, default=None, help="write the JSON object to this file"
    )
    step.set_defaults(run=_bench_step)


def _bench_step(options: argparse.Namespace) -> int:
    for share in options.share or ():
        if not 0 <= share <= 1:
            raise InputError(f"--share {share} is out of range: it must be >= 0 and <= 1")
    for name in ("steps", "warmup"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)} is out of range: it must be >= 1")
    from fomoe_flwr.config import load_settings
    from fomoe_flwr.files import check_file, save_json
    from fomoe_flwr.model.source import settle

    if options.to is not None:
        # Now: what follows takes minutes.
        check_file(options.to, "--to", _START)
        options.to.parent.mkdir(parents=True, exist_ok=True)
    settings = load_settings(options.overrides, settle)
    import torch

    from fomoe_flwr import report
    from fomoe_flwr.worker import step_benchmark
    from fomoe_flwr.worker.device import check_device, pick_device

    check_device("local.device", settings.local.device)
    if settings.local.threads:
        torch.set_num_threads(settings.local.threads)
    result = step_benchmark.measure(
        settings,
        options.share or step_benchmark.SHARES,
        pick_device(settings.local.device),
        steps=options.steps,
        warmup=options.warmup,
        baselines=() if options.own_only else (step_benchmark.STOCK, step_benchmark.PLAIN),
    )
    document = {**_MARK, **report.environment(), **result}
    if options.to is not None:
        save_json(document, options.to)
    print(json.dumps(document, indent=2) if options.json else step_benchmark.table(result))
    return 0
