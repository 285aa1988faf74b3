"""Everything worth knowing about a run before it starts."""

from __future__ import annotations

import math
from dataclasses import replace

from fomoe_flwr.config import Settings
from fomoe_flwr.costs.counts import parameter_counts, resident_counts
from fomoe_flwr.costs.flops import executed_experts, skip_speedup_limit, token_flops
from fomoe_flwr.costs.memory import layout_context, memory_bytes
from fomoe_flwr.costs.traffic import element_bytes, predict_bytes
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.shapes import buffer_shapes


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
    both_ways = element_bytes("wire.up", settings.wire.up) + element_bytes(
        "wire.down", settings.wire.down
    )
    buffers = sum(math.prod(shape) for shape in buffer_shapes(model).values())
    one_step = layout.num_workers * (counts.total + buffers) * both_ways
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
