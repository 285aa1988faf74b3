"""The cost model: parameters, bytes, memory and FLOPs of a run, known before anything starts.

Everything is a closed form over the settings and the layout: no torch, no model is built. Bytes are
payload bytes in the star topology that Flower has: a worker receives and returns what it holds.
The paper's own accounting (ring all-reduce, section 6.1 of `research/fomoe.md`) stands at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fomoe_flwr.config import ModelSettings, OuterSettings, Settings, SettingsError
from fomoe_flwr.layout import Layout, LayoutContext, draw_layout
from fomoe_flwr.layout.context import begins_period
from fomoe_flwr.routing import RoutingMode, has_layer, is_expert_key, is_router_key, layer_of
from fomoe_flwr.shapes import buffer_shapes, head_size, latent_sizes, parameter_shapes
from fomoe_flwr.synchronisation import fragment_of_round, fragment_rows, moments_of_round

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element on the wire, by the names that `wire.up` and `wire.down` take."""

STATE_BYTES = {"adamw": 16, "sgd": 8}
"""fp32 training state, bytes a parameter: weight and gradient, and for AdamW its two moments."""

TRAINING_FACTOR = 3
"""Training FLOPs over forward FLOPs: the backward pass has two products for each one."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many parameters a model has, and of which kind.

    `total = shared + expert`; `active` is what one token uses; `router` counts all router rows,
    which are shared or expert parameters as the routing mode says; `per_expert_per_layer` is what
    one resident expert of one layer adds to a worker.
    """

    total: int
    active: int
    shared: int
    expert: int
    router: int
    per_expert_per_layer: int


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


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token, by part of the model; a multiply-add counts two."""

    projections: float
    """Every dense matrix of the layers: attention's, and shared experts'."""
    scores: float
    router: float
    experts: float
    head: float

    @property
    def forward(self) -> float:
        """FLOPs of one token's forward pass."""
        return self.projections + self.scores + self.router + self.experts + self.head

    @property
    def train(self) -> float:
        """FLOPs of one token's forward and backward pass."""
        return TRAINING_FACTOR * self.forward

    @property
    def expert_share(self) -> float:
        """Share of the experts in all FLOPs (f in the skip-token limit)."""
        return self.experts / self.forward


def parameter_counts(model: ModelSettings) -> ParameterCounts:
    """Count a model's parameters; what is shared follows the routing mode."""
    sizes = {key: math.prod(shape) for key, shape in parameter_shapes(model).items()}
    total = sum(sizes.values())
    expert = sum(n for key, n in sizes.items() if is_expert_key(key, model.routing_mode))
    weights = _expert_weights(parameter_shapes(model))
    idle = weights // model.num_experts * (model.num_experts - model.top_k)
    return ParameterCounts(
        total=total,
        active=total - idle,
        shared=total - expert,
        expert=expert,
        router=model.num_layers * model.num_experts * model.hidden_size,
        per_expert_per_layer=expert // (model.num_layers * model.num_experts),
    )


def resident_counts(model: ModelSettings, layout: Layout) -> list[int]:
    """Count the parameters that each worker holds: the shared ones and its resident experts.

    Raises ValueError for a layout of another model.
    """
    if (layout.num_layers, layout.num_experts) != (model.num_layers, model.num_experts):
        raise ValueError(
            f"the layout has {layout.num_layers} layers of {layout.num_experts} experts, "
            f"the model {model.num_layers} of {model.num_experts}"
        )
    counts = parameter_counts(model)
    return [
        counts.shared + counts.per_expert_per_layer * sum(map(len, layout.of_worker(worker)))
        for worker in range(layout.num_workers)
    ]


def predict_bytes(settings: Settings, layout: Layout) -> RoundBytes:
    """Predict the payload bytes of one round, mean over a full cycle of rounds like this layout's.

    A cycle is as long as it takes until fragments, moments and moves of the layout meet again. The
    first round of a run costs less, and so do rounds with failures: `predict_round` is exact. For
    one fragment without moments both are the same: what a worker holds, down and up.
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

    It and all rounds before must be without failures. `previous` is the layout of the round before;
    left out, it is the same. A worker that holds other experts than before gets its whole slice,
    whatever the fragment. Moments go up at the end of their round and come back, averaged, at the
    beginning of the next.
    """
    before = previous or layout
    moved = [
        before.of_worker(worker) != layout.of_worker(worker) for worker in range(layout.num_workers)
    ]
    sizes = _part_sizes(settings.model, layout, settings.outer.fragments)
    return _round_bytes(settings, sizes, server_round, moved)


