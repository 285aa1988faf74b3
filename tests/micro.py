"""The micro shape: the smallest model, and the smallest run, that has everything in it."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from typing import Any

from fomoe_flwr.config import ModelSettings, Settings, check, load_settings

SHAPE = {"hidden_size": 16, "expert_size": 8, "num_experts": 6, "vocab_size": 260, "init_std": 0.2}
SEQUENCE = 8
NUM_WORKERS = 3

MICRO = (
    "preset=tiny",
    "rounds=2",
    *(f"model.{name}={value}" for name, value in SHAPE.items()),
    f"data.sequence_length={SEQUENCE}",
    f"layout.num_workers={NUM_WORKERS}",
    "layout.overlap=2",
    "local.steps=2",
    "local.batch_size=4",
    "local.warmup_steps=2",
    "local.schedule=constant",
    "local.eps=1e-6",
    "local.threads=1",
    "local.device=cpu",
    "federation.node_wait_seconds=0",
)
"""Three workers, two layers of six experts, two steps a round: milliseconds."""


def micro(*overrides: str) -> Settings:
    """Return micro settings; only presets go through Hydra, which is slow, and only once."""
    words = [*MICRO, *overrides]
    single = [w for w in words if "." in w.partition("=")[0] or w.startswith(("rounds=", "seed="))]
    settings = deepcopy(_composed(tuple(word for word in words if word not in single)))
    for word in single:
        key, _, text = word.partition("=")
        *path, name = key.split(".")
        node: Any = settings
        for part in path:
            node = getattr(node, part)
        kind = type(getattr(node, name))
        setattr(node, name, json.loads(text) if kind in (bool, list) else kind(text))
    check(settings)
    return settings


@cache
def _composed(words: tuple[str, ...]) -> Settings:
    # So many rounds that every preset passes its checks.
    return load_settings([*words, "rounds=100", "layout.num_workers=3", "layout.overlap=3"])


def micro_model(**changes: Any) -> ModelSettings:
    """Return the micro shape: two layers, and two heads that share their keys."""
    fields = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "top_k": 2, **SHAPE, **changes}
    return ModelSettings(**fields)
