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
from fomoe_flwr.run.phases import ROUND_PHASES, phases_of

Rows = Sequence[Mapping[str, Any]]

_MOST_ROUNDS = 24


def time_panels(history: History) -> list[Panel]:
    """Return the rounds' phases and the workers' times, as far as the metrics have them."""
    rows = history.rounds[-_MOST_ROUNDS:]
    seconds = [_large(phases_of(row)) for row in rows]
    phases = [name for name in ROUND_PHASES if any(name in each for each in seconds)]
    panels = []
    height = 1.3 + 0.22 * len(rows)
    if phases:
        panels.append(
            Panel(
                "Rounds by phase",
                f"seconds of the last {len(rows)} rounds, in the order of a round's phases",
                partial(_draw_phases, rows, seconds, phases),
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


def _large(seconds: Mapping[str, float]) -> dict[str, float]:
    """Add up what takes less than a hundredth of a round: nobody could see it alone."""
    least = 0.01 * sum(seconds.values())
    large = {phase: value for phase, value in seconds.items() if value >= least}
    return large | {"other": sum(seconds.values()) - sum(large.values()) + large.get("other", 0.0)}


def _draw_phases(
    rows: Rows,
    seconds: Sequence[Mapping[str, float]],
    phases: Sequence[str],
    axes: Axes,
    palette: Palette,
) -> None:
    left = np.zeros(len(rows))
    names = [row["round"] for row in rows]
    for number, phase in enumerate(phases):
        widths = np.array([each.get(phase, 0.0) for each in seconds])
        color = palette.series[number % len(palette.series)]
        hatch = ("", "///", "...")[number // len(palette.series)]
        axes.barh(names, widths, left=left, color=color, hatch=hatch, label=phase, height=0.75)
        left += widths
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
