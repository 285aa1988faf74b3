"""The outer step: what the server does with the averaged pseudo-gradient of each key.

A pseudo-gradient is global minus local weights, so the plain average is `theta - lr * mean` with
lr 1. Outer state belongs to the key: an expert that nobody returned keeps value and momentum, and a
reshuffle changes neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fomoe_flwr.aggregation import HolderMean
from fomoe_flwr.config import OuterSettings


class OuterStep:
    """Plain average (FedAvg, Photon) or Nesterov momentum (DiLoCo), per key over its holders."""

    def __init__(self, settings: OuterSettings) -> None:
        self.settings = settings
        self.momentum: dict[str, Tensor] = {}

    def apply(self, state: Mapping[str, Tensor], mean: HolderMean) -> None:
        """Update the global state in place; keys and experts without a reply stay as they are."""
        with torch.no_grad():
            for key, rows, gradient in _gradients(mean):
                self._update(key, state[key], rows, gradient)

    def _update(self, key: str, value: Tensor, rows: Tensor | None, gradient: Tensor) -> None:
        """Step as `torch.optim.SGD(nesterov=True)` does: v = mu v + g; theta -= lr (g + mu v)."""
        step = gradient
        if self.settings.name == "nesterov" and self.settings.momentum > 0:
            mu = self.settings.momentum
            velocity = self.momentum.setdefault(key, torch.zeros_like(value))
            if rows is None:
                velocity.mul_(mu).add_(gradient)
                step = gradient.add(velocity, alpha=mu)
            else:
                moved = velocity[rows] * mu + gradient
                velocity[rows] = moved
                step = gradient.add(moved, alpha=mu)
        if rows is None:
            value.add_(step, alpha=-self.settings.lr)
        else:
            value[rows] = value[rows].add(step, alpha=-self.settings.lr)

    def tensors(self) -> dict[str, Tensor]:
        """Return the outer state for a checkpoint."""
        return {f"momentum/{key}": value for key, value in self.momentum.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the outer state of a checkpoint."""
        self.momentum = {
            name.removeprefix("momentum/"): value.clone()
            for name, value in tensors.items()
            if name.startswith("momentum/")
        }


def _gradients(mean: HolderMean) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    for key, gradient in mean.shared_means().items():
        yield key, None, gradient
    for entry in mean.spec.expert:
        rows = mean.returned(entry.layer or 0)
        if len(rows):
            yield entry.key, rows, mean.experts[entry.key][rows]
