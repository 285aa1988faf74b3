"""Pictures of time: what a round's seconds went into, and how long each worker took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fomoe_flwr.report.history import History
from fomoe_flwr.report.style import Palette, Panel, depth_color

Rows = Sequence[Mapping[str, Any]]

PHASES = (
    "configure",
    "send",
    "train",
    "receive",
    "fold",
    "outer",
    "routing",
    "evaluate",
    "eval",
    "checkpoint",
)
"""In the order in which a round passes them; `round/PHASE_seconds` in the metrics."""

_MOST_ROUNDS = 24


def time_panels(history: History) -> list[Panel]:
    """Return the rounds' phases and the workers' times, as far as the metrics have them."""
    rows = history.rounds[-_MOST_ROUNDS:]
    phases = [name for name in PHASES if any(_seconds(row, name) for row in rows)]
    panels = []
    height = 1.3 + 0.22 * len(rows)
    if phases:
        panels.append(
            Panel(
                "Rounds by phase",
                f"seconds of the last {len(rows)} rounds, in the order of a round's phases",
                partial(_draw_phases, rows, phases),
                height + 0.5,
                "center right",
            )
        )
    if any(row.get("round/worker_seconds") for row in rows):
        panels.append(
            Panel(
                "Workers by round",
                "seconds of local training on each worker; the longest bar is what a round waits "
                "for",
                partial(_draw_workers, rows),
                height + 0.5,
                "center right",
            )
        )
    return panels


def _seconds(row: Mapping[str, Any], phase: str) -> float:
    return float(row.get(f"round/{phase}_seconds", 0.0))


def _draw_phases(rows: Rows, phases: Sequence[str], axes: Axes, palette: Palette) -> None:
    left = np.zeros(len(rows))
    names = [row["round"] for row in rows]
    for number, phase in enumerate(phases):
        seconds = np.array([_seconds(row, phase) for row in rows])
        color = palette.series[number % len(palette.series)]
        hatch = "" if number < len(palette.series) else "///"
        axes.barh(names, seconds, left=left, color=color, hatch=hatch, label=phase, height=0.75)
        left += seconds
    rest = np.array([row["round/seconds"] for row in rows]) - left
    # Below a hundredth of a round it is noise of the clock.
    if (rest > 0.01 * left).any():
        axes.barh(
            names, np.maximum(rest, 0), left=left, color=palette.grid, label="other", height=0.75
        )
    _finish(axes, names)


def _draw_workers(rows: Rows, axes: Axes, palette: Palette) -> None:
    workers = sorted({int(w) for row in rows for w in row.get("round/worker_seconds", {})})
    names = [row["round"] for row in rows]
    thickness = 0.8 / len(workers)
    few = len(workers) <= 8
    for place, worker in enumerate(workers):
        seconds = [row.get("round/worker_seconds", {}).get(str(worker), 0.0) for row in rows]
        at = [name - 0.4 + (place + 0.5) * thickness for name in names]
        color = depth_color(place, len(workers))
        label = f"worker {worker}" if few else None
        axes.barh(at, seconds, color=color, label=label, height=0.92 * thickness)
    del palette
    _finish(axes, names)


def _finish(axes: Axes, names: Sequence[int]) -> None:
    axes.set_ylim(max(names) + 0.6, min(names) - 0.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_ylabel("round")
    axes.set_xlabel("seconds")
    axes.grid(visible=False, axis="y")
    # Room on the right for the legend, which would hide bars anywhere else.
    axes.set_xlim(0, 1.5 * axes.dataLim.x1)
