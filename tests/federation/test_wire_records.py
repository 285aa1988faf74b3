"""Records: text and metrics arrive as they were sent, and malformed ones are refused."""

from __future__ import annotations

import gc
import json
import math
import weakref

import pytest
import torch
from flwr.app import (
    ConfigRecord,
    MetricRecord,
    RecordDict,
)
from headers import HEADER
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.federation import wire
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.federation.wire import WireError


def content_with_json(name: str, text: str) -> RecordDict:
    return RecordDict({name: ConfigRecord({"json": text})})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "3", "null", '"text"', "[" * 200_000, '{"a": ' + "9" * 10_000 + "}"],
    ids=["empty", "cut", "list", "number", "null", "string", "deep", "long number"],
)
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="'task' is not"):
        wire.json_in(content_with_json(wire.TASK, text), wire.TASK)


@given(st.text(max_size=40))
def test_any_text_is_a_json_object_or_refused(text: str) -> None:
    content = content_with_json(wire.TASK, text)
    try:
        fields = wire.json_in(content, wire.TASK)
    except WireError:
        return
    assert fields == json.loads(text)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({wire.TASK: ConfigRecord({"text": "{}"})}),
        RecordDict({wire.TASK: ConfigRecord({"json": 3})}),
        RecordDict({wire.TASK: ConfigRecord({"json": b"{}"})}),
        RecordDict({wire.TASK: MetricRecord({"json": 1})}),
    ],
)
def test_a_missing_record_is_refused_by_name(content: RecordDict) -> None:
    with pytest.raises(WireError, match="needs the record 'task'"):
        wire.json_in(content, wire.TASK)


def test_metrics_survive_the_journey() -> None:
    content = RecordDict({wire.METRICS: wire.metrics_record({"loss": 1.5, "tokens": 7})})
    assert wire.metrics_in(content, ("loss", "tokens")) == {"loss": 1.5, "tokens": 7.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "welcome"])
def test_metrics_that_are_not_finite_are_refused(name: str, value: float) -> None:
    words = {"loss": 1.0, "welcome": 0.0} | {name: value}
    content = RecordDict({wire.METRICS: MetricRecord(words)})
    with pytest.raises(WireError, match=f"metric {name}=.* must be a finite number"):
        wire.metrics_in(content, ("loss",))


@pytest.mark.parametrize("record", [None, MetricRecord(), MetricRecord({"loss": [1.0]})])
def test_metrics_that_are_missing_are_refused(record: MetricRecord | None) -> None:
    content = RecordDict() if record is None else RecordDict({wire.METRICS: record})
    with pytest.raises(WireError, match=r"needs the record 'metrics'|metric loss=None"):
        wire.metrics_in(content, ("loss",))


def test_a_message_that_was_read_is_freed_without_the_collector() -> None:
    """Otherwise replies pile up on the server, a gigabyte each."""
    content = RecordDict(
        {
            wire.WEIGHTS: wire.arrays_of(*(wire.encode(torch.ones(3), "float32"),) * 2),
            wire.TASK: HEADER.record(),
            wire.METRICS: wire.metrics_record({"loss": 1.0}),
        }
    )
    gone = weakref.ref(content)
    gc.disable()
    try:
        wire.vectors_in(content, wire.WEIGHTS, "float32", (3, 3))
        TaskHeader.read(content)
        wire.metrics_in(content, ("loss",))
        wire.Traffic().add(content)
        assert wire.payload_bytes(content) == 24
        del content
        assert gone() is None
    finally:
        gc.enable()
