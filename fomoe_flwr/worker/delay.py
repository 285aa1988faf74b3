"""The delay: steps that a worker takes between its snapshot and the answer to it.

With `outer.delay_steps` a round's pseudo-gradient is taken before the round's synchronisation point
(Streaming DiLoCo, arXiv 2501.18512). It travels while the worker trains on. These steps depend on
nothing that is still to come, so a process that outlives its tasks takes them at once, and every
other one when the next task is there: the result is the same, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from fomoe_flwr.config import Settings
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.parameters.fragments import sync_step
from fomoe_flwr.worker.state_files import (
    AHEAD,
    INNER,
    PLACE,
    kept_weights,
    named_weights,
    residents_in,
    state_file,
)
from fomoe_flwr.worker.state_store import STATES, UNREADABLE, tell_lost
from fomoe_flwr.worker.trainer import LocalReport
from fomoe_flwr.worker.workplace import lent_trainer


@dataclass
class Delayed:
    """The delayed steps that a worker of this process can take before its next task."""

    _steps: Callable[[], LocalReport | None] | None = None

    def put_off(self, steps: Callable[[], LocalReport | None]) -> None:
        """Note what to do as soon as the reply is on its way."""
        self._steps = steps if STATES.is_in_memory else None

    def take(self) -> LocalReport | None:
        """Take the steps that were put off, if there are any."""
        steps, self._steps = self._steps, None
        return steps() if steps else None


DELAYED = Delayed()
"""This process's own."""
_REPORTS: dict[Path, LocalReport] = {}
"""What the delayed steps did whose states this process keeps."""


def take_delayed_steps(
    settings: Settings,
    folder: Path,
    server_round: int,
    open_batches: Callable[[int], Batches],
    team: Team = ALONE,
) -> LocalReport | None:
    """Train from a round's snapshot to its synchronisation point, unless that was done before.

    What they lead to is stored beside the snapshot's state, which stays. Returns None where there
    is nothing to do: the round has no delay, or the worker has lost its state.
    """
    snapshot, ahead = (state_file(folder, server_round, kind) for kind in (INNER, AHEAD))
    if has_taken(ahead):
        return _REPORTS[ahead]
    if not settings.outer.delay_steps:
        return None
    try:
        with STATES.open(snapshot) as stored:
            residents, meta = residents_in(stored), stored.metadata() or {}
            received, trained = kept_weights(stored)
            place = json.loads(meta[PLACE])
    except UNREADABLE as error:
        tell_lost(snapshot, error)
        return None
    num_steps = sync_step(settings, server_round) - place["step"]
    if num_steps <= 0:
        return None
    pooled = None if place["pooled"] is None else torch.tensor(place["pooled"])
    lent = lent_trainer(settings, residents, open_batches, team, place["step"], pooled)
    with lent as trainer, closing(trainer):
        trainer.adopt(trained)
        trainer.restore(snapshot)
        report = trainer.train(num_steps)
        keep = named_weights(received, trainer.copied_weights())
        trainer.save(ahead, keep, on_disk=False)
    team.sum(torch.zeros(1))  # The others read what the first one has stored.
    _REPORTS.clear()
    _REPORTS[ahead] = report
    return report


def has_taken(ahead: Path) -> bool:
    """Tell whether this process has a state that some delayed steps led to."""
    return ahead in _REPORTS and STATES.has(ahead)
