"""Bytes by topology: a ring of sites, as the paper has it, and a star around a server.

Sizes of the two parts of a model, `shared` and `expert` (the paper's S_dense, S_sparse), may be in
parameters or in bytes: results are in the same unit.
"""

from __future__ import annotations

import math


def ring_round(
    shared: float, expert: float, num_workers: int, overlap: float, migration_rate: float = 0.0
) -> float:
    """Return what one worker sends in one synchronisation by ring all-reduce (section 6.1).

    `migration_rate` is gamma: 0 for a fixed layout, 1/reshuffle_every for a random one, whose
    workers fetch the missing share of their new residents. LocalAdamW sends three times this.
    """
    migration = migration_rate * (1 - overlap / num_workers)
    held = expert * overlap / num_workers
    return ring_factor(num_workers) * shared + (ring_factor(overlap) + migration) * held


def ring_ratio_full_replica(
    shared: float, expert: float, num_workers: int, overlap: float, migration_rate: float = 0.0
) -> float:
    """Return a full replica's ring traffic over FoMoE's, in one synchronisation (section 6.3).

    1 if there is a single worker, who sends nothing either way.
    """
    if num_workers == 1:
        return 1.0
    partial = ring_round(shared, expert, num_workers, overlap, migration_rate)
    full = ring_round(shared, expert, num_workers, num_workers)
    return full / partial if partial else math.inf


def ring_ratio_ddp(
    shared: float,
    expert: float,
    num_workers: int,
    overlap: float,
    migration_rate: float,
    local_steps: int,
) -> float:
    """Return data-parallel training's ring traffic over FoMoE's, for the same steps (section 6.4).

    Data-parallel training is a full replica that synchronises after every step.
    """
    return local_steps * ring_ratio_full_replica(
        shared, expert, num_workers, overlap, migration_rate
    )


def ring_factor(num_members: float) -> float:
    """Return what a member of a ring all-reduce sends, over the size of what is averaged."""
    return 2 * (num_members - 1) / num_members


def star_round(shared: float, expert: float, num_workers: int, overlap: float) -> float:
    """Return what one worker sends to a server in one synchronisation, and receives from it."""
    return shared + overlap / num_workers * expert


def star_ratio_full_replica(
    shared: float, expert: float, num_workers: int, overlap: float
) -> float:
    """Return a full replica's star traffic over FoMoE's: 1 / (1 - f (1 - overlap / workers))."""
    return (shared + expert) / star_round(shared, expert, num_workers, overlap)
