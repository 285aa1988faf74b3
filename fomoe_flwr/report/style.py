"""The style of pictures, in two media: PNG for print, and SVG whose colours the page decides.

An SVG inside the page is drawn with stand-in colours that become CSS variables, so one drawing is
right on a light and on a dark page. Its text stays text: sharp, searchable, read out.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Place = Literal["best", "center right"]
"""Of a legend."""


@dataclass(frozen=True)
class Palette:
    """Colours by role; the series are Okabe and Ito's, apart for any eye."""

    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


PRINT = Palette(
    "#1b1b1b", "#767676", "#d9d9d9", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
)
PAGE = Palette(
    "#010203", "#010204", "#010205", ("#010206", "#010207", "#010208", "#010209", "#01020a")
)

_VARIABLES = {
    PAGE.ink: "--ink",
    PAGE.muted: "--muted",
    PAGE.grid: "--grid",
    **{color: f"--series-{n}" for n, color in enumerate(PAGE.series)},
}


@dataclass(frozen=True)
class Panel:
    """One picture: what it shows, and how to draw it on axes of any medium."""

    title: str
    caption: str
    """What is seen, in words: shown below the picture and read out in its place."""
    draw: Callable[[Axes, Palette], None]
    height: float = 3.0
    """Inches, for a width of 4.8."""
    legend: Place = "best"


def depth_color(layer: int, num_layers: int) -> tuple[float, float, float, float]:
    """Return a colour for a layer: depth as lightness, both ends seen on light and dark."""
    return colormaps["viridis"](0.38 + 0.42 * layer / max(1, num_layers - 1))


def to_svg(panel: Panel, name: str) -> str:
    """Draw a panel as an SVG element to put into a page; `name` keeps its ids apart."""
    # `none`: text as text. The salt keeps the same drawing the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11.5}):
        figure = Figure(figsize=(4.8, panel.height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _dress(axes, PAGE)
        panel.draw(axes, PAGE)
        _legend(axes, PAGE, panel.legend)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r"<svg \1>", text, flags=re.DOTALL)
    label = html.escape(f"{panel.title}: {panel.caption}", quote=True)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def save_png(panels: Sequence[Panel], path: Path, columns: int, title: str) -> Path:
    """Draw panels side by side as one PNG."""
    rows = -(-len(panels) // columns)
    height = sum(
        max(p.height for p in panels[r * columns : (r + 1) * columns]) for r in range(rows)
    )
    size = (4.8 * min(columns, len(panels)), height + 0.4)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, min(columns, len(panels)), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _dress(axes, PRINT)
        axes.set_title(panel.title, fontsize=10, loc="left")
        panel.draw(axes, PRINT)
        _legend(axes, PRINT, panel.legend)
    figure.suptitle(title)
    figure.savefig(path)
    return path


def _dress(axes: Axes, palette: Palette) -> None:
    axes.set_facecolor("none")
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    # Long numbers would run into each other.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.tick_params(colors=palette.ink, labelsize=10)
    axes.xaxis.label.set_color(palette.ink)
    axes.yaxis.label.set_color(palette.ink)
    axes.title.set_color(palette.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette.muted)


def _legend(axes: Axes, palette: Palette, place: Place) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, frameon=False, fontsize=9.5, labelcolor=palette.ink)
