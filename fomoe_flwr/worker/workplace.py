"""A worker's workplace: a model that is lent to it, with threads and heap, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fomoe_flwr.config import Settings
from fomoe_flwr.config.execution import is_heap_held
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.parallel.team import Team
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.device import pick_device
from fomoe_flwr.worker.heap import held_heap
from fomoe_flwr.worker.trainer import LocalTrainer


@contextmanager
def lent_trainer(
    settings: Settings,
    residents: Residents,
    open_batches: Callable[[int], Batches],
    team: Team,
    first_step: int,
    pooled_share: Tensor | None,
) -> Iterator[LocalTrainer]:
    """Yield a trainer whose weights are of any value; see `LocalTrainer`. The caller closes it."""
    device = pick_device(settings.local.device)
    heap = held_heap(is_heap_held(settings.execution, device.type))
    lent = CACHE.model(settings, residents, device, team)
    with heap, _threads(settings.local.threads // team.size), lent as training:
        yield LocalTrainer(
            training,
            settings,
            residents,
            open_batches,
            first_step=first_step,
            pooled_share=pooled_share,
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
