"""The cost model: parameters, bytes, memory and FLOPs of a run, known before anything starts.

Everything is a closed form over the settings and the layout: no torch, no model is built. Other
modules take all names from here.
"""

from fomoe_flwr.costs.counts import (
    ParameterCounts,
    paper_counts,
    parameter_counts,
    resident_counts,
)
from fomoe_flwr.costs.flops import (
    TRAINING_FACTOR,
    TokenFlops,
    executed_experts,
    skip_speedup_limit,
    token_flops,
)
from fomoe_flwr.costs.memory import STATE_BYTES, expert_room, layout_context, memory_bytes
from fomoe_flwr.costs.overview import summary
from fomoe_flwr.costs.ring import ring_ratio_ddp, ring_ratio_full_replica, ring_round
from fomoe_flwr.costs.traffic import ELEMENT_BYTES, RoundBytes, predict_bytes, predict_round

__all__ = [
    "ELEMENT_BYTES",
    "STATE_BYTES",
    "TRAINING_FACTOR",
    "ParameterCounts",
    "RoundBytes",
    "TokenFlops",
    "executed_experts",
    "expert_room",
    "layout_context",
    "memory_bytes",
    "paper_counts",
    "parameter_counts",
    "predict_bytes",
    "predict_round",
    "resident_counts",
    "ring_ratio_ddp",
    "ring_ratio_full_replica",
    "ring_round",
    "skip_speedup_limit",
    "summary",
    "token_flops",
]
