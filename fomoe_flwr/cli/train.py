"""`fomoe run`, `sweep` and `worker`: what trains."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_flwr import events
from fomoe_flwr.cli.paths import given_path
from fomoe_flwr.errors import InputError

if TYPE_CHECKING:
    from fomoe_flwr.config import Settings

_RUN_EXAMPLES = """examples:
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


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """Add the option of every command that tells how its work goes."""
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="json" if os.environ.get(events.VARIABLE) == "json" else "text",
        help="json: one object a line on stdout, see docs/how-to.md",
    )


def add_run(commands: Any) -> None:
    """Add `run` to the command line."""
    parser = commands.add_parser(
        "run",
        help="train: settings are Hydra overrides, see conf/",
        epilog=_RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    add_log_format(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from fomoe_flwr.worker.heap import prefer_large_pages

    prefer_large_pages()
    from fomoe_flwr.config import expand_files, load_settings
    from fomoe_flwr.model.source import settle
    from fomoe_flwr.run.directory import absolute

    overrides = expand_files(options.overrides)
    settings = absolute(load_settings(overrides, settle))
    # After the settings, so that wrong ones are refused without waiting for torch.
    from fomoe_flwr.run.phases import process_began
    from fomoe_flwr.run.preflight import preflight

    preflight(settings)
    if settings.engine == "flower":
        from fomoe_flwr.federation.deployment.launch import run_with_flower

        done = run_with_flower(settings, overrides)
    else:
        from fomoe_flwr.federation.in_process import run_in_process

        done = run_in_process(settings, process_began() if options.is_process else None)
    return exit_status(settings, done)


def exit_status(settings: Settings, done: bool) -> int:
    """Return the exit status of a run; say why it failed and where to look."""
    from fomoe_flwr.run.directory import RunDirectory

    if not done:
        summary = RunDirectory(Path(settings.output_dir)).read_summary()
        why = f": {summary['error']}; see" if summary.get("error") else ", see"
        reason = f"the run failed{why} {settings.output_dir}"
        print(f"error: {reason}", file=sys.stderr)
        events.tell_if_json("error", reason)
    return 0 if done else 1


def add_sweep(commands: Any) -> None:
    """Add `sweep` to the command line."""
    parser = commands.add_parser(
        "sweep",
        help="train many: values separated by commas, in all combinations",
        epilog=_SWEEP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="implied; as in Hydra")
    parser.add_argument("--dir", type=given_path, metavar="SWEEP", help="go on there if it exists")
    parser.add_argument(
        "--resume", type=given_path, metavar="SWEEP", help="go on with a stored sweep"
    )
    parser.add_argument(
        "--invalid",
        choices=("refuse", "skip"),
        default="refuse",
        help="combinations that contradict themselves: refuse the sweep, or leave them out",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE,VALUE")
    add_log_format(parser)
    parser.set_defaults(run=_sweep)


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


def add_worker(commands: Any) -> None:
    """Add `worker` to the command line."""
    parser = commands.add_parser(
        "worker", help="keep a node's worker warm beside its SuperNode, see docs/warm-workers.md"
    )
    parser.add_argument("folder", metavar="FOLDER", help="the node's `worker-dir`")
    parser.add_argument(
        "--idle-seconds", type=float, default=0, help="end after so long (0: never)"
    )
    parser.add_argument("--with-process", type=int, default=0, metavar="PID", help="end with it")
    add_log_format(parser)
    parser.set_defaults(run=_worker)


def _worker(options: argparse.Namespace) -> int:
    from fomoe_flwr.federation.warm.folder import Folder
    from fomoe_flwr.federation.warm.process import run_warm_worker

    run_warm_worker(Folder(options.folder), options.idle_seconds, options.with_process)
    return 0
