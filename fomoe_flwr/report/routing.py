"""Pictures of routing over rounds: a line for each layer, and heat maps of load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fomoe_flwr.report.holders import spread
from fomoe_flwr.report.style import Palette, Panel, depth_color

Lines = Sequence[Mapping[str, Any]]

_SERIES: tuple[tuple[str, str, str | None, bool, str], ...] = (
    (
        "Ghost share",
        "ghost_fraction",
        "ghost_expected",
        True,
        "assignments that fell on experts the worker lacks",
    ),
    (
        "Tokens with ghosts only",
        "all_ghost_fraction",
        "all_ghost_expected",
        True,
        "tokens all of whose choices fell on ghosts",
    ),
    ("Load entropy", "load_entropy", None, False, "1 is an even load over experts"),
    ("MaxVio", "max_vio", None, False, "how far the busiest expert is above the mean; 0 is even"),
    ("Dead experts", "dead_experts", None, True, "experts that no token chose"),
    ("Router row cosine", "router_cosine", None, False, "mean cosine between rows of a router"),
    ("Churn", "churn", None, True, "choices on the probe that changed since the round before"),
    (
        "Agreement of workers",
        "worker_agreement",
        None,
        True,
        "choices on the probe that two workers share before averaging",
    ),
    (
        "Drift of copies",
        "expert_drift",
        None,
        False,
        "distance of an expert's copies from their mean, relative",
    ),
)
"""Title, column, column of the closed form, whether it is a share, what it is."""

_MOST_NAMED = 4
_MOST_MAPS = 4


def routing_panels(lines: Lines) -> list[Panel]:
    """Return a panel for each measure of `routing.jsonl` that has values."""
    return [
        Panel(title, caption, partial(_draw_series, lines, column, expected, is_share), 2.7)
        for title, column, expected, is_share, caption in _SERIES
        if lines and any(not math.isnan(y) for y in _of_all_layers(lines, column))
    ]


def load_panels(lines: Lines) -> list[Panel]:
    """Return heat maps of every expert's load over rounds, for up to four layers."""
    if not lines or "load" not in lines[-1]["layers"][0]:
        return []
    return [
        Panel(
            f"Load, layer {layer}",
            "assignments to each expert in each round, over an even share",
            partial(_draw_load, lines, layer),
            2.9,
        )
        for layer in spread(len(lines[-1]["layers"]), _MOST_MAPS)
    ]


def _of_all_layers(lines: Lines, column: str) -> list[float]:
    return [y for n in range(len(lines[-1]["layers"])) for y in _series(lines, n, column)]


def _series(lines: Lines, layer: int, column: str) -> list[float]:
    found = [line["layers"][layer].get(column) for line in lines]
    return [math.nan if value is None else value for value in found]


def _draw_series(
    lines: Lines, column: str, expected: str | None, is_share: bool, axes: Axes, palette: Palette
) -> None:
    rounds = [line["round"] for line in lines]
    num_layers = len(lines[-1]["layers"])
    named = spread(num_layers, _MOST_NAMED)
    for layer in range(num_layers):
        # Fragments leave rounds without a value; the line goes on over them.
        series = zip(rounds, _series(lines, layer, column), strict=True)
        points = [(x, y) for x, y in series if not math.isnan(y)]
        if points:
            label = f"layer {layer}" if layer in named else None
            color = depth_color(layer, num_layers)
            axes.plot(*zip(*points, strict=True), ".-", color=color, linewidth=1.3, label=label)
    if expected:
        # Layers may differ in residents, and so in what is expected of them.
        closed = sorted({tuple(_series(lines, n, expected)) for n in range(num_layers)})
        for number, values in enumerate(closed):
            label = "uniform routing" if number == 0 else None
            axes.plot(rounds, values, "--", color=palette.series[1], linewidth=1.3, label=label)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    low, high = float(np.nanmin(drawn)), float(np.nanmax(drawn))
    if is_share:
        # From zero, so that a panel does not make much of little; a line at zero stays visible.
        low, high = 0.0, max(high, 0.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)


def _draw_load(lines: Lines, layer: int, axes: Axes, palette: Palette) -> None:
    loads = np.array([line["layers"][layer]["load"] for line in lines], dtype=float).T
    share = loads / np.maximum(loads.sum(0, keepdims=True), 1) * len(loads)
    rounds = [line["round"] for line in lines]
    edges = [rounds[0] - 0.5, *(r + 0.5 for r in rounds)]
    axes.grid(visible=False)
    mesh = axes.pcolormesh(
        edges, np.arange(len(loads) + 1) - 0.5, share, cmap="cividis", vmin=0, rasterized=True
    )
    assert axes.figure is not None
    bar = axes.figure.colorbar(mesh, ax=axes)
    bar.ax.tick_params(colors=palette.ink, labelsize=10)
    bar.outline.set_visible(False)
    axes.set_xlabel("round")
    axes.set_ylabel("expert")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