def memory_bytes(num_parameters: int, optimizer: str) -> int:
    """Return a worker's training state in bytes; ghosts are not held, so they cost nothing.

    Activations come on top. `optimizer` is a name that `local.optimizer` takes.
    """
    if optimizer not in STATE_BYTES:
        raise SettingsError(
            f"local.optimizer={optimizer} has no cost model: it is not one of "
            f"{', '.join(STATE_BYTES)}"
        )
    return num_parameters * STATE_BYTES[optimizer]


def expert_room(settings: Settings, capacity_gib: Sequence[float]) -> tuple[int, ...]:
    """Return how many experts of each layer fit into each worker's memory beside what is shared.

    The memory is what the training state may take, in GiB, as in `layout.capacity_gib`; activations
    come on top.
    """
    for worker, gib in enumerate(capacity_gib):
        if not (math.isfinite(gib) and gib > 0):
            raise SettingsError(
                f"layout.capacity_gib[{worker}]={gib} is out of range: it must be finite and > 0"
            )
    counts, optimizer = parameter_counts(settings.model), settings.local.optimizer
    per_expert = counts.per_expert_per_layer * settings.model.num_layers
    return tuple(
        math.floor(
            (gib * 2**30 - memory_bytes(counts.shared, optimizer))
            / memory_bytes(per_expert, optimizer)
        )
        for gib in capacity_gib
    )


def layout_context(settings: Settings) -> LayoutContext:
    """Return the context of a run's first layout: the room that `layout.capacity_gib` makes."""
    capacity = settings.layout.capacity_gib
    return LayoutContext(room=expert_room(settings, capacity) if capacity else ())


def token_flops(
    model: ModelSettings, sequence_length: int, executed_experts: float | None = None
) -> TokenFlops:
    """Return the forward FLOPs of one token; norms, softmax and embedding look-up are left out.

    `executed_experts` is the mean number of experts that run for a token in a layer; left out, it
    is `top_k`, the whole model. Attention is causal: a token attends to half the sequence on
    average.
    """
    hidden, layers = model.hidden_size, model.num_layers
    executed = model.top_k if executed_experts is None else executed_experts
    shapes = parameter_shapes(model)
    attended = 2 * head_size(model)
    if model.family == "deepseek_v3":
        # Keys have a rotary part that values lack.
        attended += latent_sizes(model).rotary
    return TokenFlops(
        projections=2 * sum(math.prod(s) for key, s in shapes.items() if _is_dense_matrix(key, s)),
        scores=layers * sequence_length * model.num_heads * attended,
        router=layers * 2 * hidden * model.num_experts,
        experts=executed * 2 * _expert_weights(shapes) / model.num_experts,
        head=2 * hidden * model.vocab_size,
    )


def executed_experts(model: ModelSettings, layout: Layout) -> float:
    """Return how many experts run for a token, mean over workers and layers, at uniform routing.

    `skip_token`: the chosen experts that happen to be resident. `partitioned`: the worker chooses
    among its residents, so it runs `top_k` of them as long as it has that many.
    """
    residents = [len(experts) for workers in layout.residents for experts in workers]
    if model.routing_mode is RoutingMode.SKIP_TOKEN:
        return model.top_k * sum(residents) / (len(residents) * model.num_experts)
    return sum(min(model.top_k, held) for held in residents) / len(residents)


def skip_speedup_limit(expert_share: float, resident_share: float) -> float:
    """Return how much faster a step can get when only a share of the expert work is executed.

    1 / (1 - f (1 - a)): f the experts' share of all FLOPs, a the executed share of expert work.
    """
    return 1 / (1 - expert_share * (1 - resident_share))


