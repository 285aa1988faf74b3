"""What a parameter's name says: its layer, whether it is a router's, whether it is shared.

Layout, model, wire and cost model all ask `is_expert_key`; no other place knows the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fomoe_flwr.config import RoutingMode

_EXPERT_KEY = re.compile(r"\.layers\.(\d+)\.(?:\w+\.)?experts\.")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_ROUTER_KEY = re.compile(
    r"\.layers\.(\d+)\.(?:\w+\.)?(?:(?:gate|router)\.|(?:e_score_correction|expert)_bias$)"
)
"""Some blocks keep the selection bias of their router themselves."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def is_expert_key(key: str, routing: RoutingMode) -> bool:
    """Tell whether the first axis of a state-dict entry enumerates experts that only holders keep.

    Everything else is shared. Expert weights are never shared; router rows are expert parameters
    in `partitioned` routing and shared in `skip_token` (paper section 3.1).
    """
    if _EXPERT_KEY.search(key):
        return True
    return routing is RoutingMode.PARTITIONED and bool(_ROUTER_KEY.search(key))


def is_any_expert_key(key: str) -> bool:
    """Tell whether a state-dict entry is an expert's own, whatever the routing."""
    return bool(_EXPERT_KEY.search(key))


def of_expert(key: str, expert: int) -> str:
    """Return the name of an expert's tensor where experts are stored one by one, from another's."""
    return _ONE_EXPERT.sub(f".experts.{expert}.", key)


def is_router_key(key: str) -> bool:
    """Tell whether a state-dict entry is a router's: its first axis enumerates scored experts."""
    return bool(_ROUTER_KEY.search(key))


def sparse_layers(keys: Iterable[str]) -> tuple[int, ...]:
    """Return the numbers of the decoder layers that have experts, in order."""
    found = (_EXPERT_KEY.search(key) for key in keys)
    return tuple(sorted({int(match[1]) for match in found if match}))


def has_layer(key: str) -> bool:
    """Tell whether a state-dict entry belongs to a decoder layer."""
    return bool(_LAYER.search(key))


def layer_of(key: str) -> int:
    """Read the decoder layer's index from a state-dict key; raise ValueError if it has none."""
    found = _LAYER.search(key)
    if found is None:
        raise ValueError(f"state key {key!r} names no decoder layer")
    return int(found[1])
