"""Payload bytes of a round in the star that Flower has: a worker gets and returns what it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fomoe_flwr.codecs.sizes import CodecPair
from fomoe_flwr.config import ModelSettings, OuterSettings, Settings
from fomoe_flwr.costs.counts import parameter_counts, resident_counts
from fomoe_flwr.costs.topology import ring_factor, ring_round
from fomoe_flwr.layout import MOVING_KINDS, Layout, begins_period
from fomoe_flwr.parameters.fragments import fragment_of_round, fragment_rows, moments_of_round
from fomoe_flwr.parameters.keys import is_expert_key, layer_of, sparse_layers
from fomoe_flwr.parameters.shapes import (
    buffer_shapes,
    layer_groups,
    num_sparse_layers,
    parameter_shapes,
)


@dataclass(frozen=True)
class Payload:
    """Payload bytes of one message, by what they carry."""

    shared: int = 0
    experts: int = 0
    moments: int = 0
    """Both moments' shared and expert vectors."""

    @property
    def total(self) -> int:
        """Bytes of all arrays."""
        return self.shared + self.experts + self.moments


@dataclass(frozen=True)
class RoundBytes:
    """Payload bytes of one round, for each worker: to the server and from the server."""

    up_per_worker: list[int]
    down_per_worker: list[int]

    @property
    def up(self) -> int:
        """Bytes that all workers send together."""
        return sum(self.up_per_worker)

    @property
    def down(self) -> int:
        """Bytes that all workers receive together."""
        return sum(self.down_per_worker)


def predict_bytes(settings: Settings, layout: Layout) -> RoundBytes:
    """Predict the payload bytes of one round, mean over a full cycle of rounds like this layout's.

    A cycle ends when fragments, moments and moves of the layout are where they began. The first
    round of a run costs less, and so do rounds with failures; `predict_round` is exact. With one
    fragment and no moments both give the same: what a worker holds, down and up.
    """
    outer, moving = settings.outer, _moves(settings)
    periods = [outer.first_moment_every, outer.second_moment_every]
    turns = math.lcm(*periods) if outer.name == "des_loc" else 1
    cycle = outer.fragments * turns
    if moving and outer.fragments > 1:
        cycle = math.lcm(cycle, settings.layout.reshuffle_every)
    sizes = _part_sizes(settings.model, layout, outer.fragments)
    rounds = [
        # Begun late enough for every moment to have been averaged once.
        _round_bytes(
            settings,
            sizes,
            server_round,
            [moving and begins_period(settings.layout, server_round)] * layout.num_workers,
        )
        for server_round in range(cycle + 1, 2 * cycle + 1)
    ]
    up, down = (
        [round(sum(counts) / cycle) for counts in zip(*columns, strict=True)]
        for columns in (
            [r.up_per_worker for r in rounds],
            [r.down_per_worker for r in rounds],
        )
    )
    return RoundBytes(up, down)


def predict_round(
    settings: Settings, layout: Layout, server_round: int, previous: Layout | None = None
) -> RoundBytes:
    """Predict exactly the payload bytes of a round; rounds count from 1.

    It holds if neither this round nor one before had a failure. `previous` is the layout of the
    round before; left out, it is the same. A worker that holds other experts than before gets its
    whole slice, whatever the fragment. Moments go up at the end of their round. They come back,
    averaged, at the beginning of the next.
    """
    before = previous or layout
    moved = [
        before.of_worker(worker) != layout.of_worker(worker) for worker in range(layout.num_workers)
    ]
    sizes = _part_sizes(settings.model, layout, settings.outer.fragments)
    return _round_bytes(settings, sizes, server_round, moved)


def predict_payloads(
    settings: Settings, layout: Layout, server_round: int
) -> tuple[list[Payload], list[Payload]]:
    """Predict what each worker sends and receives in a round, by kind; else as `predict_round`."""
    sizes = _part_sizes(settings.model, layout, settings.outer.fragments)
    return _payloads(settings, sizes, server_round, [False] * layout.num_workers)