def summary(settings: Settings) -> dict[str, float | int | str]:
    """Return everything worth knowing before training, under the names that metrics use.

    Bytes are sums over all workers in one round, mean over a full cycle (`predict_bytes`).
    `ratio/full_replica` is what full replicas with the same outer step and fragments would send
    over what this run sends; `ratio/ddp` what data-parallel training, with one synchronisation of
    all gradients a step, would send. Warm rounds are left out. `.../worker...` is the largest
    worker. Raises SettingsError if no layout can be drawn.
    """
    model, local = settings.model, settings.local
    layout = draw_layout(
        settings.layout,
        model.num_layers,
        model.num_experts,
        settings.seed,
        1,
        layout_context(settings),
    )
    counts = parameter_counts(model)
    resident = max(resident_counts(model, layout))
    sent = predict_bytes(settings, layout)
    element_bytes = _element_bytes("wire.up", settings.wire.up) + _element_bytes(
        "wire.down", settings.wire.down
    )
    buffers = sum(math.prod(shape) for shape in buffer_shapes(model).values())
    one_step = layout.num_workers * (counts.total + buffers) * element_bytes
    full = Layout.full(model.num_layers, model.num_experts, layout.num_workers)
    replicas = predict_bytes(replace(settings, layout=replace(settings.layout, kind="fixed")), full)
    full_replica = replicas.up + replicas.down
    executed = executed_experts(model, layout)
    flops = token_flops(model, settings.data.sequence_length)
    worker_flops = token_flops(model, settings.data.sequence_length, executed)
    step_tokens = (
        layout.num_workers * local.batch_size * local.accumulate * settings.data.sequence_length
    )
    return {
        "model/name": model.name,
        "model/routing": model.routing,
        "layout/digest": layout.digest(),
        "layout/overlap_min": layout.overlaps[0],
        "layout/overlap_max": layout.overlaps[1],
        "params/total": counts.total,
        "params/active": counts.active,
        "params/shared": counts.shared,
        "params/expert": counts.expert,
        "params/router": counts.router,
        "params/resident": resident,
        "bytes/up_per_round": sent.up,
        "bytes/down_per_round": sent.down,
        "bytes/full_replica_per_round": full_replica,
        "ratio/full_replica": full_replica / (sent.up + sent.down),
        "ratio/ddp": one_step * local.steps / (sent.up + sent.down),
        "memory/worker_bytes": memory_bytes(resident, local.optimizer),
        "memory/full_replica_bytes": memory_bytes(counts.total, local.optimizer),
        "flops/train_per_token": flops.train,
        "flops/worker_train_per_token": worker_flops.train,
        "flops/expert_share": flops.expert_share,
        "skip/resident_share": executed / model.top_k,
        "skip/speedup_limit": skip_speedup_limit(flops.expert_share, executed / model.top_k),
        "batch/shared_tokens": step_tokens,
        # All workers together run `executed` experts for every token, spread over all experts.
        "batch/expert_tokens": step_tokens * executed / model.num_experts,
    }


def paper_counts(
    hidden_size: int,
    num_layers: int,
    num_experts: int,
    expert_size: int,
    top_k: int,
    vocab_size: int,
) -> ParameterCounts:
    """Count the paper's own block: two-matrix experts, tied embeddings, no norms (section 3.1).

    Router rows count as expert parameters, as in its default, `partitioned` routing.
    """
    shared = vocab_size * hidden_size + num_layers * 4 * hidden_size**2
    weights = 2 * hidden_size * expert_size
    expert = num_layers * num_experts * (weights + hidden_size)
    return ParameterCounts(
        total=shared + expert,
        active=shared + expert - num_layers * (num_experts - top_k) * weights,
        shared=shared,
        expert=expert,
        router=num_layers * num_experts * hidden_size,
        per_expert_per_layer=weights + hidden_size,
    )


def ring_round(
    shared: float, expert: float, num_workers: int, overlap: int, migration_rate: float = 0.0
) -> float:
    """Return what one worker sends in one synchronisation by ring all-reduce (section 6.1).

    The unit is that of `shared` and `expert`, the sizes of the whole model's two parts (S_dense,
    S_sparse). `migration_rate` is gamma: 0 for a fixed layout, 1/reshuffle_every for a random one,
    whose workers fetch the missing share of their new residents. LocalAdamW sends three times this.
    """
    migration = migration_rate * (1 - overlap / num_workers)
    held = expert * overlap / num_workers
    return _ring(num_workers) * shared + (_ring(overlap) + migration) * held


