"""The page of a sweep."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fomoe_flwr.config import is_run
from fomoe_flwr.files import save_text
from fomoe_flwr.report.history import History, Points
from fomoe_flwr.report.page import Page
from fomoe_flwr.report.style import Palette, Panel, depth_color, save_png
from fomoe_flwr.report.units import count, duration, number, size
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.pareto import choices_of, pareto_panels
from fomoe_flwr.sweep.table import sweep_rows

_REFRESH_SECONDS = 30
_MOST_CURVES = 60
_ENVIRONMENT = ("commit", "machine")


def sweep_page(sweep: SweepDirectory) -> list[Path]:
    """Write a sweep's `report.html`, which stands alone, and its plots; return the files."""
    plan, rows = sweep.plan(), sweep_rows(sweep)
    keys = list(dict.fromkeys(key for job in plan.jobs for key in job.varied))
    statuses = [row["status"] for row in rows]
    running = "running" in statuses or "queued" in statuses
    status = next(
        (s for s in ("running", "queued", "waiting", "failed") if s in statuses), "completed"
    )
    page = Page(sweep.path.name, status, _REFRESH_SECONDS if running else None)
    page.paragraph(f"fomoe sweep {' '.join(plan.words)}")
    page.facts(
        {
            "jobs": str(len(rows)),
            **{name: str(statuses.count(name)) for name in dict.fromkeys(statuses)},
            "time of all jobs": duration(sum(row["job_seconds"] for row in rows)),
        }
    )
    choices = choices_of(rows, keys)
    pareto, curves = pareto_panels(choices), _curve_panels(sweep, keys)
    page.panels(
        "What a loss costs",
        "A point is a combination, its mean over seeds; the dashed line is the front: nothing has "
        "both a lower loss and a lower cost.",
        pareto,
    )
    page.panels("Loss of every job", "", curves)
    page.heading("Every job")
    page.table(
        ("job", "status", "loss", "bits/byte", "bytes sent", "held by a worker", "ghosts", "time"),
        [_cells(row, keys) for row in rows],
        [_link(sweep, row) for row in rows],
    )
    failures = [row for row in rows if row["error"]]
    if failures:
        page.heading("What failed or was skipped")
        page.table(("job", "why"), [(_label(row, keys), row["error"]) for row in failures])
    page.heading("Environment")
    page.table(
        ("what", "value"),
        [(key, ", ".join(sorted({row[key] for row in rows if row[key]}))) for key in _ENVIRONMENT],
    )
    save_text(page.html(f"fomoe report {sweep.path}"), sweep.report)
    written = [sweep.report]
    sweep.plots.mkdir(exist_ok=True)
    for name, panels in (("pareto", pareto), ("loss", curves)):
        if panels:
            title = f"{sweep.path.name}: {name}"
            written.append(save_png(panels, sweep.plots / f"{name}.png", 2, title))
    return written


def _label(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key.split('.')[-1]} {row[key]}" for key in keys) or row["job"]


def _cells(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    sent = (row["comm/bytes_up"] or 0) + (row["comm/bytes_down"] or 0)
    ghosts, held = row["moe/ghost_fraction"], row["params/resident"]
    return (
        _label(row, keys),
        row["status"],
        number(row["eval/loss"], 4),
        number(row["eval/bits_per_byte"], 3),
        size(sent) if sent else "-",
        "-" if held is None else count(held),
        "-" if ghosts is None else f"{ghosts:.1%}",
        duration(row["job_seconds"]) if row["job_seconds"] else "-",
    )


def _link(sweep: SweepDirectory, row: Mapping[str, Any]) -> str:
    report = sweep.jobs / row["job"] / "report.html"
    return os.path.relpath(report, sweep.path) if report.is_file() else ""


def _curve_panels(sweep: SweepDirectory, keys: Sequence[str]) -> list[Panel]:
    """Return the held-out loss of all jobs against tokens and bytes, coloured by the first key."""
    tokens: list[tuple[str, Points]] = []
    sent: list[tuple[str, Points]] = []
    for job in sweep.plan().jobs[:_MOST_CURVES]:
        run = sweep.run(job)
        if is_run(run.path) and run.metrics.is_file():
            history = History.read(run)
            name = f"{keys[0].split('.')[-1]} {job.varied[keys[0]]}" if keys else job.name
            tokens.append((name, history.heldout(history.tokens)))
            sent.append((name, history.heldout(history.mebibytes)))
    if not tokens:
        return []
    caption = f"held-out loss, one line for each of {len(tokens)} jobs"
    return [
        Panel("Against tokens", caption, partial(_draw, tokens, "million training tokens")),
        Panel("Against bytes", caption, partial(_draw, sent, "MiB up and down, all workers")),
    ]


def _draw(curves: list[tuple[str, Points]], label: str, axes: Axes, palette: Palette) -> None:
    names = list(dict.fromkeys(name for name, _ in curves))
    few = len(names) <= len(palette.series)
    seen = set()
    for name, points in curves:
        place = names.index(name)
        color = palette.series[place] if few else depth_color(place, len(names))
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, linewidth=1.2, label=None if name in seen else name)
            seen.add(name)
    axes.set_xlabel(label)
    axes.set_ylabel("nats per token")
    axes.set_xlim(left=0)
