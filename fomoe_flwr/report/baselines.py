"""Pictures of what a run saves: bytes and memory beside those of the methods it stands against."""

from __future__ import annotations

from functools import partial

from matplotlib.axes import Axes

from fomoe_flwr.report.history import History
from fomoe_flwr.report.style import Palette, Panel
from fomoe_flwr.report.units import size

Bars = list[tuple[str, float, bool]]
"""Name, bytes, whether it is this run."""


def baseline_panels(history: History) -> list[Panel]:
    """Return bytes sent and memory held, beside full replicas and data-parallel training."""
    predicted, rounds = history.predicted, len(history.rounds)
    panels = []
    if rounds and predicted["bytes/full_replica_per_round"]:
        steps = rounds * history.settings.local.steps
        sent: Bars = [
            ("this run", history.mebibytes[-1] * 2**20, True),
            ("full replicas", rounds * predicted["bytes/full_replica_per_round"], False),
            ("data-parallel", steps * predicted["bytes/ddp_per_step"], False),
        ]
        panels.append(
            Panel(
                "Bytes on the wire",
                "up and down, all workers, measured here and reckoned for the others over the same "
                + _told(sent),
                partial(_draw, sent),
                1.9,
            )
        )
    held: Bars = [
        ("a worker here", predicted["memory/worker_bytes"], True),
        ("a full replica", predicted["memory/full_replica_bytes"], False),
    ]
    panels.append(
        Panel(
            "Training state of a worker",
            "weights, gradients and optimizer state, without activations " + _told(held),
            partial(_draw, held),
            1.6,
        )
    )
    return panels


def _told(bars: Bars) -> str:
    unit = "rounds: " if len(bars) > 2 else "(reckoned): "
    return unit + ", ".join(f"{name} {size(amount)}" for name, amount, _ in bars)


def _draw(bars: Bars, axes: Axes, palette: Palette) -> None:
    for place, (_, amount, ours) in enumerate(bars):
        axes.barh(place, amount, color=palette.series[0] if ours else palette.muted, height=0.6)
        axes.annotate(
            f" {size(amount)}", (amount, place), va="center", color=palette.ink, fontsize=10
        )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(amount for _, amount, _ in bars))
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