def full_replica_bytes(settings: Settings) -> RoundBytes:
    """Predict the bytes of a round in which every worker holds everything, all else alike."""
    model, workers = settings.model, settings.layout.num_workers
    replica = replace(settings, layout=replace(settings.layout, kind="fixed"))
    one = predict_bytes(replica, Layout.full(num_sparse_layers(model), model.num_experts, 1))
    return RoundBytes(one.up_per_worker * workers, one.down_per_worker * workers)


def diloco_bytes(settings: Settings) -> RoundBytes:
    """Predict the bytes of a round of DiLoCo or Photon: full replicas, weights only, undivided.

    A step of data-parallel training takes as many: gradients up, and their mean down.
    """
    return full_replica_bytes(as_diloco(settings))


def as_diloco(settings: Settings) -> Settings:
    """Return the settings with the outer step of DiLoCo: weights only, undivided."""
    outer = replace(settings.outer, name="average", momentum=0.0, fragments=1)
    return replace(settings, outer=outer)


def ring_bytes(settings: Settings, layout: Layout) -> float:
    """Predict what a worker sends in one synchronisation by ring all-reduce, mean over a cycle.

    Shared keys go around all workers, each expert around its holders, and workers fetch the experts
    that a moving layout newly gives them. `balanced` layouts count as fixed: their moves depend on
    measured load, and are few.
    """
    model, outer, workers = settings.model, settings.outer, layout.num_workers
    held = sum(len(experts) for layer in layout.residents for experts in layer)
    overlap = held / (layout.num_layers * model.num_experts)
    rate = _migration_rate(settings, held / (layout.num_layers * workers))
    shared, experts = kind_bytes(settings)
    sent = ring_round(shared, experts, workers, overlap, rate)
    buffers = num_buffers(model) * settings.wire.codecs_up.shared.bytes_per_element
    return (state_factor(outer) * sent + ring_factor(workers) * buffers) / outer.fragments


def kind_bytes(settings: Settings) -> tuple[float, float]:
    """Return the bytes of all shared and of all expert parameters, encoded as they go up."""
    counts, codecs = parameter_counts(settings.model), settings.wire.codecs_up
    return (
        counts.shared * codecs.shared.bytes_per_element,
        counts.expert * codecs.experts.bytes_per_element,
    )


def state_factor(outer: OuterSettings) -> float:
    """Return the numbers a parameter that a synchronisation carries, mean over a cycle."""
    if outer.name == "des_loc":
        return 1 + 1 / outer.first_moment_every + 1 / outer.second_moment_every
    return 3.0 if outer.name == "local_adamw" else 1.0


def num_buffers(model: ModelSettings) -> int:
    """Count the elements of a model's persistent buffers: they travel, but have no moments."""
    return sum(
        group.copies * math.prod(shape)
        for group in layer_groups(model)
        for shape in group.buffers.values()
    )


@dataclass(frozen=True)
class _KindSize:
    """Elements of the shared parameters or of a worker's experts, in one fragment or several."""

    parameters: int = 0
    buffers: int = 0

    def __add__(self, other: _KindSize) -> _KindSize:
        return _KindSize(self.parameters + other.parameters, self.buffers + other.buffers)


@dataclass(frozen=True)
class _PartSize:
    """Elements that one worker holds of one fragment, or of several."""

    shared: _KindSize = _KindSize()
    experts: _KindSize = _KindSize()

    def __add__(self, other: _PartSize) -> _PartSize:
        return _PartSize(self.shared + other.shared, self.experts + other.experts)

    def payload(self, codecs: CodecPair, num_moments: int) -> Payload:
        """Return the bytes with this many moments; buffers travel, but have no moments."""
        shared, experts = self.shared, self.experts
        one_moment = codecs.shared.num_bytes(shared.parameters) + codecs.experts.num_bytes(
            experts.parameters
        )
        return Payload(
            codecs.shared.num_bytes(shared.parameters + shared.buffers),
            codecs.experts.num_bytes(experts.parameters + experts.buffers),
            num_moments * one_moment,
        )


