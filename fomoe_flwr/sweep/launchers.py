"""Hydra's submitit launchers, with a wait of ours: one bad job ends nobody's wait, and none hangs.

The plugin's own `launch` stops at the first job that ended badly, waits for ever for one that never
began, and forgets what it submitted when it is interrupted.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import OmegaConf

from fomoe_flwr.config import SettingsError
from fomoe_flwr.errors import one_line
from fomoe_flwr.events import tell
from fomoe_flwr.sweep import slurm
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import is_complete
from fomoe_flwr.sweep.plan import Job
from fomoe_flwr.sweep.queue import Submission, listed

_ASK_SECONDS = (2.0, 15.0)
"""Between two questions to SLURM: at first, and after some minutes."""


def register() -> None:
    """Make Hydra take our launchers where it was told to take the plugin's."""
    # Hydra loads launchers from its own packages only, by name; so the name stays theirs.
    for ours in (SlurmLauncher, LocalLauncher):
        theirs = f"{submitit_launcher.__name__}.{ours.__name__}"
        Plugins.instance().class_name_to_class[theirs] = ours


class _Launcher(submitit_launcher.BaseSubmititLauncher):
    """Submit what is left of a sweep, wait for all of it, return losses."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch; a job that failed gives NaN. Raises SettingsError if none is accepted."""
        sweep = SweepDirectory(Path(self.config.hydra.sweep.dir))
        jobs = [sweep.find(overrides) for overrides in job_overrides]
        live = sweep.queue.live()
        left = [
            (job, (list(words), "hydra.sweep.dir", number, f"job_{number}", Singleton.get_state()))
            for number, (job, words) in enumerate(
                zip(jobs, job_overrides, strict=True), initial_job_idx
            )
            if not job.refusal and job.name not in live and sweep.record(job).status != "completed"
        ]
        if left:
            submitted = self._submit([arguments for _, arguments in left])
            self.wait(
                sweep, jobs, {job.name: s for (job, _), s in zip(left, submitted, strict=True)}
            )
        elif live:
            self.wait(sweep, jobs, {})
        return [
            JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=sweep.loss(job))
            for job, words in zip(jobs, job_overrides, strict=True)
        ]

    def wait(
        self, sweep: SweepDirectory, jobs: Sequence[Job], submitted: Mapping[str, Any]
    ) -> None:
        """Wait until none of these jobs is left."""
        raise NotImplementedError

    def _submit(self, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        import submitit

        # Other than the plugin, no local job starts again by itself when it meets its limit.
        own = {"submitit_folder", "max_num_timeout"}
        restarts = {f"{self._EXECUTOR}_max_num_timeout": self.params.get("max_num_timeout", 0)}
        plain = set(OmegaConf.structured(BaseQueueConf).keys())
        try:
            executor = submitit.AutoExecutor(
                folder=self.params["submitit_folder"], cluster=self._EXECUTOR, **restarts
            )
            executor.update_parameters(
                **{
                    key if key in plain else f"{self._EXECUTOR}_{key}": value
                    for key, value in self.parameters().items()
                    if key not in own
                }
            )
            # submitit prints what sbatch says, and raises it too.
            with contextlib.redirect_stderr(io.StringIO()), self.submitting():
                return list(executor.map_array(self, *zip(*arguments, strict=True)))
        except submitit.core.utils.FailedJobError as error:
            reason = one_line(error).replace("sbatch: error: ", "")
            change = "change hydra.launcher.KEY, e.g. hydra.launcher.partition"
            todo = "try again when it answers" if "contact" in reason else change
            raise SettingsError(
                f"sbatch refused the jobs, nothing was submitted: {reason}; {todo}"
            ) from error

    def parameters(self) -> dict[str, Any]:
        """Return what the executor gets."""
        return dict(self.params)

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Surround the submission."""
        yield


class LocalLauncher(_Launcher):
    """Processes of this machine, all at a time."""

    _EXECUTOR = "local"

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Keep a terminal's ctrl-C from the processes: the sweep ends their runs, and so them."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def wait(
        self, sweep: SweepDirectory, jobs: Sequence[Job], submitted: Mapping[str, Any]
    ) -> None:
        """Wait until all processes are gone."""
        limit = self.params["timeout_min"]
        tell(
            "queue",
            f"{len(submitted)} jobs start at once, time limit {limit} min each "
            "(hydra.launcher.timeout_min)",
        )
        while not all(each.done() for each in submitted.values()):
            time.sleep(0.5)
        tidy(sweep, {name: each.paths.folder for name, each in submitted.items()})


class SlurmLauncher(_Launcher):
    """Jobs of a SLURM cluster."""

    _EXECUTOR = "slurm"

    def parameters(self) -> dict[str, Any]:
        """Return the plugin's parameters, without the signal that ends jobs before their time."""
        given = dict(self.params)
        if not given.get("max_num_timeout"):
            # submitit has SLURM send USR2 minutes before the limit, and then ends the job.
            harmless = {"signal": f"CONT@{given.get('signal_delay_s', 120)}"}
            given["additional_parameters"] = harmless | (given.get("additional_parameters") or {})
        return given

    def wait(
        self, sweep: SweepDirectory, jobs: Sequence[Job], submitted: Mapping[str, Any]
    ) -> None:
        """Wait until SLURM is done with all jobs; those of an earlier sweep are waited for too."""
        now = time.time()
        attached = sweep.queue.live()
        new = {
            job.name: Submission(
                each.job_id, now, sweep.record(job).attempts, str(each.paths.stderr), since=now
            )
            for job in jobs
            if (each := submitted.get(job.name)) is not None
        }
        sweep.queue.put(new)
        if attached:
            tell(
                "queue", f"{listed(attached.values())} went on without this sweep: waiting for them"
            )
        if new:
            limit = self.params["timeout_min"]
            tell(
                "queue",
                f"submitted {listed(new.values())}, time limit {limit} min each "
                "(hydra.launcher.timeout_min)",
            )
        watch(sweep, jobs)
        tidy(sweep, {name: Path(each.log).parent for name, each in sweep.queue.read().items()})


def watch(
    sweep: SweepDirectory, jobs: Sequence[Job], pause: Callable[[float], None] = time.sleep
) -> None:
    """Keep the queue's file true until SLURM is done with all of these jobs."""
    labels = {job.name: job.label for job in jobs}
    began = time.monotonic()
    silent_since = ""
    ending: dict[str, str] = {}
    while live := {name: each for name, each in sweep.queue.live().items() if name in labels}:
        try:
            found = slurm.look({each.id for each in live.values()})
        except slurm.NoAnswerError as error:
            if all(is_complete(sweep.jobs / name) for name in live):
                return
            if not silent_since:
                silent_since = f"{datetime.now():%H:%M:%S}"
                tell("queue", f"SLURM does not answer, asking on: {error}")
        else:
            if silent_since:
                tell("queue", f"SLURM answers again (it did not since {silent_since})")
                silent_since = ""
            news = {name: each.seen(found[each.id]) for name, each in live.items()}
            # A job that is put back in the queue may look ended for a moment.
            sweep.queue.put(
                {
                    name: each
                    for name, each in news.items()
                    if not each.ended or each.state in ("COMPLETED", ending.get(name))
                }
            )
            for name, each in news.items():
                if live[name].runs and not each.runs and not each.ended:
                    tell(
                        "queue",
                        f"    requeued  {labels[name]}: SLURM put job {each.id} back in the queue "
                        f"({each.reason or each.state}); it goes on from its last checkpoint",
                    )
            ending = {name: each.state for name, each in news.items() if each.ended}
        soonest, latest = _ASK_SECONDS
        pause(min(latest, max(soonest, (time.monotonic() - began) / 10)))


def tidy(sweep: SweepDirectory, folders: Mapping[str, Path]) -> None:
    """Remove what launching left behind, but the logs of jobs that failed."""
    live = sweep.queue.live()
    done = {job.name for job in sweep.plan().jobs if sweep.record(job).status == "completed"}
    sweep.queue.drop(done - set(live))
    own = sweep.path / ".submitit"
    if live or not own.is_dir():
        return
    kept = {folder for name, folder in folders.items() if name not in done}
    _remove(path for path in own.iterdir() if path not in kept)
    for folder in kept:
        _remove(path for path in folder.glob("*") if path.suffix not in (".err", ".out"))
    with contextlib.suppress(OSError):
        own.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
