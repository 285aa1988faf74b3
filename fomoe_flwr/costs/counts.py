"""How many parameters a model has, of which kind, and how many a worker holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings, RoutingMode
from fomoe_flwr.layout import Layout
from fomoe_flwr.parameters.keys import has_layer, is_expert_key
from fomoe_flwr.parameters.shapes import one_layer_shapes


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
    mode, copies = model.routing_mode, model.num_layers
    total = expert = 0
    shapes = one_layer_shapes(model)
    for key, shape in shapes.items():
        size = math.prod(shape) * (copies if has_layer(key) else 1)
        total += size
        expert += size if is_expert_key(key, mode) else 0
    idle = copies * (model.num_experts - model.top_k) * expert_weights(shapes) // model.num_experts
    return ParameterCounts(
        total=total,
        active=total - idle,
        shared=total - expert,
        expert=expert,
        router=copies * model.num_experts * model.hidden_size,
        per_expert_per_layer=expert // (copies * model.num_experts),
    )


def expert_weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the weights of all experts among some shapes, without router rows."""
    # In skip-token routing the only expert parameters are the expert weights themselves.
    mode = RoutingMode.SKIP_TOKEN
    return sum(math.prod(shape) for key, shape in shapes.items() if is_expert_key(key, mode))


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
