"""Pictures of a layout: which worker holds which experts, a heat map for each layer."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from fomoe_flwr.layout import Layout
from fomoe_flwr.report.style import Palette, Panel

_MOST_LAYERS = 4
_HELD = LinearSegmentedColormap.from_list("held", [(0.18, 0.51, 0.79, 0), (0.18, 0.51, 0.79, 1)])
"""From nothing to a blue that is seen on light and on dark."""


def holder_panels(layouts: dict[int, Layout]) -> list[Panel]:
    """Return a heat map for up to four layers, spread over the depth of the model.

    A cell's strength is the share of rounds in which the worker held the expert, so a fixed layout
    is black and white and a moving one shows how evenly it moves.
    """
    if not layouts:
        return []
    last = layouts[max(layouts)]
    held = held_share(list(layouts.values()))
    height = min(max(0.26 * last.num_workers, 1.0), 3.4) + 0.7
    return [
        Panel(f"Layer {layer}", _caption(layouts, layer), partial(_draw, held[layer]), height)
        for layer in spread(last.num_layers, _MOST_LAYERS)
    ]


def held_share(layouts: list[Layout]) -> np.ndarray:
    """Return [layers, workers, experts]: the share of layouts in which a worker held an expert."""
    first = layouts[0]
    held = np.zeros((first.num_layers, first.num_workers, first.num_experts))
    for layout in layouts:
        for layer, workers in enumerate(layout.residents):
            for worker, experts in enumerate(workers):
                held[layer, worker, list(experts)] += 1
    return held / len(layouts)


def spread(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` layers, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _draw(held: np.ndarray, axes: Axes, palette: Palette) -> None:
    num_workers, num_experts = held.shape
    axes.grid(visible=False)
    axes.pcolormesh(
        held,
        cmap=_HELD,
        vmin=0,
        vmax=1,
        edgecolors=palette.grid,
        linewidth=0.5,
        # Thousands of cells are smaller as an image.
        rasterized=held.size > 2048,
    )
    for axis, count, most in ((axes.xaxis, num_experts, 16), (axes.yaxis, num_workers, 8)):
        numbers = list(range(count))
        if count > most:
            ticks = MaxNLocator(nbins=most, integer=True, steps=[1, 2, 4, 8, 10])
            found = map(round, ticks.tick_values(0, count - 1))
            numbers = [n for n in found if 0 <= n < count]
        axis.set_ticks([n + 0.5 for n in numbers], [str(n) for n in numbers])
        axis.set_tick_params(length=0)
    axes.set_ylim(num_workers, 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("expert")
    axes.set_ylabel("worker")


def _caption(layouts: dict[int, Layout], layer: int) -> str:
    last = layouts[max(layouts)]
    overlaps = {len(last.holders(layer, expert)) for expert in range(last.num_experts)}
    loads = {len(experts) for experts in last.residents[layer]}
    kinds = len({layout.digest() for layout in layouts.values()})
    moving = f"; {kinds} layouts in {len(layouts)} rounds" if kinds > 1 else ""
    return (
        f"each expert on {_range(overlaps)} of {last.num_workers} workers, each worker with "
        f"{_range(loads)} of {last.num_experts} experts{moving}"
    )


def _range(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
