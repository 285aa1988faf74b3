"""Pictures of loss: against tokens, bytes and time."""

from __future__ import annotations

from functools import partial

from matplotlib.axes import Axes

from fomoe_flwr.report.history import History
from fomoe_flwr.report.style import Palette, Panel


def loss_panels(history: History) -> list[Panel]:
    """Return held-out and training loss against the three things it costs."""
    if not history.rounds:
        return []
    loss = history.heldout(history.tokens)
    told = f"from {loss[0][1]:.3f} to {loss[-1][1]:.3f}" if loss else "not measured yet"
    return [
        Panel(
            f"Loss against {name}",
            f"held-out loss of the assembled model, {told}, over {len(history.rounds)} rounds",
            partial(_draw, history, x, label),
        )
        for name, x, label in (
            ("tokens", history.tokens, "million training tokens, all workers"),
            ("bytes", history.mebibytes, "MiB up and down, all workers"),
            ("time", history.minutes, "minutes"),
        )
    ]


def _draw(history: History, x: list[float], label: str, axes: Axes, palette: Palette) -> None:
    blue, orange = palette.series[:2]
    training, heldout = history.training(x), history.heldout(x)
    axes.plot(*zip(*training, strict=True), ".--", color=palette.muted, label="training")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color=blue, markersize=4, label="held out")
    entropy = history.summary.get("eval/unigram_entropy")
    if entropy is not None:
        axes.axhline(entropy, color=orange, linestyle=":", label="unigram entropy")
    axes.set_xlabel(label)
    axes.set_ylabel("nats per token")
    axes.set_xlim(left=0)
