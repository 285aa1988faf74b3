"""The picture of a layout: who holds what, a small heat map for each layer.

Imports matplotlib, so callers import this module only when they draw. No display is needed.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fomoe_flwr.layout import Layout

_MAX_LAYERS = 8
_COLUMNS = 2
_GHOST, _RESIDENT = "#ececec", "#0072b2"
"""Grey and Okabe and Ito's blue: apart in lightness too, so for any eye and in print."""


def draw_holders(layout: Layout, path: Path, title: str = "") -> None:
    """Draw workers against experts, filled where resident, as a PNG (or what the suffix says).

    Up to eight layers are drawn, spread over the depth of the model; a note says so if there are
    more.
    """
    shown = _spread(layout.num_layers, _MAX_LAYERS)
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width = columns * min(max(0.22 * layout.num_experts, 4.2), 7.0) + 0.6
    height = rows * (min(max(0.24 * layout.num_workers, 0.8), 4.0) + 0.5) + 1.3
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for position, axes in enumerate(grid.flat):
        if position >= len(shown):
            axes.set_visible(False)
            continue
        _draw_layer(axes, layout, shown[position])
        # The axis below may be hidden, so the last one of every column bears the labels.
        last_of_column = position + columns >= len(shown)
        axes.tick_params(labelbottom=last_of_column)
        if last_of_column:
            axes.set_xlabel("expert")
        if position % columns == 0:
            axes.set_ylabel("worker")
    figure.suptitle(title or "Who holds what", fontsize=12)
    figure.supxlabel(_caption(layout, len(shown), columns), fontsize=9, color="#444444")
    figure.savefig(path)


def _draw_layer(axes: Axes, layout: Layout, layer: int) -> None:
    cells = [
        [float(expert in set(held)) for expert in range(layout.num_experts)]
        for held in layout.residents[layer]
    ]
    axes.pcolormesh(
        cells,
        cmap=ListedColormap([_GHOST, _RESIDENT]),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.8 if layout.num_experts <= 32 else 0.3 if layout.num_experts <= 128 else 0,
    )
    axes.set_title(f"layer {layer}", fontsize=9, loc="left", pad=3)
    _number_cells(axes, layout)


def _number_cells(axes: Axes, layout: Layout) -> None:
    """Put whole numbers in the middle of cells, as many as stay readable."""
    for axis, count, most in (
        (axes.xaxis, layout.num_experts, 16),
        (axes.yaxis, layout.num_workers, 8),
    ):
        ticks = MaxNLocator(nbins=most, integer=True, steps=[1, 2, 4, 8, 10])
        numbers = [n for n in map(round, ticks.tick_values(0, count - 1)) if 0 <= n < count]
        if count <= most:
            numbers = list(range(count))
        axis.set_ticks([n + 0.5 for n in numbers], [str(n) for n in numbers], fontsize=8)
        axis.set_tick_params(length=0)
    # Not invert_yaxis: the axes are shared, and it would turn them all over again each time.
    axes.set_ylim(layout.num_workers, 0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _caption(layout: Layout, num_shown: int, columns: int) -> str:
    overlaps = {
        len(layout.holders(layer, expert))
        for layer in range(layout.num_layers)
        for expert in range(layout.num_experts)
    }
    loads = {len(experts) for workers in layout.residents for experts in workers}
    parts = [
        "filled: resident",
        f"overlap {_range(overlaps)} of {layout.num_workers} workers",
        f"each worker holds {_range(loads)} of {layout.num_experts} experts in every layer",
    ]
    if num_shown < layout.num_layers:
        parts.append(f"{num_shown} of {layout.num_layers} layers shown")
    # A single column is too narrow for one line.
    return ("\n" if columns == 1 else "  |  ").join(parts)


def _range(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _spread(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` layers, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
