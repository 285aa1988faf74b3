"""The cost model: parameters, bytes, memory and FLOPs of a run, known before anything starts.

Everything is a closed form over the settings and the layout: no torch, no model is built. Other
modules take all names from here.
"""

from fomoe_flwr.costs.counts import ParameterCounts, parameter_counts, resident_counts
from fomoe_flwr.costs.duration import (
    RoundSeconds,
    Site,
    ring_seconds,
    site_of,
    star_seconds,
    transfer_seconds,
)
from fomoe_flwr.costs.flops import (
    TRAINING_FACTOR,
    TokenFlops,
    executed_experts,
    skip_speedup_limit,
    token_flops,
)
from fomoe_flwr.costs.memory import (
    STATE_BYTES,
    ServerMemory,
    expert_room,
    layout_context,
    memory_bytes,
    server_memory,
    state_bytes,
)
from fomoe_flwr.costs.overview import lines, summary, worker_parameters
from fomoe_flwr.costs.paper import paper_counts, paper_memory_bytes, paper_token_flops
from fomoe_flwr.costs.sheet import Line, show, shown
from fomoe_flwr.costs.topology import (
    ring_factor,
    ring_ratio_ddp,
    ring_ratio_full_replica,
    ring_round,
    star_ratio_full_replica,
    star_round,
)
from fomoe_flwr.costs.traffic import (
    Payload,
    RoundBytes,
    as_diloco,
    diloco_bytes,
    full_replica_bytes,
    num_buffers,
    predict_bytes,
    predict_payloads,
    predict_round,
    ring_bytes,
    state_factor,
)
