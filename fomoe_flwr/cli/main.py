"""The `fomoe` command."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fomoe_flwr import __version__
from fomoe_flwr.cli.federation import add_federation
from fomoe_flwr.config import SettingsError, expand_files, load_settings
from fomoe_flwr.errors import InputError, RunError

if TYPE_CHECKING:
    from fomoe_flwr.plan import Plan

_EXAMPLES = """examples:
  fomoe run preset=tiny
  fomoe run engine=flower
  fomoe run experiment=diloco rounds=4
  fomoe run layout.num_workers=8 layout.overlap=2 layout.kind=random model.routing=partitioned
  fomoe run data.path=/data/texts data.partition=by_domain
  fomoe run resume=outputs/20261123-120000-fomoe-demo
"""

_SWEEP_EXAMPLES = """examples:
  fomoe sweep preset=tiny layout.overlap=1,2 seed=0,1,2
  fomoe sweep -m experiment=photon,diloco,fomoe --dir outputs/methods
  fomoe sweep --resume outputs/methods
  fomoe sweep preset=tiny seed=0,1,2,3 hydra/launcher=joblib hydra.launcher.n_jobs=2
  fomoe sweep seed=0,1,2,3 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
The launchers need the extra: pip install 'fomoe-flwr[sweep]'
"""


_STEP_EXAMPLES = """examples:
  fomoe bench step                                   # the demo's model, on this machine
  fomoe bench step model=olmoe-fine local.threads=2 data.sequence_length=256
  fomoe bench step model=olmoe-1b4 local.precision=bfloat16_parameters \\
      local.batch_size=16 data.sequence_length=1024  # a GPU of 80 GB
