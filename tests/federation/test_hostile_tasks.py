"""A node does not believe its server either: tasks that contradict their settings are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from fomoe_flwr.config import SettingsError, load_settings
from fomoe_flwr.federation import client, wire
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.state import StateSpec

SETTINGS = load_settings(["preset=tiny", "layout.num_workers=3", "layout.overlap=1"])
SPEC = StateSpec.of(
    SETTINGS.model, transformers_config(SETTINGS.model, SETTINGS.data.sequence_length)
)
LAYERS, EXPERTS = SPEC.num_layers, SPEC.num_experts
HELD = [[0, 1]] * LAYERS


def task(**changes: Any) -> RecordDict:
    """Make a task that is right in itself but for the changes."""
    fields = {
        "settings": SETTINGS.to_dict(),
        "spec_digest": SPEC.digest(),
        "tokenizer_digest": "ab" * 32,
        "run_key": "cd" * 16,
        "worker": 0,
        "server_round": 1,
        "layout_digest": "ef" * 8,
        "residents": HELD,
        "keep_rounds": [],
        "fragment": -1,
        "moments": [],
        "pooled_share": None,
        "probe": [],
        "continues": False,
        "steps": 0,
    }
    header = TaskHeader(**(fields | changes))
    sizes = (SPEC.shared_size, SPEC.experts_size(HELD))
    weights = wire.arrays_of(*(wire.encode(torch.zeros(size), "float32") for size in sizes))
    return RecordDict({wire.TASK: header.record(), wire.WEIGHTS: weights})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"worker": 3}, "task is for worker 3, layout.num_workers=3"),
        ({"residents": HELD[:-1]}, "residents must be"),
        ({"residents": [*HELD, [0]]}, "residents must be"),
        ({"residents": [[1, 0], *HELD[1:]]}, "residents must be"),
        ({"residents": [[0, 0], *HELD[1:]]}, "residents must be"),
        ({"residents": [[0, EXPERTS], *HELD[1:]]}, "residents must be"),
        ({"continues": True}, "task of round 1 continues a round before the first"),
        ({"fragment": 1}, "task carries fragment 1, outer.fragments=1"),
        ({"pooled_share": [[0.5] * EXPERTS]}, "pooled_share must be"),
        ({"pooled_share": [[0.5]] * LAYERS}, "pooled_share must be"),
        ({"probe": [[1, SETTINGS.model.vocab_size]]}, "probe has token"),
        ({"settings": {}}, "settings need the sections local and data"),
        ({"settings": {"local": 3, "data": {}}}, "settings need the sections local and data"),
        ({"spec_digest": "00" * 8}, "this node builds model"),
        ({"tokenizer_digest": "../../etc/passwd"}, "is not a hex digest"),
        ({"tokenizer_digest": "ab" * 32}, "this node has no tokenizer"),
    ],
    ids=str,
)
def test_a_task_that_contradicts_its_settings_is_refused(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    went_on: Callable[..., Any] = lambda *_: pytest.fail("went on")  # noqa: E731
    monkeypatch.setattr(client, "run_round", went_on)
    with pytest.raises(WireError, match=reason):
        client.answer_task(task(**changes), Context(1, 2, {}, RecordDict(), {}))


def test_settings_from_the_network_pass_the_same_checks_as_a_users() -> None:
    settings = SETTINGS.to_dict()
    settings["local"] = dict(settings["local"]) | {"lr": -1.0}
    with pytest.raises(SettingsError, match=r"local\.lr"):
        client.answer_task(task(settings=settings), Context(1, 2, {}, RecordDict(), {}))
