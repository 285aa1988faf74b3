"""The picture of a run's routing: small multiples over rounds, a line for each layer.

Imports matplotlib, so callers import this module only when they draw. No display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

_PANELS: tuple[tuple[str, str, str | None, bool], ...] = (
    ("ghost share of assignments", "ghost_fraction", "ghost_expected", True),
    ("tokens with ghosts only", "all_ghost_fraction", "all_ghost_expected", True),
    ("load entropy (1: even)", "load_entropy", None, False),
    ("MaxVio (0: even)", "max_vio", None, False),
    ("dead experts", "dead_experts", None, True),
    ("router row cosine", "router_cosine", None, False),
    ("churn since the round before", "churn", None, True),
    ("agreement of workers before averaging", "worker_agreement", None, True),
    ("drift of an expert's copies, relative", "expert_drift", None, False),
)
"""Title, column, column of the closed form, whether it is a share."""

_COLUMNS = 3
_MOST_NAMED = 6
_EXPECTED = "#D55E00"


def draw_routing(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the lines of `routing.jsonl` as a PNG (or what the suffix says)."""
    rounds = [line["round"] for line in lines]
    num_layers = len(lines[-1]["layers"])
    figure = Figure(figsize=(11, 8), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(_PANELS) // _COLUMNS), _COLUMNS, sharex=True)
    # Depth as lightness; the palest end would vanish on white.
    colors = [
        colormaps["viridis"](0.85 * layer / max(1, num_layers - 1)) for layer in range(num_layers)
    ]
    for axes, (name, column, expected, is_share) in zip(grid.flat, _PANELS, strict=True):
        axes.set_title(name, fontsize=10, loc="left")
        for layer in range(num_layers):
            # Fragments leave rounds without a value; the line goes on over them.
            series = zip(rounds, _series(lines, layer, column), strict=True)
            points = [(x, y) for x, y in series if not math.isnan(y)]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, ".-", color=colors[layer], linewidth=1.3, markersize=5)
        if expected:
            # Layers may differ in residents, and so in what is expected of them.
            for values in {tuple(_series(lines, layer, expected)) for layer in range(num_layers)}:
                axes.plot(rounds, values, "--", color=_EXPECTED, linewidth=1.3)
        _finish(axes, is_share)
    for axes in grid[-1]:
        axes.set_xlabel("round")
    named = sorted({round(i * (num_layers - 1) / (_MOST_NAMED - 1)) for i in range(_MOST_NAMED)})
    handles = [Line2D([], [], color=colors[n], marker=".", label=f"layer {n}") for n in named]
    handles.append(Line2D([], [], color=_EXPECTED, linestyle="--", label="uniform routing"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    figure.savefig(path)


def _series(lines: Sequence[Mapping[str, Any]], layer: int, column: str) -> list[float]:
    found = [line["layers"][layer].get(column) for line in lines]
    return [math.nan if value is None else value for value in found]


def _finish(axes: Axes, is_share: bool) -> None:
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = drawn[~np.isnan(drawn)].tolist()
    if not values:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no values in this run", ha="center", transform=axes.transAxes)
        return
    low, high = min(values), max(values)
    if is_share:
        # From zero, so that a panel does not make much of little; a line at zero stays visible.
        low, high = 0.0, max(high, 0.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
