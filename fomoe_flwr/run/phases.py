"""Phases: what the seconds of a run went into. Every second belongs to exactly one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil

ROUND_PHASES = (
    "note",
    "gather",
    "configure",
    "send",
    "wait",
    "receive",
    "fold",
    "outer",
    "routing",
    "eval",
    "sample",
    "checkpoint",
    "other",
)
"""In the order in which a round passes them; `round/PHASE_seconds` in the metrics.

`note` is to write down the round before, `gather` to wait for enough free nodes.
"""


_SHOWN = 4


class Phases:
    """A stopwatch that never stops: each stretch of time is named when it is over.

    It starts at `began` (Unix seconds), or now.
    """

    def __init__(self, began: float | None = None) -> None:
        passed = 0.0 if began is None else time.time() - began
        self.began = self._since = time.monotonic() - passed
        self._seconds: dict[str, float] = {}

    def end(self, phase: str, at: float | None = None) -> None:
        """Count the time since the last call to a phase, until now or `at` (monotonic seconds)."""
        now = time.monotonic()
        until = now if at is None else min(now, max(self._since, at))
        self._seconds[phase] = self._seconds.get(phase, 0.0) + until - self._since
        self._since = until

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def process_began() -> float:
    """Return when this process was started, in Unix seconds."""
    return psutil.Process().create_time()


def phases_around(summary: Mapping[str, Any], when: str) -> dict[str, float]:
    """Return the seconds of each phase before the rounds (`start`) or after them (`end`)."""
    keys = [key for key in summary if key.startswith(f"{when}/") and key.endswith("_seconds")]
    return {key[len(when) + 1 : -len("_seconds")]: float(summary[key]) for key in keys}


def largest(seconds: Mapping[str, float]) -> str:
    """Say how long all phases took, and which took longest."""
    names = sorted(seconds, key=lambda phase: -seconds[phase])[:_SHOWN]
    parts = ", ".join(f"{name} {seconds[name]:.1f}" for name in names)
    return f"{sum(seconds.values()):.1f} s: {parts}"


def phases_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of each phase of a round from its row of `metrics.jsonl`."""
    found = {phase: float(row.get(f"round/{phase}_seconds", 0.0)) for phase in ROUND_PHASES}
    return {phase: seconds for phase, seconds in found.items() if seconds}
