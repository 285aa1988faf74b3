"""Rehoming: a layout for those who are there, with as few moves as possible.

When workers leave, their experts find new homes; when workers join, they take their share from the
others. In each layer that is a flow of least cost from experts that lack holders (and workers that
hold more than their share) to workers that hold less: a residency that the old layout did not have
costs one, everything else nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fomoe_flwr.layout.shares import share_out
from fomoe_flwr.layout.table import Layout


@dataclass(frozen=True)
class Rehomed:
    """A layout for the workers that are present, and what it takes to get there.

    `moved` counts residencies (layer, worker, expert) that are new, each of them an expert to
    fetch. `lower_bound` is what had to move: the residencies that left with their workers, or the
    shares of those that joined. `short` counts the wanted residencies for which there is no room.
    """

    layout: Layout
    moved: int
    lower_bound: int
    short: int


def rehome(
    layout: Layout,
    present: Collection[int],
    overlap: int | None = None,
    room: Sequence[int] | None = None,
) -> Rehomed:
    """Give every expert `overlap` holders among the workers that are present.

    Workers that are not present hold nothing afterwards. Workers that are present and held nothing
    join; they may have numbers beyond those of the layout. Without `overlap` every expert keeps
    its number of holders, as far as there are as many workers. `room[worker]` is the most experts
    of a layer that fit a worker; shares are even, or with `room` in proportion to it. If nobody
    joins nobody gives up an expert, so shares may then be uneven.
    Raises ValueError if nobody is present or there is no room for one copy of every expert.
    """
    here = sorted(set(present))
    if not here or here[0] < 0:
        raise ValueError(f"present={here} must name at least one worker, counted from 0")
    num_workers = max(layout.num_workers, here[-1] + 1)
    if room is not None and len(room) != num_workers:
        raise ValueError(f"room has {len(room)} entries, {num_workers} workers need as many")
    vacant = ((),) * (num_workers - layout.num_workers)
    before = [(*workers, *vacant) for workers in layout.residents]
    # Layers that are all the same shall stay so.
    is_same = len(set(before)) == 1
    assigned = [0] * num_workers
    layers, moved, lower_bound, short = [], 0, 0, 0
    for workers in before[:1] if is_same else before:
        layer = _Layer(layout.num_experts, workers, here, overlap, room, assigned)
        layer.settle()
        layers.append(tuple(tuple(sorted(held)) for held in layer.held))
        moved += layer.moved()
        lower_bound += layer.lower_bound
        short += layer.short()
        assigned = [a + len(held) for a, held in zip(assigned, layer.held, strict=True)]
    times = layout.num_layers if is_same else 1
    return Rehomed(
        Layout(layout.num_experts, tuple(layers) * times),
        moved * times,
        lower_bound * times,
        short * times,
    )


class _Layer:
    """One layer on its way from old residents to new ones."""

    def __init__(
        self,
        num_experts: int,
        before: Sequence[Sequence[int]],
        present: Sequence[int],
        overlap: int | None,
        room: Sequence[int] | None,
        assigned: Sequence[int],
    ) -> None:
        self.num_experts = num_experts
        self.present = present
        self.before = [frozenset(held) for held in before]
        here = set(present)
        self.held = [set(held) if w in here else set() for w, held in enumerate(before)]
        self.holders = [0] * num_experts
        for expert in (expert for held in self.held for expert in held):
            self.holders[expert] += 1
        once = [sum(expert in held for held in before) for expert in range(num_experts)]
        self.wanted = [
            max(self.holders[e], min(overlap or once[e], len(present))) for e in range(num_experts)
        ]
        weights = [1.0 * num_experts] * len(before) if room is None else [float(r) for r in room]
        self.limit = [min(num_experts, int(weight)) for weight in weights]
        self.share = self._shares(weights, assigned)
        self.lower_bound = sum(max(0, self.share[w] - len(self.held[w])) for w in present)
        # While one move sufficed for each, no chain is cheaper than a single move.
        self.is_direct = True
        # Otherwise moves so far could be undone at a gain for ever.
        self.is_cheapest = True

    def moved(self) -> int:
        """Count the residencies that are new."""
        return sum(len(now - old) for now, old in zip(self.held, self.before, strict=True))

    def short(self) -> int:
        """Count the wanted residencies that are missing."""
        return sum(max(0, w - h) for w, h in zip(self.wanted, self.holders, strict=True))

    def settle(self) -> None:
        """Move experts until every expert has its holders and every worker its share."""
        for worker in self.present:
            while len(self.held[worker]) > self.share[worker] and self._flow(None, worker):
                pass
            while len(self.held[worker]) > self.limit[worker]:
                # Its room has shrunk, and nobody has room for what it holds.
                if not self._flow(None, worker):
                    self._drop_copy([worker, *self.present])
        lacking = [e for e in range(self.num_experts) if self.holders[e] < self.wanted[e]]
        while lacking:
            expert = min(lacking, key=lambda e: (self.holders[e], e))
            if not self._flow(expert, None):
                if self.holders[expert] == 0:
                    self._drop_copy(self.present)
                    continue
                lacking.remove(expert)
            elif self.holders[expert] == self.wanted[expert]:
                lacking.remove(expert)

    def _shares(self, weights: Sequence[float], assigned: Sequence[int]) -> list[int]:
        """Decide how many experts each worker holds in the end.

        What is missing goes to the workers furthest below their even (or proportional) share; those
        that join then get the rest of theirs from the workers furthest above.
        """
        counts = [min(len(held), most) for held, most in zip(self.held, self.limit, strict=True)]
        total = min(sum(self.wanted), sum(self.limit[w] for w in self.present))
        # What cannot be divided stays where there is most already.
        order = sorted(self.present, key=lambda w: (-counts[w], assigned[w], w))
        even = share_out(total, weights, self.num_experts, order)
        for _ in range(total - sum(counts)):
            below = [w for w in order if counts[w] < even[w]]
            counts[min(below, key=lambda w: counts[w] / weights[w])] += 1
        for worker in order:
            while not self.held[worker] and counts[worker] < even[worker]:
                counts[max(order, key=lambda w: counts[w] - even[w])] -= 1
                counts[worker] += 1
        return counts

    def _flow(self, expert: int | None, worker: int | None) -> bool:
        """Find a home for one copy of an expert, or for one expert of a worker; tell if there is.

        Homes are workers below their share. If the move cannot wait for those, all that have room
        come next: that is less even, but costs no second move.
        """
        is_urgent = worker is None or len(self.held[worker]) > self.limit[worker]
        limits = [self.share, self.limit] if is_urgent else [self.share]
        for most in (1, self.num_experts):
            for limit in limits:
                path = self._step(expert, worker, limit) if self.is_direct else []
                if path := path or self._path(expert, worker, limit, most):
                    self._shift(path)
                    return True
        return False

    def _step(self, expert: int | None, worker: int | None, limit: Sequence[int]) -> list[int]:
        """Return the path of a single move, or nothing."""
        free = [w for w in self.present if len(self.held[w]) < limit[w]]
        free.sort(key=lambda w: len(self.held[w]) - limit[w])
        for home in free:
            if expert is not None and expert not in self.held[home]:
                return [self._node(expert), home]
            if worker is not None and (given := self.held[worker] - self.held[home]):
                return [worker, self._node(min(given)), home]
        return []

    def _path(
        self, expert: int | None, worker: int | None, limit: Sequence[int], most: int
    ) -> list[int]:
        """Return the cheapest chain of moves to a worker below its limit; none if above `most`.

        Nodes alternate: a worker gives the expert that follows it to the worker after that.
        """
        start = self._node(expert) if expert is not None else worker
        assert start is not None
        cost, parent, queue = {start: 0}, {start: start}, deque([start])
        while queue:
            node = queue.popleft()
            for other, price in self._edges(node):
                if other not in cost or cost[node] + price < cost[other]:
                    cost[other], parent[other] = cost[node] + price, node
                    if other not in queue:
                        queue.append(other)
        homes = [w for w in self.present if w in cost and len(self.held[w]) < limit[w]]
        homes = [w for w in homes if cost[w] <= most]
        if not homes:
            return []
        self.is_direct = self.is_direct and most == 1
        path = [min(homes, key=lambda w: (cost[w], len(self.held[w]) - limit[w], w))]
        while path[-1] != start:
            path.append(parent[path[-1]])
        return path[::-1]

    def _edges(self, node: int) -> list[tuple[int, int]]:
        """Return (node, cost) for what may follow: takers of an expert, experts of a worker."""
        if node >= 0:
            old = self.before[node]
            back = -1 if self.is_cheapest else 0
            return [(self._node(e), 0 if e in old else back) for e in sorted(self.held[node])]
        expert = -1 - node
        return [
            (w, 0 if expert in self.before[w] else 1)
            for w in self.present
            if expert not in self.held[w]
        ]

    def _shift(self, path: Sequence[int]) -> None:
        for i, node in enumerate(path):
            if node < 0:
                expert = -1 - node
                if i:
                    self.held[path[i - 1]].remove(expert)
                    self.holders[expert] -= 1
                self.held[path[i + 1]].add(expert)
                self.holders[expert] += 1

    def _drop_copy(self, workers: Sequence[int]) -> None:
        """Make room: take from the first worker that has one an expert that others hold too."""
        for worker in workers:
            most = max(sorted(self.held[worker]), key=self.holders.__getitem__, default=-1)
            if most >= 0 and self.holders[most] > 1:
                self.held[worker].remove(most)
                self.holders[most] -= 1
                self.is_direct = self.is_cheapest = False
                return
        raise ValueError(
            f"workers {list(self.present)} have room for {sum(self.limit[w] for w in self.present)}"
            f" residents of a layer, fewer than its {self.num_experts} experts"
        )

    @staticmethod
    def _node(expert: int) -> int:
        """Return the number of an expert beside workers, who have those from 0 upwards."""
        return -1 - expert