"""


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides in one piece only, not before and after an option.
    if unknown := [word for word in rest if word.startswith("-") or "overrides" not in options]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides += rest
    return options


def _terminate(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fomoe", description="Federated pre-training of MoE language models."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="train: settings are Hydra overrides, see conf/",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    run.set_defaults(run=_run)
    many = commands.add_parser(
        "sweep",
        help="train many: values separated by commas, in all combinations",
        epilog=_SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many.add_argument("-m", "--multirun", action="store_true", help="implied; as in Hydra")
    many.add_argument("--dir", type=Path, metavar="SWEEP", help="go on there if it exists")
    many.add_argument("--resume", type=Path, metavar="SWEEP", help="go on with a stored sweep")
    many.add_argument(
        "--invalid",
        choices=("refuse", "skip"),
        default="refuse",
        help="combinations that contradict themselves: refuse the sweep, or leave them out",
    )
    many.add_argument("overrides", nargs="*", metavar="KEY=VALUE,VALUE")
    many.set_defaults(run=_sweep)
    cost = commands.add_parser("costs", help="what a run would cost, without running it")
    cost.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    cost.add_argument("--json", action="store_true", help="one JSON object")
    cost.add_argument("--explain", action="store_true", help="each formula, and the numbers put in")
    cost.add_argument(
        "--sweep", type=Path, default=None, metavar="FOLDER", help="draw sweeps there, as PNGs"
    )
    cost.set_defaults(run=_costs)
    plan = commands.add_parser(
        "plan",
        help="workers, overlap, layout and local steps for given sites and a model",
        description="Minimise the time to a token budget (costs.tokens) within the sites' memory. "
        "The sites file: a list `sites` with name, memory_gib, teraflops, up_mbps and down_mbps of "
        "each, and if need be latency_seconds, mfu and state_gb_per_second; and server_mbps.",
    )
    plan.add_argument("sites", type=Path, metavar="SITES.yaml")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    plan.add_argument(
        "--to",
        type=Path,
        default=None,
        metavar="PLAN.yaml",
        help="write the run's "
        "overrides there, and beside it as .toml for `flwr run . --run-config`",
    )
    plan.add_argument("--max-local-steps", type=int, default=64, help="default: %(default)s")
    plan.add_argument(
        "--min-overlap",
        type=int,
        default=0,
        help="default: half of the workers, 4 from eight workers on",
    )
    plan.add_argument(
        "--headroom",
        type=float,
        default=0.2,
        help="share of memory to leave to activations, default: %(default)s",
    )
    plan.add_argument(
        "--batch",
        type=int,
        default=0,
        help="sequences of a step over all workers, default: those of the settings",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object")
    plan.set_defaults(run=_plan)
    score = commands.add_parser("evaluate", help="score a run's newest checkpoint")
    score.add_argument("folder", type=Path, metavar="RUN")
    score.add_argument("--split", choices=("validation", "test"), default="validation")
    score.add_argument("--max-tokens", type=int, default=None, help="default: eval.max_tokens")
    score.set_defaults(run=_evaluate)
    sample = commands.add_parser("sample", help="continue a prompt with a run's newest checkpoint")
    sample.add_argument("folder", type=Path, metavar="RUN")
    sample.add_argument("--prompt", default="The ")
    sample.add_argument("--tokens", type=int, default=100)
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(run=_sample)
    export = commands.add_parser("export", help="write a transformers checkpoint")
    export.add_argument("folder", type=Path, metavar="RUN")
    export.add_argument("--to", type=Path, default=None, help="default: RUN/export")
    export.set_defaults(run=_export)
    view = commands.add_parser(
        "report", help="print a table and draw report.html and the plots again"
    )
    view.add_argument("folder", type=Path, metavar="RUN_OR_SWEEP")
    view.set_defaults(run=_report)
    warm = commands.add_parser(
        "worker", help="keep a node's worker warm beside its SuperNode, see docs/warm-workers.md"
    )
    warm.add_argument("folder", metavar="FOLDER", help="the node's `worker-dir`")
    warm.add_argument("--idle-seconds", type=float, default=0, help="end after so long (0: never)")
    warm.add_argument("--with-process", type=int, default=0, metavar="PID", help="end with it")
    warm.set_defaults(run=_worker)
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
    step.add_argument("--to", type=Path, default=None, help="write the JSON object to this file")
    step.set_defaults(run=_bench_step)
    state = commands.add_parser("status", help="where a run is, who is missing, what it uses")
    state.add_argument("folder", type=Path, metavar="RUN")
    state.add_argument("--json", action="store_true", help="one JSON object")
    state.set_defaults(run=_status)
    add_federation(commands)
    return parser


def _status(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.status import run_status, show_status

    status = run_status(options.folder)
    print(json.dumps(status, indent=2) if options.json else show_status(status))
    return 0


def _worker(options: argparse.Namespace) -> int:
    from fomoe_flwr.federation.warm.folder import Folder
    from fomoe_flwr.federation.warm.process import run_warm_worker

    run_warm_worker(Folder(options.folder), options.idle_seconds, options.with_process)
    return 0


def _run(options: argparse.Namespace) -> int:
    overrides = expand_files(options.overrides)
    from fomoe_flwr.run.directory import absolute
    from fomoe_flwr.run.preflight import preflight

    settings = absolute(load_settings(overrides))

    preflight(settings)
    if settings.engine == "flower":
        from fomoe_flwr.federation.deployment.launch import run_with_flower

        done = run_with_flower(settings, overrides)
    else:
        from fomoe_flwr.federation.in_process import run_in_process

        done = run_in_process(settings)
    if not done:
        print(f"error: the run failed, see {settings.output_dir}", file=sys.stderr)
    return 0 if done else 1


def _sweep(options: argparse.Namespace) -> int:
    from fomoe_flwr.sweep.command import resume, sweep

    skip = options.invalid == "skip"
    if options.resume and options.dir:
        raise InputError("--resume and --dir name the same thing: give one of them")
    if options.resume:
        done = resume(options.resume, options.overrides, skip)
    elif options.overrides:
        done = sweep(options.overrides, options.dir, skip)
    else:
        raise InputError("a sweep needs something that varies, e.g. seed=0,1,2")
    return 0 if done else 1


def _costs(options: argparse.Namespace) -> int:
    from fomoe_flwr import costs

    settings = load_settings(expand_files(options.overrides))
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


def _plan(options: argparse.Namespace) -> int:
    from fomoe_flwr import plan

    bounds = plan.Bounds(
        options.max_local_steps, options.min_overlap, options.headroom, options.batch
    )
    given = expand_files(options.overrides)
    made = plan.make_plan(load_settings(given), plan.read_sites(options.sites), bounds)
    overrides = plan.plan_overrides(made, given)
    # A plan that no run would take is none.
    load_settings(overrides)
    print(plan.plan_json(made, overrides) if options.json else plan.show_plan(made))
    if options.to is not None:
        _write_plan(options.to, made, overrides)
    return 0


def _write_plan(path: Path, made: Plan, overrides: Sequence[str]) -> None:
    from fomoe_flwr import plan

    toml = path.with_suffix(".toml")
    if path.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"--to={path} must end in .yaml: that is how `fomoe run` knows a file")
    try:
        path.write_text(plan.plan_yaml(made, overrides), encoding="utf-8")
        toml.write_text(plan.plan_toml(overrides), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write the plan: {error}") from error
    print(
        f"wrote {path} and {toml}: fomoe run {path}, or flwr run . --run-config {toml}",
        file=sys.stderr,
    )


def _evaluate(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.stored import StoredRun

    result = StoredRun(options.folder).evaluate(options.split, options.max_tokens)
    print(json.dumps(result, indent=2))
    return 0


def _sample(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.stored import StoredRun

    print(StoredRun(options.folder).sample(options.prompt, options.tokens, options.seed))
    return 0


def _export(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.stored import StoredRun

    print(StoredRun(options.folder).export(options.to))
    return 0


def _report(options: argparse.Namespace) -> int:
    from fomoe_flwr import report
    from fomoe_flwr.run.stored import StoredRun
    from fomoe_flwr.sweep.directory import SweepDirectory
    from fomoe_flwr.sweep.table import print_table, write_table

    sweep = SweepDirectory(options.folder)
    if sweep.is_sweep:
        from fomoe_flwr.sweep.page import sweep_page

        write_table(sweep)
        print_table(sweep)
        print(sweep_page(sweep)[0])
        return 0
    stored = StoredRun(options.folder)
    report.print_end(stored.run)
    print(report.write_report(stored.run)[0])
    return 0


def _bench_step(options: argparse.Namespace) -> int:
    shares = options.share or None
    for share in shares or ():
        if not 0 <= share <= 1:
            raise InputError(f"--share {share} is out of range: it must be >= 0 and <= 1")
    for name in ("steps", "warmup"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)} is out of range: it must be >= 1")
    settings = load_settings(options.overrides)
    import torch

    from fomoe_flwr import report
    from fomoe_flwr.files import save_json
    from fomoe_flwr.worker import step_benchmark
    from fomoe_flwr.worker.round import pick_device

    if settings.local.device == "cuda" and not torch.cuda.is_available():
        raise InputError("local.device=cuda but torch sees no GPU: use auto or cpu")
    if settings.local.threads:
        torch.set_num_threads(settings.local.threads)
    result = step_benchmark.measure(
        settings,
        shares or step_benchmark.SHARES,
        pick_device(settings.local.device),
        steps=options.steps,
        warmup=options.warmup,
        baselines=() if options.own_only else (step_benchmark.STOCK, step_benchmark.PLAIN),
    )
    document = {**report.environment(), **result}
    if options.to is not None:
        options.to.parent.mkdir(parents=True, exist_ok=True)
        save_json(document, options.to)
    print(json.dumps(document, indent=2) if options.json else step_benchmark.table(result))
    return 0
