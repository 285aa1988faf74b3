"""The sweep command: plan and check, hand the jobs to Hydra, gather what came out."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from fomoe_flwr.config import SettingsError, conf_dir, paper_rows_known, parse_overrides, quoted
from fomoe_flwr.errors import RunError, one_line, reason_of
from fomoe_flwr.events import is_json, tell, warn
from fomoe_flwr.federation.deployment.guardian import guarded_children
from fomoe_flwr.sweep import slurm
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import end_if_running, read_record, run_job, write_record
from fomoe_flwr.sweep.plan import Plan, plan_sweep
from fomoe_flwr.sweep.progress import Progress
from fomoe_flwr.sweep.queue import listed, told
from fomoe_flwr.sweep.table import print_table, write_table


def sweep(words: Sequence[str], folder: Path | None, skip_invalid: bool) -> bool:
    """Run every job of a sweep that is not done yet; return whether all were completed.

    Raises SettingsError before anything runs: for words that Hydra does not take, and, unless they
    are to be skipped, for combinations that contradict themselves.
    """
    plan = plan_sweep(words)
    _refuse(plan, skip_invalid)
    on_slurm = "hydra/launcher=submitit_slurm" in plan.launcher
    if on_slurm:
        slurm.check_programs()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = SweepDirectory(folder or Path("outputs") / f"{stamp}-sweep")
    with directory.claimed():
        _settle(directory, on_slurm)
        plan.save(directory.plan_file)
        _end_local(directory, plan)
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
        broken = None
        try:
            # Jobs in SLURM's queue go on without this process.
            guard = contextlib.nullcontext() if on_slurm else guarded_children()
            with guard, Progress(directory, plan, lambda: _gather(directory)):
                _launch(plan, directory)
        except BrokenExecutor as error:
            broken = RunError(f"a process of the launcher was killed: {one_line(error)}")
            broken.__cause__ = error
        finally:
            _end_local(directory, directory.plan())
            if live := directory.queue.live():
                ids = " ".join(dict.fromkeys(each.id.partition("_")[0] for each in live.values()))
                tell(
                    "queued",
                    f"{listed(live.values())} stay in SLURM's queue; wait for them again: "
                    f"fomoe sweep --resume {directory.path}; end them: scancel {ids}",
                    path=path,
                )
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
    if broken:
        raise broken
    jobs = [job for job in directory.plan().jobs if not job.refusal]
    return all(directory.record(job).status == "completed" for job in jobs)


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
    launcher = list(before.launcher)
    keys = {word.partition("=")[0] for word in words}
    if "hydra/launcher" in keys:
        launcher = []
    launcher = [word for word in launcher if word.partition("=")[0] not in keys]
    return sweep([*before.words, *launcher, *words], directory.path, skip_invalid)


def train(_: DictConfig) -> float:
    """Run one job for Hydra; return its held-out loss, NaN without one.

    Called by whatever launcher was chosen, in whatever process and on whatever machine that is.
    """
    config = HydraConfig.get()
    directory = SweepDirectory(Path(config.sweep.dir))
    job = directory.find(config.overrides.task)
    if not job.refusal:
        run_job(directory.folder(job), job.overrides)
    return directory.loss(job)


def _settle(directory: SweepDirectory, on_slurm: bool) -> None:
    """Learn what became of the jobs that an earlier sweep left in SLURM's queue.

    Raises SettingsError if some are there and this sweep would run them a second time, RunError if
    SLURM does not tell.
    """
    queue = directory.queue
    if live := queue.live():
        try:
            found = slurm.look({each.id for each in live.values()})
        except slurm.NoAnswerError as error:
            raise RunError(
                f"{listed(live.values())} of this sweep may be in the queue, and SLURM does "
                f"not tell ({error}); try again where it answers, or remove {queue.path} if they "
                "are gone"
            ) from error
        queue.put({name: each.seen(found[each.id]) for name, each in live.items()})
    if queue.live() and not on_slurm:
        raise SettingsError(
            f"{listed(queue.live().values())} of this sweep are in the queue: scancel them "
            "first, or resume with hydra/launcher=submitit_slurm"
        )
    # From here on the jobs' own records tell it.
    ended = {name: each for name, each in queue.read().items() if each.ended}
    for name, each in ended.items():
        folder = directory.jobs / name
        write_record(folder, told(read_record(folder), each))
    queue.drop(ended)


def _end_local(directory: SweepDirectory, plan: Plan) -> None:
    """End jobs that a sweep without SLURM left running on this machine."""
    live = directory.queue.live()
    for job in plan.jobs:
        if job.name not in live:
            end_if_running(directory.folder(job))


def _gather(directory: SweepDirectory) -> None:
    """Bring table and report up to date."""
    # matplotlib is slow to import, and a refused sweep draws nothing.
    from fomoe_flwr.sweep.page import sweep_page

    write_table(directory)
    try:
        sweep_page(directory)
    except Exception as error:
        # The jobs and their table are worth more than their picture.
        warn(f"no report this time: {reason_of(error)}")


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


def _launch(plan: Plan, directory: SweepDirectory) -> None:
    """Let Hydra's sweeper and launcher run the jobs. Raises SettingsError for Hydra's own words."""
    main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="sweep")
    given, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # So that errors come here; Hydra would print a traceback of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = ["fomoe-sweep", "--multirun", f"hydra.sweep.dir={quoted(str(directory.path))}"]
    sys.argv += [*plan.launcher, *plan.words]
    try:
        if any("submitit" in word for word in plan.launcher):
            with contextlib.suppress(ImportError):
                from fomoe_flwr.sweep import launchers

                launchers.register()
        with paper_rows_known(plan.words):
            main(train)()
    except HydraException as error:
        reason = one_line(error)
        if "Could not find 'hydra/launcher/" in reason:
            reason += "; the launchers need: pip install 'fomoe-flwr[sweep]'"
        raise SettingsError(reason) from error
    finally:
        sys.argv = given
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
