"""The routing fields of a reply: how a worker's routers chose, as JSON-able lists and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.federation.wire import WireError, are_counts, is_count
from fomoe_flwr.model.router_probe import RoutingCounts


def counts_in(fields: Mapping[str, Any], num_layers: int, num_experts: int) -> RoutingCounts:
    """Read the routing counts of a reply. Raises WireError."""
    load, ghosts, all_ghost = (fields.get(key) for key in ("load", "ghosts", "all_ghost"))
    right = (
        isinstance(load, list)
        and len(load) == num_layers
        and all(_is_row(row, num_experts) for row in load)
        and _is_row(ghosts, num_layers)
        and _is_row(all_ghost, num_layers)
        and is_count(fields.get("routed_tokens"))
    )
    if not right:
        raise WireError(
            f"routing counts must be tables of integers >= 0, {num_layers} layers by "
            f"{num_experts} experts"
        )
    return RoutingCounts(
        torch.tensor(load),
        torch.tensor(ghosts),
        torch.tensor(all_ghost),
        int(fields["routed_tokens"]),
    )


def counts_fields(counts: RoutingCounts) -> dict[str, Any]:
    """Return routing counts as JSON-able fields."""
    return {
        "load": counts.load.tolist(),
        "ghosts": counts.ghosts.tolist(),
        "all_ghost": counts.all_ghost.tolist(),
        "routed_tokens": counts.tokens,
    }


def choices_in(
    fields: Mapping[str, Any], num_layers: int, num_tokens: int, top_k: int, num_experts: int
) -> Tensor:
    """Read the choices of a reply, [num_layers, num_tokens, top_k]. Raises WireError.

    Ids are global; `num_experts` stands for no choice.
    """
    choices = fields.get("choices")
    right = (
        isinstance(choices, list)
        and len(choices) == num_layers
        and all(_is_row(row, num_tokens * top_k) and max(row) <= num_experts for row in choices)
    )
    if not right:
        raise WireError(
            f"choices must be {num_layers} lists (layers) of {num_tokens} * {top_k} integers from "
            f"0 to {num_experts}"
        )
    return torch.tensor(choices).view(num_layers, num_tokens, top_k)


def choices_fields(choices: Tensor) -> dict[str, Any]:
    """Return choices as a JSON-able field."""
    return {"choices": choices.flatten(1).tolist()}


def _is_row(value: Any, length: int) -> bool:
    return are_counts(value) and len(value) == length