def ring_ratio_full_replica(
    shared: float, expert: float, num_workers: int, overlap: int, migration_rate: float = 0.0
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
    overlap: int,
    migration_rate: float,
    local_steps: int,
) -> float:
    """Return data-parallel training's ring traffic over FoMoE's, for the same steps (section 6.4).

    Data-parallel training is a full replica that synchronises after every step.
    """
    return local_steps * ring_ratio_full_replica(
        shared, expert, num_workers, overlap, migration_rate
    )


def _expert_weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    # In skip-token routing the only expert parameters are the expert weights themselves.
    mode = RoutingMode.SKIP_TOKEN
    return sum(math.prod(shape) for key, shape in shapes.items() if is_expert_key(key, mode))


def _is_dense_matrix(key: str, shape: tuple[int, ...]) -> bool:
    return has_layer(key) and len(shape) == 2 and not is_router_key(key)


@dataclass(frozen=True)
class _PartSize:
    """Elements that one worker holds of one fragment."""

    parameters: int = 0
    buffers: int = 0

    def elements(self, num_moments: int) -> int:
        """Count weights with this many moments; buffers travel, but have no moments."""
        return self.parameters * (1 + num_moments) + self.buffers


def _part_sizes(
    model: ModelSettings, layout: Layout, num_fragments: int
) -> list[tuple[_PartSize, ...]]:
    """Count, for every worker, what it holds of each fragment."""
    resident_counts(model, layout)  # refuses a layout of another model
    kinds = (parameter_shapes(model), buffer_shapes(model))
    sizes = []
    for worker in range(layout.num_workers):
        residents = layout.of_worker(worker)
        counts = [[0, 0] for _ in range(num_fragments)]
        for kind, shapes in enumerate(kinds):
            for key, shape in shapes.items():
                is_cut = is_expert_key(key, model.routing_mode)
                rows = len(residents[layer_of(key)]) if is_cut else shape[0]
                for fragment, count in enumerate(counts):
                    start, stop = fragment_rows(key, rows, fragment, num_fragments)
                    count[kind] += (stop - start) * math.prod(shape[1:])
        sizes.append(tuple(_PartSize(*count) for count in counts))
    return sizes


def _round_bytes(
    settings: Settings,
    sizes: Sequence[tuple[_PartSize, ...]],
    server_round: int,
    moved: Sequence[bool],
) -> RoundBytes:
    outer = settings.outer
    up_bytes = _element_bytes("wire.up", settings.wire.up)
    down_bytes = _element_bytes("wire.down", settings.wire.down)
    fragment = fragment_of_round(outer, server_round)
    sent = len(moments_of_round(outer, server_round))
    up = [parts[fragment].elements(sent) * up_bytes for parts in sizes]
    averaged = moments_of_round(outer, server_round - 1) if server_round > 1 else ()
    # A whole slice takes a moment along only once all fragments of it have been averaged.
    whole_moments = sum(_is_complete(outer, name, server_round - 1) for name in averaged)
    down = []
    for parts, has_moved in zip(sizes, moved, strict=True):
        if server_round == 1 or has_moved or outer.fragments == 1:
            elements = sum(part.elements(whole_moments) for part in parts)
        else:
            lacking = fragment_of_round(outer, server_round - 1)
            elements = parts[lacking].elements(len(averaged))
        down.append(elements * down_bytes)
    return RoundBytes(up, down)


def _is_complete(outer: OuterSettings, moment: str, last_round: int) -> bool:
    """Tell whether all fragments of a moment have been averaged by the end of a round."""
    return all(
        any(
            moment in moments_of_round(outer, server_round)
            for server_round in range(fragment + 1, last_round + 1, outer.fragments)
        )
        for fragment in range(outer.fragments)
    )


def _moves(settings: Settings) -> bool:
    """Tell whether workers' residents change in the course of a run."""
    layout = settings.layout
    return layout.kind in ("random", "rolling", "balanced") and layout.overlap < layout.num_workers


def _ring(num_members: int) -> float:
    return 2 * (num_members - 1) / num_members


def _element_bytes(key: str, name: str) -> int:
    if name not in ELEMENT_BYTES:
        raise SettingsError(
            f"{key}={name} has no cost model: it is not one of {', '.join(ELEMENT_BYTES)}"
        )
    return ELEMENT_BYTES[name]
