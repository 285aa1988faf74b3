"""The jobs of a sweep that stand in SLURM's queue: what was submitted and what became of it.

One file, `SWEEP/queue.json`, written only by the `fomoe sweep` that waits. A job writes `job.json`;
`told` makes one story of the two.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fomoe_flwr.files import save_json
from fomoe_flwr.sweep.job import JobRecord

UNKNOWN = "UNKNOWN"
"""SLURM has forgotten the job."""

_MEANING = {
    "TIMEOUT": "it met its time limit of {limit}",
    "CANCELLED": "somebody cancelled it (scancel)",
    "NODE_FAIL": "its node {node} failed",
    "BOOT_FAIL": "its node did not start",
    "OUT_OF_MEMORY": "it needed more memory than it had",
    "PREEMPTED": "another job took its place",
    "DEADLINE": "it met its deadline",
    "REVOKED": "another cluster took it",
    "FAILED": "its process ended before the run had",
    "COMPLETED": "its process ended before the run had",
    UNKNOWN: "SLURM no longer knows it, and the run is not whole",
}
"""SLURM's words for jobs that have ended."""

_KEY = {"TIMEOUT": "timeout_min=MINUTES", "DEADLINE": "timeout_min=MINUTES"} | {
    "OUT_OF_MEMORY": "mem_gb=GB"
}
"""What to give more of."""

_RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED")


@dataclass(frozen=True)
class Look:
    """What SLURM says of a job."""

    state: str
    reason: str = ""
    limit: str = ""
    node: str = ""


@dataclass(frozen=True)
class Submission:
    """A job in SLURM's queue."""

    id: str
    submitted: float
    """Unix time, like `since`."""
    attempts: int = 0
    """Of the run, before this submission."""
    log: str = ""
    """What the job's process prints, beside `job.log` of the run."""
    state: str = "PENDING"
    """SLURM's word."""
    since: float = 0.0
    reason: str = ""
    limit: str = ""
    node: str = ""

    @property
    def ended(self) -> bool:
        """Whether SLURM is done with it."""
        return self.state in _MEANING

    @property
    def runs(self) -> bool:
        """Whether it has a node."""
        return self.state in _RUNNING

    def seen(self, look: Look) -> Submission:
        """Return the submission as SLURM tells it now."""
        since = self.since if look.state == self.state else time.time()
        return replace(self, since=since, **asdict(look))

    def ending(self) -> str:
        """Say why it ended, beginning with SLURM's word."""
        meaning = _MEANING[self.state].format(limit=self.limit or "?", node=self.node or "?")
        return f"{self.state}: {meaning}, SLURM job {self.id}"


class Queue:
    """The file of a sweep's submissions, by the names of its jobs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: object = None
        self._known: dict[str, Submission] = {}

    def read(self) -> Mapping[str, Submission]:
        """Return every submission; nothing without the file."""
        try:
            status = self.path.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if stamp != self._stamp:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self._known = {name: Submission(**fields) for name, fields in stored.items()}
                self._stamp = stamp
        except (OSError, ValueError, TypeError):
            return {}
        return self._known

    def live(self) -> dict[str, Submission]:
        """Return those that SLURM is not done with."""
        return {name: each for name, each in self.read().items() if not each.ended}

    def put(self, news: Mapping[str, Submission]) -> None:
        """Write down what is new."""
        self._write({**self.read(), **news})

    def drop(self, names: Collection[str]) -> None:
        """Forget these."""
        self._write({name: each for name, each in self.read().items() if name not in names})

    def _write(self, after: Mapping[str, Submission]) -> None:
        if not after:
            self.path.unlink(missing_ok=True)
        elif after != self.read():
            save_json({name: asdict(each) for name, each in after.items()}, self.path)


def told(record: JobRecord, submission: Submission | None) -> JobRecord:
    """Return how a job goes, from its own record and from what SLURM says.

    While SLURM has the job, its state counts: a record of failure may be half of a requeue. Once it
    has ended, a word that tells more than the run's own record is the reason.
    """
    if submission is None or record.status == "completed":
        return record
    if not submission.ended:
        return replace(record, status="running" if submission.runs else "queued", error="")
    own = record.status == "failed" and record.attempts > submission.attempts
    if own and submission.state in ("COMPLETED", "FAILED", UNKNOWN):
        return record
    return replace(record, status="failed", error=submission.ending())


def advice(folder: Path, errors: Collection[str]) -> str:
    """Return the command that goes on after these errors."""
    more = dict.fromkeys(_KEY[word] for e in errors if (word := e.partition(":")[0]) in _KEY)
    return " ".join([f"fomoe sweep --resume {folder}", *(f"hydra.launcher.{key}" for key in more)])


def listed(submissions: Collection[Submission]) -> str:
    """Return `3 SLURM jobs (7_0, 7_1, 8)`."""
    ids = [each.id for each in submissions]
    shown = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    return f"{len(ids)} SLURM job{'s' * (len(ids) > 1)} ({shown})"
