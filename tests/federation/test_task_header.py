"""The task header: it arrives as it was sent, and a malformed one is refused."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import (
    RecordDict,
)
from headers import HEADER

from fomoe_flwr.federation import wire
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.federation.wire import WireError


def test_a_task_header_survives_the_journey() -> None:
    assert TaskHeader.read(RecordDict({wire.TASK: HEADER.record()})) == HEADER


@pytest.mark.parametrize("name", list(HEADER.__dict__))
def test_a_task_header_without_a_field_is_refused(name: str) -> None:
    words = {key: value for key, value in HEADER.__dict__.items() if key != name}
    with pytest.raises(WireError, match=f"task header is malformed: .*{name}"):
        TaskHeader.read(RecordDict({wire.TASK: wire.json_record(words)}))


def test_a_task_header_with_a_field_too_many_is_refused() -> None:
    words = HEADER.__dict__ | {"surprise": 1}
    with pytest.raises(WireError, match=r"task header is malformed: .*surprise"):
        TaskHeader.read(RecordDict({wire.TASK: wire.json_record(words)}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", "rounds=2"),
        ("settings", [1]),
        ("spec_digest", 7),
        ("tokenizer_digest", None),
        ("run_key", ["2c"]),
        ("fragment", -2),
        ("fragment", "0"),
        ("moments", ["exp_avg_cubed"]),
        ("moments", "exp_avg"),
        ("pooled_share", [0.5]),
        ("pooled_share", [["a"]]),
        ("pooled_share", [[float("nan")]]),
        ("pooled_share", [[1.5]]),
        ("pooled_share", [[10**400]]),
        ("probe", None),
        ("probe", [1]),
        ("probe", [[]]),
        ("probe", [[1], [1, 2]]),
        ("probe", [[-1]]),
        ("probe", [["1"]]),
        ("worker", "1"),
        ("worker", -1),
        ("worker", True),
        ("server_round", 1.5),
        ("layout_digest", {}),
        ("residents", 3),
        ("residents", [3]),
        ("residents", [["0"]]),
        ("residents", [[0.5]]),
        ("residents", [[-1]]),
        ("residents", {"0": [1]}),
        ("keep_rounds", None),
        ("keep_rounds", ["1"]),
    ],
)
def test_a_task_header_with_a_wrong_type_is_refused(name: str, value: Any) -> None:
    words = HEADER.__dict__ | {name: value}
    with pytest.raises(WireError, match=f"task header is malformed: {name} must be"):
        TaskHeader.read(RecordDict({wire.TASK: wire.json_record(words)}))
