"""The ring: experts in a circle, workers that hold arcs of it, and trades that make it random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TypeVar

_Item = TypeVar("_Item")

_TRADES_PER_WORKER = 16
"""Trades that make a ring random; measured, four to eight forget the start (128 workers)."""


def worker_order(extras: list[int], num_extra: int, rng: Random) -> list[int]:
    """Draw the ring order of a layer; its first `num_extra` workers will hold one expert more.

    Those are the workers with the fewest extra experts so far, so over all layers the loads differ
    by at most one as well. `extras` is updated.
    """
    by_extras = sorted(shuffled(range(len(extras)), rng), key=extras.__getitem__)
    for worker in by_extras[:num_extra]:
        extras[worker] += 1
    return shuffled(by_extras[:num_extra], rng) + shuffled(by_extras[num_extra:], rng)


def even_ring(order: Sequence[int], num_experts: int, overlap: int) -> list[set[int]]:
    """Place blocks of consecutive experts on `overlap` neighbours each; return [worker] -> experts.

    Experts that fill no block for everybody are dealt from the ring's start, each to the next
    `overlap` workers, so that the loads differ by at most one.
    """
    num_workers = len(order)
    block = num_experts // num_workers
    sets: list[set[int]] = [set() for _ in order]
    for expert in range(num_experts):
        rest = expert - block * num_workers
        start = expert // block if rest < 0 else rest * overlap
        for step in range(overlap):
            sets[order[(start + step) % num_workers]].add(expert)
    return sets


def arcs(order: Sequence[int], counts: Sequence[int], num_experts: int) -> list[set[int]]:
    """Give each worker an arc of `counts[worker]` consecutive experts; return [worker] -> experts.

    Laid end to end, the arcs go round the ring of experts a whole number of times. That number is
    the overlap, so every expert has as many holders. Where an arc ends just where the first began,
    the next one starts a fraction of an arc further on. Otherwise the workers before it and after
    it would be islands (see `draw_layout`).
    """
    ends, at = [], 0
    for worker in order:
        at += counts[worker]
        ends.append(at % num_experts == 0)
    # With equal counts, shifted so, the arcs start at equal distances.
    gap = max(1, math.gcd(num_experts, *counts) // ends.count(True))
    sets: list[set[int]] = [set() for _ in order]
    start = 0
    for worker, closes in zip(order, ends, strict=True):
        sets[worker] = {(start + i) % num_experts for i in range(counts[worker])}
        start += counts[worker] + gap * closes
    return sets


def trade(sets: list[set[int]], rng: Random) -> None:
    """Turn a layer into a random one with the same number of holders and loads, in place.

    Two workers pool the experts that only one of them holds and deal them out anew. Such trades
    (Curveball, Strona et al. 2014) have the uniform distribution over all such layouts as their
    limit, and reach it far sooner than swaps of single experts.
    """
    for _ in range(_TRADES_PER_WORKER * len(sets)):
        first, second = shuffled(range(len(sets)), rng, 2)
        both = sets[first] & sets[second]
        # Sorted, because a set's order is no part of the language.
        pool = shuffled(sorted(sets[first] ^ sets[second]), rng)
        cut = len(sets[first]) - len(both)
        sets[first], sets[second] = both.union(pool[:cut]), both.union(pool[cut:])


def shuffled(items: Sequence[_Item], rng: Random, count: int | None = None) -> list[_Item]:
    """Return `count` items (default all) in random order.

    Python promises stable sequences across its versions for `random()` only, not for `shuffle`.
    """
    pool = list(items)
    count = len(pool) if count is None else count
    for i in range(count):
        j = i + int(rng.random() * (len(pool) - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]
