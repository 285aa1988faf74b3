"""How many parameters a model has, of which kind, and how many a worker holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings
from fomoe_flwr.layout import Layout
from fomoe_flwr.routing import RoutingMode, is_expert_key
from fomoe_flwr.shapes import parameter_shapes


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
    sizes = {key: math.prod(shape) for key, shape in parameter_shapes(model).items()}
    total = sum(sizes.values())
    expert = sum(n for key, n in sizes.items() if is_expert_key(key, model.routing_mode))
    weights = expert_weights(parameter_shapes(model))
    idle = weights // model.num_experts * (model.num_experts - model.top_k)
    return ParameterCounts(
        total=total,
        active=total - idle,
        shared=total - expert,
        expert=expert,
        router=model.num_layers * model.num_experts * model.hidden_size,
        per_expert_per_layer=expert // (model.num_layers * model.num_experts),
    )


def expert_weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the weights of all experts, without router rows, among a model's shapes."""
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