def _part_sizes(
    model: ModelSettings, layout: Layout, num_fragments: int
) -> list[tuple[_PartSize, ...]]:
    """Count, for every worker, what it holds of each fragment."""
    resident_counts(model, layout)  # refuses a layout of another model
    shared = [[0, 0] for _ in range(num_fragments)]
    held = [[[0, 0] for _ in range(num_fragments)] for _ in range(layout.num_workers)]
    holders = [_by_count(of_workers) for of_workers in layout.residents]
    parameters = parameter_shapes(model)
    sparse = sparse_layers(parameters)
    for kind, shapes in enumerate((parameters, buffer_shapes(model))):
        for key, shape in shapes.items():
            row_size = math.prod(shape[1:])
            if not is_expert_key(key, model.routing_mode):
                for fragment, count in enumerate(shared):
                    start, stop = fragment_rows(key, shape[0], fragment, num_fragments)
                    count[kind] += (stop - start) * row_size
                continue
            for rows, workers in holders[sparse.index(layer_of(key))].items():
                cuts = [fragment_rows(key, rows, f, num_fragments) for f in range(num_fragments)]
                for worker in workers:
                    for fragment, (start, stop) in enumerate(cuts):
                        held[worker][fragment][kind] += (stop - start) * row_size
    return [
        tuple(
            _PartSize(_KindSize(*all_of), _KindSize(*own))
            for all_of, own in zip(shared, parts, strict=True)
        )
        for parts in held
    ]


def _by_count(residents_of_workers: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Group workers by how many experts of a layer they hold: workers are many, numbers few."""
    groups: dict[int, list[int]] = {}
    for worker, experts in enumerate(residents_of_workers):
        groups.setdefault(len(experts), []).append(worker)
    return groups


def _round_bytes(
    settings: Settings,
    sizes: Sequence[tuple[_PartSize, ...]],
    server_round: int,
    moved: Sequence[bool],
) -> RoundBytes:
    up, down = _payloads(settings, sizes, server_round, moved)
    return RoundBytes([payload.total for payload in up], [payload.total for payload in down])


def _payloads(
    settings: Settings,
    sizes: Sequence[tuple[_PartSize, ...]],
    server_round: int,
    moved: Sequence[bool],
) -> tuple[list[Payload], list[Payload]]:
    outer = settings.outer
    codecs_up, codecs_down = settings.wire.codecs_up, settings.wire.codecs_down
    fragment = fragment_of_round(outer, server_round)
    sent = len(moments_of_round(outer, server_round))
    up = [parts[fragment].payload(codecs_up, sent) for parts in sizes]
    averaged = moments_of_round(outer, server_round - 1) if server_round > 1 else ()
    # A whole slice takes a moment along only once all fragments of it have been averaged.
    whole_moments = sum(_is_complete(outer, name, server_round - 1) for name in averaged)
    down = []
    for parts, has_moved in zip(sizes, moved, strict=True):
        if server_round == 1 or has_moved or outer.fragments == 1:
            # One vector for all fragments together: a codec rounds its bytes up once.
            whole = sum(parts, _PartSize())
            down.append(whole.payload(codecs_down, whole_moments))
        else:
            lacking = fragment_of_round(outer, server_round - 1)
            down.append(parts[lacking].payload(codecs_down, len(averaged)))
    return up, down


def _is_complete(outer: OuterSettings, moment: str, last_round: int) -> bool:
    """Tell whether all fragments of a moment have been averaged by the end of a round."""
    return all(
        any(
            moment in moments_of_round(outer, server_round)
            for server_round in range(fragment + 1, last_round + 1, outer.fragments)
        )
        for fragment in range(outer.fragments)
    )


def _migration_rate(settings: Settings, held: float) -> float:
    """Return gamma: the share of the experts that a draw may exchange which a round exchanges."""
    layout, experts = settings.layout, settings.model.num_experts
    if not _moves(settings) or layout.kind == "balanced" or held >= experts:
        return 0.0
    if layout.kind == "random":
        return 1 / layout.reshuffle_every
    new_share = min(layout.roll_by, held, experts - held) / held
    return new_share / (1 - held / experts) / layout.reshuffle_every


def _moves(settings: Settings) -> bool:
    """Tell whether workers' residents change in the course of a run."""
    layout = settings.layout
    return layout.kind in MOVING_KINDS and layout.overlap < layout.num_workers
