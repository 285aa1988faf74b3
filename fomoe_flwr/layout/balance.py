"""Balance: even out what workers may expect to compute, by swapping experts between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import combinations

from fomoe_flwr.layout.context import Load, check_load
from fomoe_flwr.layout.table import Layout

_LAYER_SHARE = 0.25
"""How much a layer's own gap counts beside the gap of the sums over layers. A smaller share makes
layers less even and sums no more even. A larger one makes sums less even and moves more experts.
Measured on Zipf loads."""


def worker_loads(layout: Layout, load: Load) -> list[float]:
    """Return each worker's expected load: the sum of the loads of its residents in all layers."""
    check_load(load, layout.num_layers, layout.num_experts)
    return [
        sum(counts[e] for counts, experts in zip(load, layout.of_worker(worker), strict=True)
            for e in experts)
        for worker in range(layout.num_workers)
    ]  # fmt: skip


def load_lower_bound(layout: Layout, load: Load) -> float:
    """Return what the busiest worker carries at least, however residents are swapped.

    It is the greater of two bounds. One is the mean. The other is the pigeonhole principle: some
    worker holds its share, rounded up, of the k heaviest experts of a layer; its other residents
    are at best the lightest ones.
    """
    check_load(load, layout.num_layers, layout.num_experts)
    present = [w for w in range(layout.num_workers) if any(layout.of_worker(w))]
    lightest, heaviest = [], []
    for layer, counts in enumerate(load):
        fewest = min(len(layout.residents[layer][worker]) for worker in present)
        order = sorted(range(layout.num_experts), key=counts.__getitem__)
        sizes = [counts[expert] for expert in order]
        lightest.append(sum(sizes[:fewest]))
        heaviest.append(lightest[-1])
        held = 0
        for k, expert in enumerate(reversed(order), start=1):
            held += len(layout.holders(layer, expert))
            share = -(-held // len(present))
            top, rest = sizes[-k:], sizes[:-k]
            others = (rest + top[share:])[: max(0, fewest - share)]
            heaviest[-1] = max(heaviest[-1], sum(top[:share]) + sum(others))
    mean = sum(worker_loads(layout, load)) / len(present)
    return max(mean, *(sum(lightest) - low + high for low, high in zip(lightest, heaviest)))  # noqa: B905


def even_out(layers: list[list[set[int]]], load: Load, tolerance: float) -> None:
    """Swap residents until no swap makes workers more even, in place ([layer][worker] -> experts).

    Two workers swap one expert of a layer for another, so holders and numbers of residents stay as
    they are. A swap is made if it narrows the gap between the two by more than `tolerance` times
    the mean load of a worker in a layer. Swaps that narrow it most come first, so that few experts
    move. The gap is mostly that of the sums over all layers, because the round waits for the
    largest sum. A small part of it is the layer's own, so that every worker gets its share of
    tokens in each layer. Every swap lowers the sum of squares of both, so the swaps come to an end.
    """
    loads = [
        [float(sum(counts[expert] for expert in held)) for held in workers]
        for counts, workers in zip(load, layers, strict=True)
    ]
    totals = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(totals) / (len(totals) * len(layers))
    if not mean:
        return
    # Above rounding errors, or two workers could swap for ever.
    least = max(tolerance, 1e-9) * mean
    for threshold in _falling(mean / 2, least):
        is_settled = False
        while not is_settled:
            is_settled = True
            for layer, (workers, counts) in enumerate(zip(layers, load, strict=True)):
                for one, other in combinations(range(len(workers)), 2):
                    gap = (totals[one] - totals[other]) * (1 - _LAYER_SHARE)
                    gap += (loads[layer][one] - loads[layer][other]) * _LAYER_SHARE
                    more, less = (one, other) if gap > 0 else (other, one)
                    swap = _best_swap(workers[more], workers[less], counts, abs(gap), threshold)
                    if swap is None:
                        continue
                    out, back = swap
                    workers[more] = workers[more] - {out} | {back}
                    workers[less] = workers[less] - {back} | {out}
                    for table in (loads[layer], totals):
                        table[more] -= counts[out] - counts[back]
                        table[less] += counts[out] - counts[back]
                    is_settled = False


def _falling(threshold: float, least: float) -> Iterator[float]:
    while threshold > 2 * least:
        yield threshold
        threshold /= 4
    yield least


def _best_swap(
    more: set[int], less: set[int], counts: Sequence[float], gap: float, threshold: float
) -> tuple[int, int] | None:
    """Find the swap after which two workers are nearest; None if it narrows the gap too little."""
    if gap <= threshold:
        return None
    out = sorted(more - less, key=lambda expert: (counts[expert], expert))
    sizes = [counts[expert] for expert in out]
    best, narrowed = None, threshold
    for back in sorted(less - more):
        at = bisect_left(sizes, counts[back] + gap / 2)
        for i in (at - 1, at):
            if 0 <= i < len(out):
                gain = gap - abs(gap - 2 * (sizes[i] - counts[back]))
                if gain > narrowed:
                    best, narrowed = (out[i], back), gain
    return best
