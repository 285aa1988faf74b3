"""The plots of a run as PNG files."""

from __future__ import annotations

from pathlib import Path

from fomoe_flwr.report.baselines import baseline_panels
from fomoe_flwr.report.curves import loss_panels
from fomoe_flwr.report.history import History
from fomoe_flwr.report.holders import holder_panels
from fomoe_flwr.report.routing import load_panels, routing_panels
from fomoe_flwr.report.style import save_png
from fomoe_flwr.report.timeline import time_panels


def draw_plots(history: History) -> list[Path]:
    """Draw `plots/*.png`; return those that there is something to draw for."""
    run = history.run
    run.plots.mkdir(exist_ok=True)
    drawn = (
        ("loss", loss_panels(history), 3, "loss of the assembled model"),
        ("layout", holder_panels(history.layouts), 2, "who holds what, share of rounds"),
        ("routing", routing_panels(history.routing), 3, "stable routing"),
        ("load", load_panels(history.routing), 2, "load of experts"),
        ("baselines", baseline_panels(history), 2, "bytes and memory"),
        ("timeline", time_panels(history), 2, "time"),
    )
    return [
        save_png(panels, run.plots / f"{name}.png", columns, f"{run.path.name}: {title}")
        for name, panels, columns, title in drawn
        if panels
    ]
