"""The progress of a sweep, watched from its folder, so that any launcher will do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fomoe_flwr.events import tell
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import JobRecord
from fomoe_flwr.sweep.plan import Job, Plan

_POLL_SECONDS = 1.0
_SILENCE_SECONDS = 60.0
"""After so long without a line, say what is running."""
_REFRESH_SECONDS = 20.0
_REFRESH_SHARE = 0.05
"""What comes of a sweep is drawn again while it runs, for this share of the time at most."""

_ENDED = ("completed", "failed")


class Progress:
    """A thread that prints a line for every job that ends, from `with` to its end.

    Parameters
    ----------
    refresh
        Called now and then while jobs end, to bring table and report up to date.
    """

    def __init__(self, sweep: SweepDirectory, plan: Plan, refresh: Callable[[], object]) -> None:
        self._sweep = sweep
        self._total = sum(not job.refusal for job in plan.jobs)
        self._refresh = refresh
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.monotonic()
        self._said = self._started
        self._next_refresh = self._started + _REFRESH_SECONDS
        # What earlier attempts left is no news.
        self._seen = {job.name: _attempt(sweep.record(job)) for job in sweep.plan().jobs}
        self._before = sum(sweep.record(job).status == "completed" for job in plan.jobs)
        self._news = 0

    def __enter__(self) -> Progress:
        if self._before:
            self._say(f"{self._before} of {self._total} jobs were completed before")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            changed = self._look()
            now = time.monotonic()
            if changed and now >= self._next_refresh:
                self._refresh()
                spent = time.monotonic() - now
                self._next_refresh = now + max(_REFRESH_SECONDS, spent / _REFRESH_SHARE)
            if now - self._said > _SILENCE_SECONDS:
                self._say_running()

    def _look(self) -> bool:
        """Print what happened since the last look; tell whether anything did."""
        changed = False
        for job in self._sweep.plan().jobs:
            record = self._sweep.record(job)
            if _attempt(record) == self._seen.get(job.name):
                continue
            self._seen[job.name] = _attempt(record)
            if record.status in _ENDED:
                changed = True
                self._news += 1
                self._say(self._line(job, record), job=job.label, **asdict(record))
        return changed

    def _line(self, job: Job, record: JobRecord) -> str:
        done = sum(self._sweep.record(j).status in _ENDED for j in self._sweep.plan().jobs)
        head = f"[{done:>3}/{self._total or '?'}] {record.status:<9} {job.label}"
        if record.status == "failed":
            return f"{head}: {record.error}; see {self._sweep.folder(job) / 'job.log'}"
        losses = self._sweep.run(job).read_summary().get("eval/loss", {})
        ending = f"loss {losses['last']:.4f} | " if losses.get("last") is not None else ""
        return f"{head} | {ending}{record.seconds:.0f} s{self._left(self._total - done)}"

    def _left(self, jobs: int) -> str:
        if jobs <= 0:
            return ""
        each = (time.monotonic() - self._started) / self._news
        return f" | {jobs} left, about {each * jobs / 60:.0f} min"

    def _say_running(self) -> None:
        running = [j for j in self._sweep.plan().jobs if self._sweep.record(j).status == "running"]
        for job in running:
            summary = self._sweep.run(job).read_summary()
            rounds = f"round {summary.get('rounds_done', 0)} of {summary.get('rounds', '?')}"
            self._say(f"    running   {job.label} | {rounds}", job=job.label, status="running")
        self._said = time.monotonic()

    def _say(self, line: str, **fields: Any) -> None:
        self._said = time.monotonic()
        tell("job", line, **fields)


def _attempt(record: JobRecord) -> tuple[int, str]:
    return record.attempts, record.status
