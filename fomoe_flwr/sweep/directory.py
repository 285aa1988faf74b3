"""The directory of a sweep: its plan, its jobs and what came out of each."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fomoe_flwr.config import SettingsError
from fomoe_flwr.errors import refusal
from fomoe_flwr.files import check_folder
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.sweep.job import JobRecord, read_record
from fomoe_flwr.sweep.plan import Job, Plan


class SweepDirectory:
    """Paths and files of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.plan_file = self.path / "sweep.json"
        self.jobs = self.path / "jobs"
        self.table = self.path / "results.csv"
        self.report = self.path / "report.html"
        self.plots = self.path / "plots"

    @property
    def is_sweep(self) -> bool:
        """Whether a sweep was ever begun here."""
        return self.plan_file.is_file()

    def plan(self) -> Plan:
        """Read the plan, with the jobs that a sweeper of Hydra's drew as it went."""
        plan = Plan.load(self.plan_file)
        if plan.jobs:
            return plan
        drawn = [Job.load(path) for path in sorted(self.jobs.glob("*/drawn.json"))]
        return Plan(plan.words, plan.launcher, tuple(drawn))

    def folder(self, job: Job) -> Path:
        """Return a job's folder, which is its run directory."""
        return self.jobs / job.name

    def run(self, job: Job) -> RunDirectory:
        """Return a job's run directory."""
        return RunDirectory(self.folder(job))

    def record(self, job: Job) -> JobRecord:
        """Read how a job went."""
        if job.refusal:
            return JobRecord("skipped", job.refusal)
        return read_record(self.folder(job))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other sweeps out of this directory. Raises SettingsError."""
        if not self.is_sweep:
            check_folder(self.path, "--dir", [".lock", self.jobs.name])
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise SettingsError(f"--dir {refusal(error)}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SettingsError(f"another sweep is at work in {self.path}") from error
            yield
