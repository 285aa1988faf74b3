"""A team: the processes that train one worker together, as training sees them.

Here the team of one. Everything that training asks a team has a trivial answer for a lone process,
so there is one loop for both, and for one process it computes what it would without a team.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fomoe_flwr.config import LocalSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fomoe_flwr.data.batches import Batches

_T = TypeVar("_T")


class Team:
    """A process alone; the base of a team of several."""

    name = "none"
    """How the team parts a model: `none`, `ddp` or `fsdp`."""
    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this process is the one that reads text and writes results."""
        return self.rank == 0

    def arrange(self, model: PreTrainedModel) -> None:
        """Part a model that has no memory yet among the processes."""

    def take(self, model: PreTrainedModel) -> None:
        """Get ready to compute with a model that has memory now."""

    def let_go(self) -> None:
        """Forget the model taken last."""

    def run(self, function: Callable[..., _T], model: PreTrainedModel, *arguments: object) -> _T:
        """Return `function(model, *arguments)`, computed where parameters are whole."""
        return function(model, *arguments)

    def passes(self, settings: LocalSettings) -> int:
        """Return the forward and backward passes of this process in a step."""
        return settings.accumulate

    def micro_batches(
        self, batches: Batches, settings: LocalSettings, device: torch.device
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield this process's windows [B, S + 1] of a step, pass by pass, and their weight.

        The mean over processes and passes of weight times mean loss is the step's mean loss.
        """
        for _ in range(settings.accumulate):
            yield to_device(batches.next_batch(), device), 1.0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor over the processes."""
        return self.sum(tensor) / self.size


ALONE = Team()


def to_device(windows: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for it."""
    if device.type == "cuda":
        # From pageable memory the copy would make the host wait for the GPU.
        windows = windows.pin_memory()
    return windows.to(device, non_blocking=True)
