"""The page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fomoe_flwr.files import save_text
from fomoe_flwr.report.baselines import baseline_panels
from fomoe_flwr.report.curves import loss_panels
from fomoe_flwr.report.history import History
from fomoe_flwr.report.holders import holder_panels
from fomoe_flwr.report.page import Page
from fomoe_flwr.report.routing import load_panels, routing_panels
from fomoe_flwr.report.timeline import time_panels
from fomoe_flwr.report.units import count, duration, number, size
from fomoe_flwr.run.phases import largest, phases_around

_MOST_ROWS = 50
_REFRESH_SECONDS = 30


def run_page(history: History) -> Path:
    """Write `report.html`, which needs no other file and no network; return its path."""
    run, summary = history.run, history.summary
    status = str(summary.get("status", "not started"))
    page = Page(run.path.name, status, _REFRESH_SECONDS if status == "running" else None)
    page.paragraph(_sentence(history))
    page.facts(_facts(history))
    if "error" in summary:
        page.text(str(summary["error"]), prose=True)
    page.panels("Loss", "", loss_panels(history))
    page.panels(
        "Against full replicas and data-parallel training",
        "The same rounds and steps, as the cost model reckons them.",
        baseline_panels(history),
    )
    page.panels(
        "Who holds what",
        "How often each worker held each expert: full colour is always, none is never.",
        holder_panels(history.layouts),
    )
    page.panels("Routing", "", routing_panels(history.routing))
    page.panels("Load of experts", "", load_panels(history.routing))
    page.panels("Time", _around(summary), time_panels(history))
    _add_rounds(page, history)
    if samples := sorted(run.samples.glob("*.txt")):
        page.heading(f"What it writes ({samples[-1].stem})")
        page.text(samples[-1].read_text(encoding="utf-8").strip(), prose=True)
    page.heading("Settings and environment")
    page.table(
        ("what", "value"),
        [
            (key.removeprefix("environment/"), str(value))
            for key, value in summary.items()
            if key.startswith("environment/")
        ],
    )
    page.folded("Every setting", run.config.read_text(encoding="utf-8"))
    save_text(page.html(f"fomoe report {run.path}"), run.report)
    return run.report


def _sentence(history: History) -> str:
    settings = history.settings
    return (
        f"{settings.experiment}, preset {settings.preset}, seed {settings.seed}: "
        f"{settings.model.name} over {settings.layout.num_workers} workers, every expert on "
        f"{settings.layout.overlap} of them ({settings.layout.kind} layout, "
        f"{settings.model.routing} routing), {settings.local.steps} local steps a round, "
        f"{settings.outer.name} outer step."
    )


def _around(summary: Mapping[str, Any]) -> str:
    """Say what the time before the first round and after the last went into."""
    told = {"Before round 1": "start", "After the last round": "end"}
    found = {text: phases_around(summary, when) for text, when in told.items()}
    return " ".join(f"{text} {largest(seconds)}." for text, seconds in found.items() if seconds)


def _facts(history: History) -> dict[str, str]:
    rounds, predicted = history.rounds, history.predicted
    facts = {"rounds": f"{len(rounds)} of {history.settings.rounds}"}
    loss = history.heldout(history.tokens)
    if loss:
        facts["held-out loss"] = f"{loss[-1][1]:.4f}"
    seen = [row["eval/bits_per_byte"] for row in rounds if "eval/bits_per_byte" in row]
    if seen:
        facts["bits per byte"] = f"{seen[-1]:.3f}"
    if rounds:
        facts["tokens"] = count(rounds[-1]["tokens"])
        facts["bytes sent"] = size(history.mebibytes[-1] * 2**20)
        facts["time"] = duration(60 * history.minutes[-1])
        facts["ghost share"] = f"{rounds[-1]['moe/ghost_fraction']:.1%}"
    facts["parameters"] = count(predicted["params/total"])
    facts["held by a worker"] = count(predicted["params/resident"])
    facts["bytes saved"] = f"{predicted['ratio/full_replica']:.2f}x"
    return facts


def _add_rounds(page: Page, history: History) -> None:
    if not history.rounds:
        return
    shown = history.rounds[-_MOST_ROWS:]
    page.heading("Rounds" if len(shown) == len(history.rounds) else f"The last {_MOST_ROWS} rounds")
    page.table(
        ("round", "loss", "bits/byte", "training", "ghosts", "up", "down", "time", "workers"),
        [
            (
                str(row["round"]),
                number(row.get("eval/loss"), 4),
                number(row.get("eval/bits_per_byte"), 3),
                number(row["train/loss"], 4),
                f"{row['moe/ghost_fraction']:.1%}",
                size(row["comm/bytes_up"]),
                size(row["comm/bytes_down"]),
                duration(row["round/seconds"]),
                f"{row['round/workers_ok']} ok"
                + (
                    f", {row['round/workers_failed']} failed" if row["round/workers_failed"] else ""
                ),
            )
            for row in shown
        ],
    )
