"""How many parameters a model has, of which kind, and how many a worker holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings
from fomoe_flwr.layout import Layout
from fomoe_flwr.parameters.keys import is_any_expert_key, is_expert_key, is_router_key
from fomoe_flwr.parameters.shapes import layer_groups, num_sparse_layers


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


def parameter_counts(model: ModelSettings) -> ParameterCounts:
    """Count a model's parameters; what is shared follows the routing mode."""
    total = expert = router = weights = 0
    for group in layer_groups(model):
        for key, shape in group.shapes.items():
            size = group.copies * math.prod(shape)
            total += size
            expert += size if is_expert_key(key, model.routing_mode) else 0
            router += size if is_router_key(key) else 0
            weights += size if is_any_expert_key(key) else 0
    idle = (model.num_experts - model.top_k) * weights // model.num_experts
    return ParameterCounts(
        total=total,
        active=total - idle,
        shared=total - expert,
        expert=expert,
        router=router,
        per_expert_per_layer=expert // (num_sparse_layers(model) * model.num_experts),
    )


def resident_counts(model: ModelSettings, layout: Layout) -> list[int]:
    """Count the parameters that each worker holds: the shared ones and its resident experts.

    Raises ValueError for a layout of another model.
    """
    layers = num_sparse_layers(model)
    if (layout.num_layers, layout.num_experts) != (layers, model.num_experts):
        raise ValueError(
            f"the layout has {layout.num_layers} layers of {layout.num_experts} experts, "
            f"the model {layers} of {model.num_experts}"
        )
    counts = parameter_counts(model)
    return [
        counts.shared + counts.per_expert_per_layer * sum(map(len, layout.of_worker(worker)))
        for worker in range(layout.num_workers)
    ]
