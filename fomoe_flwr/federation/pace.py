"""The pace: how many steps a round gives a worker."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fomoe_flwr.config import Settings
from fomoe_flwr.parameters.fragments import snapshot_step

_MOST_STEPS = 2**20


def steps_at(settings: Settings, worker: int, measured: Mapping[int, float]) -> int:
    """Return the steps that `local.round_seconds` give a worker: at least one.

    The speed is that of `local.speeds`, else the `measured` one in steps per second; a worker that
    was not measured yet takes `local.steps`.
    """
    local = settings.local
    speed = local.speeds[worker] if local.speeds else measured.get(worker, 0.0)
    if not speed:
        return local.steps
    # A speed such as 0.1 is no sum of powers of two.
    return max(1, min(_MOST_STEPS, math.floor(local.round_seconds * speed + 1e-9)))


def steps_between(settings: Settings, server_round: int) -> int:
    """Return the most steps between two replies of a worker where all take `local.steps`."""
    return snapshot_step(settings, server_round) - snapshot_step(settings, server_round - 1)


def speeds_of(settings: Settings, replies: Mapping[int, Mapping[str, float]]) -> dict[int, float]:
    """Return the steps per second of every worker that replied."""
    tokens = settings.tokens_per_worker_step
    return {
        worker: reply["tokens"] / tokens / reply["seconds"]
        for worker, reply in replies.items()
        if reply["seconds"] > 0
    }
