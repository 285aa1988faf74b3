"""The turnout of a run: how many rounds of each worker counted, and why the others did not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turnout:
    """One worker's rounds."""

    worker: int
    counted: int
    """Rounds into which its reply was folded."""
    missed: int
    """All other rounds."""
    reason: str
    """The reason of most of them, as last told; empty if none was missed."""


def turnout(rows: Sequence[Mapping[str, Any]], num_workers: int) -> list[Turnout]:
    """Count the rounds of every worker in the rows of `metrics.jsonl`."""
    return [_of_worker(rows, worker) for worker in range(num_workers)]


def _of_worker(rows: Sequence[Mapping[str, Any]], worker: int) -> Turnout:
    reasons = [
        str(row.get("round/failures", {}).get(str(worker), "unknown"))
        for row in rows
        if worker not in row.get("round/participants", [])
    ]
    # "still at its task of round 3" and "of round 4" are one reason.
    kinds = Counter(map(_kind, reasons))
    chief = kinds.most_common(1)[0][0] if kinds else ""
    last = next((reason for reason in reversed(reasons) if _kind(reason) == chief), "")
    return Turnout(worker, len(rows) - len(reasons), len(reasons), last)


def _kind(reason: str) -> str:
    return re.sub(r"\d+", "0", reason)
