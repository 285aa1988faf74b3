"""Pictures of a sweep: loss against what it costs, and the front of what nothing else beats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from fomoe_flwr.report.style import Palette, Panel

_MARKERS = "osD^v<>PX*"
_NEEDED = ("eval/loss", "comm/bytes_up", "comm/bytes_down", "memory/worker_bytes")


@dataclass(frozen=True)
class Choice:
    """One combination of a sweep, over its seeds."""

    varied: tuple[tuple[str, str], ...]
    """Key and value of what varies, without the seed."""
    losses: tuple[float, ...]
    bytes_sent: float
    memory_bytes: float

    @property
    def loss(self) -> float:
        """Mean held-out loss over seeds."""
        return statistics.mean(self.losses)

    @property
    def label(self) -> str:
        """What varies, for people."""
        return ", ".join(value for _, value in self.varied) or "all"


def choices_of(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Choice]:
    """Gather the completed jobs of a sweep's table by what varies besides the seed."""
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "completed" and all(row[key] is not None for key in _NEEDED):
            varied = tuple((key, str(row[key])) for key in keys if key != "seed")
            groups.setdefault(varied, []).append(row)
    return [
        Choice(
            varied,
            tuple(row["eval/loss"] for row in group),
            statistics.mean(row["comm/bytes_up"] + row["comm/bytes_down"] for row in group),
            statistics.mean(row["memory/worker_bytes"] for row in group),
        )
        for varied, group in groups.items()
    ]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points (cost, loss) that none beats in both, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    best, kept = float("inf"), []
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def pareto_panels(choices: Sequence[Choice]) -> list[Panel]:
    """Return loss against bytes and against a worker's memory."""
    if not choices:
        return []
    seeds = max(len(choice.losses) for choice in choices)
    bars = f"; bars span {seeds} seeds" if seeds > 1 else ""
    return [
        Panel(
            f"Loss against {name}",
            "on the front: "
            + "; ".join(choices[i].label for i in front([(at(c), c.loss) for c in choices]))
            + bars,
            partial(_draw, choices, [at(choice) for choice in choices], label),
            3.8,
        )
        for name, label, at in (
            ("bytes", "MiB up and down, all workers", _mebibytes_sent),
            ("memory", "MiB of training state on a worker", _mebibytes_held),
        )
    ]


def _mebibytes_sent(choice: Choice) -> float:
    return choice.bytes_sent / 2**20


def _mebibytes_held(choice: Choice) -> float:
    return choice.memory_bytes / 2**20


def _draw(
    choices: Sequence[Choice], x: Sequence[float], label: str, axes: Axes, palette: Palette
) -> None:
    best = front([(at, choice.loss) for at, choice in zip(x, choices, strict=True)])
    axes.step(
        [x[i] for i in best],
        [choices[i].loss for i in best],
        where="post",
        color=palette.muted,
        linestyle="--",
        label="front",
    )
    # The first key gives the colour, the others the marker.
    firsts = list(dict.fromkeys(choice.varied[:1] for choice in choices))
    others = list(dict.fromkeys(choice.varied[1:] for choice in choices))
    for at, choice in zip(x, choices, strict=True):
        color = palette.series[firsts.index(choice.varied[:1]) % len(palette.series)]
        low, high = choice.loss - min(choice.losses), max(choice.losses) - choice.loss
        marker = _MARKERS[others.index(choice.varied[1:]) % len(_MARKERS)]
        axes.errorbar(
            at, choice.loss, [[low], [high]], fmt=marker, color=color, markersize=6, elinewidth=1
        )
    for first in firsts:
        if first:
            color = palette.series[firsts.index(first) % len(palette.series)]
            axes.plot([], [], "s", color=color, label=f"{_short(first[0][0])} {first[0][1]}")
    for other in others:
        if other:
            marker = _MARKERS[others.index(other) % len(_MARKERS)]
            name = ", ".join(value for _, value in other)
            axes.plot([], [], marker, color=palette.muted, label=name)
    axes.set_xlabel(label)
    axes.set_ylabel("held-out loss, nats per token")


def _short(key: str) -> str:
    return key.split(".")[-1]
