"""The sweep command: plan and check, hand the jobs to Hydra, gather what came out."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fomoe_flwr.config import SettingsError, conf_dir, parse_overrides, quoted, register_paper_rows
from fomoe_flwr.events import is_json, tell
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import end_if_running, run_job
from fomoe_flwr.sweep.plan import Plan, drawn_job, plan_sweep
from fomoe_flwr.sweep.progress import Progress
from fomoe_flwr.sweep.table import print_table, write_table


def sweep(words: Sequence[str], folder: Path | None, skip_invalid: bool) -> bool:
    """Run every job of a sweep that is not done yet; return whether all were completed.

    Raises SettingsError before anything runs: for words that Hydra does not take, and, unless they
    are to be skipped, for combinations that contradict themselves.
    """
    plan = plan_sweep(words)
    _refuse(plan, skip_invalid)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = SweepDirectory(folder or Path("outputs") / f"{stamp}-sweep")
    with directory.claimed():
        plan.save(directory.plan_file)
        for job in plan.jobs:
            # A sweep that was killed leaves jobs that say they run.
            end_if_running(directory.folder(job))
        count = f"{len(plan.jobs)} jobs" if plan.jobs else "jobs as the sweeper draws them"
        path = str(directory.path)
        tell("sweep", f"sweep directory: {path}\n{count}", path=path, jobs=len(plan.jobs))
        for job in plan.jobs:
            if job.refusal:
                tell(
                    "job",
                    f"skipped   {job.label}: {job.refusal}",
                    job=job.label,
                    status="skipped",
                    error=job.refusal,
                )
        launched = False
        try:
            with Progress(directory, plan, lambda: _gather(directory)):
                launched = _launch(plan, directory)
        finally:
            for job in directory.plan().jobs:
                end_if_running(directory.folder(job))
            _gather(directory)
        if not is_json():
            print_table(directory)
        tell(
            "summary",
            f"table: {directory.table}\nreport: {directory.report}\nsweep directory: {path}",
            path=path,
            table=str(directory.table),
            report=str(directory.report),
        )
    jobs = [job for job in directory.plan().jobs if not job.refusal]
    return launched and all(directory.record(job).status == "completed" for job in jobs)


def resume(folder: Path, words: Sequence[str], skip_invalid: bool) -> bool:
    """Go on with a sweep; `words` may choose another launcher and nothing else."""
    directory = SweepDirectory(folder)
    before = Plan.load(directory.plan_file)
    if strangers := [o.input_line for o in parse_overrides(words) if not o.is_hydra_override()]:
        raise SettingsError(
            f"{strangers[0]} cannot change when a sweep is resumed; to add jobs give all words "
            f"again with --dir {folder}"
        )
    skip_invalid = skip_invalid or any(job.refusal for job in before.jobs)
    return sweep([*before.words, *(words or before.launcher)], directory.path, skip_invalid)


def train(_: DictConfig) -> float:
    """Run one job for Hydra; return its held-out loss, NaN without one.

    Called by whatever launcher was chosen, in whatever process and on whatever machine that is.
    """
    config = HydraConfig.get()
    directory = SweepDirectory(Path(config.sweep.dir))
    overrides = sorted(config.overrides.task)
    known = {tuple(sorted(job.overrides)): job for job in directory.plan().jobs}
    job = known.get(tuple(overrides))
    if job is None:
        job = drawn_job(overrides)
        directory.folder(job).mkdir(parents=True, exist_ok=True)
        job.save(directory.folder(job) / "drawn.json")
    if job.refusal:
        return math.nan
    record = run_job(directory.folder(job), job.overrides)
    loss = directory.run(job).read_summary().get("eval/loss", {}).get("last")
    return math.nan if loss is None or record.status != "completed" else float(loss)


def _gather(directory: SweepDirectory) -> None:
    """Bring table and report up to date."""
    # matplotlib is slow to import, and a refused sweep draws nothing.
    from fomoe_flwr.sweep.page import sweep_page

    write_table(directory)
    try:
        sweep_page(directory)
    except Exception as error:
        # The jobs and their table are worth more than their picture.
        warnings.warn(f"no report this time: {error!r}", stacklevel=2)


def _refuse(plan: Plan, skip_invalid: bool) -> None:
    refused = [job for job in plan.jobs if job.refusal]
    if not refused:
        return
    if len(refused) == len(plan.jobs):
        raise SettingsError(refused[0].refusal)
    if not skip_invalid:
        listed = "".join(f"\n  {job.label}: {job.refusal}" for job in refused)
        raise SettingsError(
            f"{len(refused)} of {len(plan.jobs)} combinations cannot run, nothing was started; "
            f"--invalid skip leaves them out:{listed}"
        )


def _launch(plan: Plan, directory: SweepDirectory) -> bool:
    """Let Hydra's sweeper and launcher run the jobs; return whether they got through."""
    register_paper_rows()
    given = sys.argv
    sys.argv = ["fomoe-sweep", "--multirun", f"hydra.sweep.dir={quoted(str(directory.path))}"]
    sys.argv += [*plan.launcher, *plan.words]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="sweep")(train)()
    except SystemExit as status:
        # Hydra has printed why.
        return not status.code
    finally:
        sys.argv = given
    return True
