"""The outer step: what the server does with the averaged pseudo-gradient of each key.

A pseudo-gradient is global minus local weights, so the plain average is `theta - lr * mean` with
lr 1. Outer state belongs to the key: an expert that nobody returned keeps value and momentum, and a
reshuffle changes neither. LocalAdamW and DES-LOC average Adam's moments as well; the server keeps
them, so that a worker that newly holds an expert gets its moments along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fomoe_flwr.aggregation import HolderMean
from fomoe_flwr.config import OuterSettings
from fomoe_flwr.model.state import Entry, State
from fomoe_flwr.routing import layer_of
from fomoe_flwr.synchronisation import MOMENTS


class OuterStep:
    """The step of `outer.name`, per key over its holders."""

    def __init__(self, settings: OuterSettings) -> None:
        self.settings = settings
        self.momentum: dict[str, Tensor] = {}
        """Nesterov's velocity by state key."""
        self.moments: dict[str, dict[str, Tensor]] = {name: {} for name in MOMENTS}
        """Adam's averaged moments by name and state key; empty before their first averaging."""

    def apply(self, state: State, mean: HolderMean) -> None:
        """Update the global state in place; keys and experts without a reply stay as they are."""
        settings = self.settings
        with torch.no_grad():
            for entry, rows, gradient in _means(mean):
                is_expert = rows is not None
                lr = settings.expert_lr if is_expert and settings.expert_lr else settings.lr
                if settings.sqrt_holders:
                    gradient = gradient * _sqrt_replies(mean, entry, rows, gradient.dim())
                self._update(entry, entry.of(state), rows, gradient, state[entry.key], lr)

    def average_moment(self, name: str, mean: HolderMean, state: State) -> None:
        """Take the workers' mean of one of Adam's moments; what nobody returned stays."""
        stored = self.moments[name]
        for entry, rows, value in _means(mean):
            full = stored.setdefault(entry.key, torch.zeros_like(state[entry.key]))
            target = entry.of({entry.key: full})
            if rows is None:
                target.copy_(value)
            else:
                target[rows] = value

    def _update(
        self,
        entry: Entry,
        value: Tensor,
        rows: Tensor | None,
        gradient: Tensor,
        whole: Tensor,
        lr: float,
    ) -> None:
        """Step as `torch.optim.SGD(nesterov=True)` does: v = mu v + g; theta -= lr (g + mu v)."""
        step, mu = gradient, self.settings.momentum
        if self.settings.name == "nesterov" and mu > 0:
            velocity = self.momentum.setdefault(entry.key, torch.zeros_like(whole))
            part = entry.of({entry.key: velocity})
            moved = (part if rows is None else part[rows]) * mu + gradient
            if rows is None:
                part.copy_(moved)
            else:
                part[rows] = moved
            step = gradient.add(moved, alpha=mu)
        if rows is None:
            value.add_(step, alpha=-lr)
        else:
            value[rows] = value[rows].add(step, alpha=-lr)

    def tensors(self) -> dict[str, Tensor]:
        """Return the outer state for a checkpoint."""
        stored = {f"momentum/{key}": value for key, value in self.momentum.items()}
        for name, moments in self.moments.items():
            stored |= {f"{name}/{key}": value for key, value in moments.items()}
        return stored

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the outer state of a checkpoint."""
        self.momentum, self.moments = {}, {name: {} for name in MOMENTS}
        for name, value in tensors.items():
            kind, _, key = name.partition("/")
            target = self.momentum if kind == "momentum" else self.moments[kind]
            target[key] = value.clone()


def _means(mean: HolderMean) -> Iterator[tuple[Entry, Tensor | None, Tensor]]:
    """Yield (entry, expert rows or None for the whole, mean) for all that was returned."""
    shared = mean.shared_means()
    for entry in mean.spec.shared:
        if entry.key in shared:
            yield entry, None, shared[entry.key]
    for entry in mean.row_entries:
        rows = mean.returned(layer_of(entry.key))
        if len(rows):
            yield entry, rows, mean.rows[entry.key][rows]


def _sqrt_replies(mean: HolderMean, entry: Entry, rows: Tensor | None, dim: int) -> Tensor:
    if rows is None:
        return torch.tensor(float(mean.shared_count)).sqrt()
    count = mean.expert_count[layer_of(entry.key), rows].float().sqrt()
    return count.view(-1, *(1 for _ in range(dim - 1)))
