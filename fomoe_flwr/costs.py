"""The cost model: parameters, bytes, memory and FLOPs of a run, known before anything starts.

Everything is a closed form over the settings and the layout: no torch, no model is built. Bytes are
payload bytes in the star topology that Flower has: a worker receives and returns what it holds.
The paper's own accounting (ring all-reduce, section 6.1 of `research/fomoe.md`) stands at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings, Settings, SettingsError
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.routing import RoutingMode, is_expert_key

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


def parameter_shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter, as `transformers` has them.

    Experts are stacked along the first axis. Raises SettingsError for a family without cost model.
    """
    hidden, kv = model.hidden_size, model.hidden_size // model.num_heads * model.num_kv_heads
    if model.family == "olmoe":
        # OLMoE normalises queries and keys over all heads at once ...
        query_norm, key_norm = hidden, kv
    elif model.family == "qwen3_moe":
        # ... Qwen3-MoE normalises each head, with one weight for all heads.
        query_norm = key_norm = hidden // model.num_heads
    else:
        raise SettingsError(
            f"model.family={model.family} has no cost model: it is not one of olmoe, qwen3_moe"
        )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "self_attn.q_norm.weight": (query_norm,),
            prefix + "self_attn.k_norm.weight": (key_norm,),
            prefix + "mlp.gate.weight": (model.num_experts, hidden),
            prefix + "mlp.experts.gate_up_proj": (
                model.num_experts,
                2 * model.expert_size,
                hidden,
            ),
            prefix + "mlp.experts.down_proj": (model.num_experts, hidden, model.expert_size),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def parameter_counts(model: ModelSettings) -> ParameterCounts:
    """Count a model's parameters; what is shared follows the routing mode."""
    sizes = {key: math.prod(shape) for key, shape in parameter_shapes(model).items()}
    total = sum(sizes.values())
    expert = sum(n for key, n in sizes.items() if is_expert_key(key, model.routing_mode))
    # In skip-token routing the only expert parameters are the expert weights themselves.
    weights = sum(n for key, n in sizes.items() if is_expert_key(key, RoutingMode.SKIP_TOKEN))
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
    """Predict the payload bytes of one round: what a worker holds, down and up."""
    held = resident_counts(settings.model, layout)
    return RoundBytes(
        up_per_worker=[n * _element_bytes("wire.up", settings.wire.up) for n in held],
        down_per_worker=[n * _element_bytes("wire.down", settings.wire.down) for n in held],
    )


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


def token_flops(
    model: ModelSettings, sequence_length: int, executed_experts: float | None = None
) -> TokenFlops:
    """Return the forward FLOPs of one token; norms, softmax and embedding look-up are left out.

    `executed_experts` is the mean number of experts that run for a token in a layer; left out, it
    is `top_k`, the whole model. Attention is causal: a token attends to half the sequence on
    average.
    """
    hidden, layers = model.hidden_size, model.num_layers
    kv = hidden // model.num_heads * model.num_kv_heads
    executed = model.top_k if executed_experts is None else executed_experts
    return TokenFlops(
        projections=layers * 2 * (2 * hidden * hidden + 2 * hidden * kv),
        scores=layers * 2 * sequence_length * hidden,
        router=layers * 2 * hidden * model.num_experts,
        experts=layers * executed * 2 * 3 * hidden * model.expert_size,
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

    Bytes are sums over all workers in one round; `ratio/...` is what a full replica, or data-
    parallel training with one synchronisation a step, would send over what this run sends.
    `.../worker...` is the largest worker. Raises SettingsError if no layout can be drawn.
    """
    model, local = settings.model, settings.local
    layout = draw_layout(settings.layout, model.num_layers, model.num_experts, settings.seed, 1)
    counts = parameter_counts(model)
    resident = max(resident_counts(model, layout))
    sent = predict_bytes(settings, layout)
    element_bytes = _element_bytes("wire.up", settings.wire.up) + _element_bytes(
        "wire.down", settings.wire.down
    )
    full_replica = layout.num_workers * counts.total * element_bytes
    ratio = full_replica / (sent.up + sent.down)
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
        "params/total": counts.total,
        "params/active": counts.active,
        "params/shared": counts.shared,
        "params/expert": counts.expert,
        "params/router": counts.router,
        "params/resident": resident,
        "bytes/up_per_round": sent.up,
        "bytes/down_per_round": sent.down,
        "bytes/full_replica_per_round": full_replica,
        "ratio/full_replica": ratio,
        "ratio/ddp": ratio * local.steps,
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


def _ring(num_members: int) -> float:
    return 2 * (num_members - 1) / num_members


def _element_bytes(key: str, name: str) -> int:
    if name not in ELEMENT_BYTES:
        raise SettingsError(
            f"{key}={name} has no cost model: it is not one of {', '.join(ELEMENT_BYTES)}"
        )
    return ELEMENT_BYTES[name]
