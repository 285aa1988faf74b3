"""The outer step: what the server does with the averaged pseudo-gradient of each key.

A pseudo-gradient is global minus local weights, so the plain average is `theta - lr * mean` with
lr 1. Outer state belongs to the key: an expert that nobody returned keeps value and momentum, and a
reshuffle changes neither. LocalAdamW and DES-LOC average Adam's moments as well; the server keeps
them, so that a worker that newly holds an expert gets its moments along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.codecs.slabs import SLAB, slabs
from fomoe_flwr.config import OuterSettings
from fomoe_flwr.model.homes import MEMORY, WEIGHTS, Home
from fomoe_flwr.model.state import Entry, State
from fomoe_flwr.parameters.fragments import MOMENTS


class OuterStep:
    """The step of `outer.name`, per key over its holders. State and weights lie in `home`."""

    def __init__(self, settings: OuterSettings, home: Home = MEMORY) -> None:
        self.settings = settings
        self.home = home
        self.momentum: dict[str, Tensor] = {}
        """Nesterov's velocity by state key."""
        self.moments: dict[str, dict[str, Tensor]] = {name: {} for name in MOMENTS}
        """Adam's averaged moments by name and state key; empty before their first averaging."""

    def apply(self, state: State, mean: HolderMean) -> None:
        """Update the global state in place; keys and experts without a reply stay as they are."""
        settings = self.settings
        with torch.no_grad():
            for entry, rows, gradient in _means(mean):
                if not state[entry.key].is_floating_point():  # a table of ids: nothing trains it
                    continue
                is_expert = rows is not None
                lr = settings.expert_lr if is_expert and settings.expert_lr else settings.lr
                velocity = None
                self.home.before_write(f"{WEIGHTS}/{entry.key}")
                if settings.name == "nesterov" and settings.momentum > 0:
                    whole = self._open("momentum", self.momentum, state, entry)
                    velocity = entry.of({entry.key: whole})
                if rows is not None and len(rows) == len(gradient) and not settings.sqrt_holders:
                    rows = None  # All of them, and all alike: in one go.
                for row in range(1) if rows is None else rows.tolist():
                    self._update(
                        _flat(entry.of(state), row, rows),
                        _flat(gradient, row, rows),
                        None if velocity is None else _flat(velocity, row, rows),
                        lr,
                        _sqrt_replies(mean, entry, row, rows) if settings.sqrt_holders else 1.0,
                    )

    def average_moment(self, name: str, mean: HolderMean, state: State) -> None:
        """Take the workers' mean of one of Adam's moments; what nobody returned stays."""
        stored = self.moments[name]
        for entry, rows, value in _means(mean):
            full = self._open(name, stored, state, entry)
            target = entry.of({entry.key: full})
            if rows is None:
                target.copy_(value)
                continue
            for row in rows.tolist():
                target[row].copy_(value[row])

    def _open(self, kind: str, stored: dict[str, Tensor], state: State, entry: Entry) -> Tensor:
        """Return outer state that may be written to; zeros the first time."""
        name = f"{kind}/{entry.key}"
        if entry.key not in stored:
            stored[entry.key] = self.home.make(name, state[entry.key].detach())
        self.home.before_write(name)
        return stored[entry.key]

    def _update(
        self, value: Tensor, gradient: Tensor, velocity: Tensor | None, lr: float, scale: float
    ) -> None:
        """Step as `torch.optim.SGD(nesterov=True)` does: v = mu v + g; theta -= lr (g + mu v).

        On flat views, in slabs that stay in the caches of all cores.
        """
        mu = self.settings.momentum
        for part in slabs(value.numel(), SLAB * torch.get_num_threads()):
            step = gradient[part] if scale == 1 else gradient[part] * scale
            if velocity is not None:
                velocity[part].mul_(mu).add_(step)
                step = step.add(velocity[part], alpha=mu)
            value[part].add_(step, alpha=-lr)

    def tensors(self) -> dict[str, Tensor]:
        """Return the outer state for a checkpoint."""
        stored = {f"momentum/{key}": value for key, value in self.momentum.items()}
        for name, moments in self.moments.items():
            stored |= {f"{name}/{key}": value for key, value in moments.items()}
        return stored

    def restore(self, tensors: Mapping[str, Tensor], source: Path | None = None) -> None:
        """Take the outer state of a checkpoint; `source` is its folder of slabs, if it has one."""
        self.momentum, self.moments = {}, {name: {} for name in MOMENTS}
        for name, value in tensors.items():
            kind, _, key = name.partition("/")
            target = self.momentum if kind == "momentum" else self.moments[kind]
            target[key] = self.home.take(name, value, source)


def _means(mean: HolderMean) -> Iterator[tuple[Entry, Tensor | None, Tensor]]:
    """Yield (entry, its returned rows or None for the whole, mean of all rows)."""
    shared = mean.shared_means()
    for entry in mean.spec.shared:
        if entry.key in shared:
            yield entry, None, shared[entry.key]
    for entry in mean.row_entries:
        rows = mean.returned(mean.spec.layer_of(entry.key))
        if len(rows):
            yield entry, rows, mean.rows[entry.key]


def _flat(tensor: Tensor, row: int, rows: Tensor | None) -> Tensor:
    return (tensor if rows is None else tensor[row]).view(-1)


def _sqrt_replies(mean: HolderMean, entry: Entry, row: int, rows: Tensor | None) -> float:
    if rows is None:
        return math.sqrt(mean.shared_count)
    return math.sqrt(mean.expert_count[mean.spec.layer_of(entry.key), row])
