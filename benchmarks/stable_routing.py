"""Stable routing: what routers did in the runs of a series, as a table and a plot.

Rounds are those of `experiments.py`: objects with `tokens` and the means over layers that
`metrics.jsonl` has under `moe/`. Numbers are means over seeds; spreads are half of max - min.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEASURES = {
    "ghost_fraction": "ghost share",
    "ghost_expected": "ghost share, uniform",
    "load_entropy": "load entropy (1 = even)",
    "max_vio": "MaxVio",
    "dead_experts": "dead experts",
    "router_cosine": "router row cosine",
    "churn": "churn a round",
    "worker_agreement": "agreement of workers",
    "expert_drift": "drift of copies",
}
"""Name under `moe/` -> heading. A run in which a measure has no meaning does not report it."""

PLOTTED = ("ghost_fraction", "load_entropy", "max_vio", "churn", "worker_agreement", "expert_drift")


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """Return the measures of one line of `metrics.jsonl`."""
    return {f"moe/{name}": row[f"moe/{name}"] for name in MEASURES if f"moe/{name}" in row}


def routing_table(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per experiment: every measure in the last round."""
    rows = []
    for name, runs in _by_experiment(results).items():
        row = {"experiment": name}
        for measure, heading in MEASURES.items():
            values = [run["rounds"][-1].get(f"moe/{measure}") for run in runs]
            known = [value for value in values if value is not None]
            row[heading] = (
                f"{statistics.mean(known):.3f} ± {(max(known) - min(known)) / 2:.3f}"
                if known
                else "-"
            )
        rows.append(row)
    return rows


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot measures over rounds: a line for each experiment, a band from least to most of seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), sharex=True, layout="constrained")
    for axis, measure in zip(axes.flat, PLOTTED, strict=True):
        for name, runs in _by_experiment(results).items():
            curves = [
                {r["round"]: r[f"moe/{measure}"] for r in run["rounds"] if f"moe/{measure}" in r}
                for run in runs
            ]
            rounds = sorted(set.intersection(*map(set, curves)))
            if not rounds:
                continue
            columns = [[curve[r] for curve in curves] for r in rounds]
            (line,) = axis.plot(rounds, list(map(statistics.mean, columns)), label=name)
            low, high = list(map(min, columns)), list(map(max, columns))
            axis.fill_between(rounds, low, high, color=line.get_color(), alpha=0.2)
        axis.set_title(MEASURES[measure])
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("round")
    axes.flat[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_experiment(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = dict.fromkeys(result["experiment"] for result in results)
    return {name: [r for r in results if r["experiment"] == name] for name in names}
