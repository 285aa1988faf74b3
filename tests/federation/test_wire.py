"""The wire: numbers arrive as they were sent, and nothing malformed gets past a WireError."""

from __future__ import annotations

import ast
import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from hypothesis import given, settings
from hypothesis import strategies as st

import fomoe_flwr
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.routing_fields import choices_fields, choices_in
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.federation.wire import WireError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADER = TaskHeader(
    settings={"rounds": 2},
    spec_digest="0a" * 8,
    tokenizer_digest="1b" * 32,
    run_key="2c" * 16,
    worker=1,
    server_round=3,
    layout_digest="3d" * 8,
    residents=((0, 2), (1, 3)),
    keep_rounds=[1, 2],
    fragment=-1,
    moments=["exp_avg"],
    pooled_share=[[0.5, 0.5]],
    probe=[[3, 1], [4, 1]],
)


def content_with_json(name: str, text: str) -> RecordDict:
    return RecordDict({name: ConfigRecord({"json": text})})


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@given(values=st.lists(st.floats(-60000, 60000, width=32), max_size=50))
def test_a_vector_arrives_as_it_was_rounded_to_the_wire_type(
    dtype: str, values: list[float]
) -> None:
    vector = torch.tensor(values, dtype=torch.float32)
    array = wire.encode(vector, dtype)
    assert (array.dtype, array.stype, tuple(array.shape)) == (dtype, wire.STYPE, (len(values),))
    back = wire.decode(array, dtype, len(values))
    assert back.dtype == torch.float32
    assert torch.equal(back, vector.to(getattr(torch, dtype)).float())


def test_float32_is_exact_to_the_last_bit() -> None:
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-30
    back = wire.decode(wire.encode(vector, "float32"), "float32", 1000)
    assert torch.equal(back.view(torch.int32), vector.view(torch.int32))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_payload_is_exactly_elements_times_element_size(dtype: str, size: int) -> None:
    array = wire.encode(torch.ones(size), dtype)
    assert len(array.data) == size * ITEM_BYTES[dtype]
    content = RecordDict(
        {
            wire.WEIGHTS: wire.arrays_of(array, wire.encode(torch.ones(3), dtype)),
            wire.TASK: HEADER.record(),
        }
    )
    assert wire.payload_bytes(content) == (size + 3) * ITEM_BYTES[dtype]
    assert wire.decode(array, dtype, size).shape == (size,)


def test_bytes_are_little_endian_without_a_header() -> None:
    assert wire.encode(torch.tensor([1.0]), "float32").data == b"\x00\x00\x80\x3f"
    assert wire.encode(torch.tensor([1.0]), "bfloat16").data == b"\x80\x3f"
    assert wire.encode(torch.tensor([1.0]), "float16").data == b"\x00\x3c"


def test_fp32_is_decoded_without_a_copy() -> None:
    """A reply is in memory once: peak memory of the server hangs on it."""
    array = wire.encode(torch.ones(4), "float32")
    first, second = (wire.decode(array, "float32", 4) for _ in range(2))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (Array("float32", (2,), "numpy.ndarray", b"\0" * 8), "array is float32/numpy.ndarray"),
        (Array("float16", (2,), wire.STYPE, b"\0" * 4), "array is float16/fomoe.flat"),
        (Array("float32", (3,), wire.STYPE, b"\0" * 12), r"shape \[3\], the layout needs \[2\]"),
        (Array("float32", (1, 2), wire.STYPE, b"\0" * 8), r"shape \[1, 2\]"),
        (Array("float32", (), wire.STYPE, b"\0" * 4), r"shape \[\]"),
        (Array("float32", (2,), wire.STYPE, b"\0" * 7), "array has 7 bytes, its shape needs 8"),
        (Array("float32", (2,), wire.STYPE, b""), "array has 0 bytes, its shape needs 8"),
        (Array("float32", (2,), wire.STYPE, b"\0" * 9), "array has 9 bytes, its shape needs 8"),
        (Array("float32", (2,), wire.STYPE, b"\xff" * 8), "NaN or infinite"),
        (Array("float32", (2,), wire.STYPE, b"\0\0\x80\x7f" * 2), "NaN or infinite"),
    ],
)
def test_a_wrong_array_is_refused_with_what_is_wrong(array: Array, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        wire.decode(array, "float32", 2)


@settings(max_examples=300)
@given(
    array=st.builds(
        Array,
        dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8", "object", ""]),
        shape=st.lists(st.integers(-3, 5), max_size=3).map(tuple),
        stype=st.sampled_from([wire.STYPE, "numpy.ndarray", "pickle", ""]),
        data=st.binary(max_size=24),
    ),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    size=st.integers(0, 5),
)
def test_decode_gives_the_agreed_finite_vector_or_a_wire_error(
    array: Array, dtype: str, size: int
) -> None:
    try:
        vector = wire.decode(array, dtype, size)
    except WireError:
        return
    assert (array.dtype, array.stype, tuple(array.shape)) == (dtype, wire.STYPE, (size,))
    assert vector.shape == (size,)
    assert all(math.isfinite(value) for value in vector.tolist())


@settings(max_examples=100)
@given(data=st.binary(min_size=8, max_size=8), dtype=st.sampled_from(sorted(ITEM_BYTES)))
def test_any_bytes_of_the_right_length_are_numbers_or_refused(data: bytes, dtype: str) -> None:
    size = 8 // ITEM_BYTES[dtype]
    raw = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).float()
    array = Array(dtype, (size,), wire.STYPE, data)
    if bool(torch.isfinite(raw).all()):
        assert torch.equal(wire.decode(array, dtype, size), raw)
    else:
        with pytest.raises(WireError, match="NaN or infinite"):
            wire.decode(array, dtype, size)


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        {"shared": torch.ones(2)},
        {"shared": torch.ones(2), "experts": torch.ones(3), "more": torch.ones(1)},
        {"shared": torch.ones(2), "expert": torch.ones(3)},
    ],
)
def test_a_message_with_other_arrays_is_refused(record: dict[str, torch.Tensor] | None) -> None:
    content = RecordDict()
    if record is not None:
        arrays = ArrayRecord()
        for key, value in record.items():
            arrays[key] = wire.encode(value, "float32")
        content[wire.WEIGHTS] = arrays
    with pytest.raises(WireError, match="needs the arrays shared, experts in 'weights'"):
        wire.vectors_in(content, wire.WEIGHTS, "float32", (2, 3))


def test_the_two_vectors_come_back_in_their_order() -> None:
    content = RecordDict(
        {
            wire.WEIGHTS: wire.arrays_of(
                wire.encode(torch.ones(2), "bfloat16"), wire.encode(torch.zeros(3), "bfloat16")
            )
        }
    )
    shared, experts = wire.vectors_in(content, wire.WEIGHTS, "bfloat16", (2, 3))
    assert torch.equal(shared, torch.ones(2))
    assert torch.equal(experts, torch.zeros(3))


def test_one_shared_array_object_goes_into_every_record() -> None:
    shared = wire.encode(torch.ones(5), "float32")
    records = [
        RecordDict({wire.WEIGHTS: wire.arrays_of(shared, wire.encode(torch.ones(n), "float32"))})
        for n in (1, 2, 3)
    ]
    assert all(record.array_records[wire.WEIGHTS]["shared"] is shared for record in records)


def objects_of(content: RecordDict) -> set[str]:
    """Return the ids of what a content is cut into on its way: the platform pays for each."""
    return {node.object_id for node in iterate_object_tree(get_object_tree(content))}


def test_a_message_below_100_mb_takes_few_objects_and_the_shared_part_is_the_same_for_all() -> None:
    shared = wire.encode(torch.arange(7_000_000, dtype=torch.float32), "float32")
    tasks = []
    for worker in range(2):
        experts = wire.encode(torch.arange(17_000_000, dtype=torch.float32) + worker + 1, "float32")
        header = wire.json_record({"worker": worker})
        tasks.append(
            objects_of(
                RecordDict({wire.TASK: header, wire.WEIGHTS: wire.arrays_of(shared, experts)})
            )
        )
    assert all(len(task) + 1 <= 26 for task in tasks)  # and the message itself
    chunk = 5 * 2**20
    # The shared array with its chunks, and nothing else, is in both.
    assert len(tasks[0] & tasks[1]) == 1 + -(-7_000_000 * 4 // chunk)


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


CHOICES = torch.tensor([[[0, 2], [1, 3], [2, 4]], [[1, 2], [0, 1], [4, 4]]])
"""Two layers, three tokens, two of four experts; 4 stands for no choice."""


def test_choices_survive_the_journey() -> None:
    content = RecordDict({wire.TASK: wire.json_record(choices_fields(CHOICES))})
    back = choices_in(wire.json_in(content, wire.TASK), 2, 3, 2, 4)
    assert back.dtype == torch.int64
    assert torch.equal(back, CHOICES)


@pytest.mark.parametrize(
    "choices",
    [
        None,
        {},
        [],
        [[0] * 6],
        [[0] * 6] * 3,
        [[0] * 6, [0] * 5],
        [[0] * 6, [0] * 7],
        [[0] * 6, [0, 0, 0, 0, 0, 5]],
        [[0] * 6, [0, 0, 0, 0, 0, -1]],
        [[0] * 6, [0, 0, 0, 0, 0, True]],
        [[0] * 6, [0, 0, 0, 0, 0, 1.0]],
        [[0] * 6, [0, 0, 0, 0, 0, 2**70]],
        [[0] * 6, "000000"],
        [[[0, 0]] * 3] * 2,
    ],
)
def test_choices_of_another_shape_or_range_are_refused(choices: Any) -> None:
    with pytest.raises(WireError, match=r"choices must be 2 lists .* 3 \* 2 integers from 0 to 4"):
        choices_in({"choices": choices}, 2, 3, 2, 4)


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


def test_no_module_of_the_package_can_unpickle() -> None:
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    sources = list(Path(fomoe_flwr.__file__).parent.rglob("*.py"))
    assert len(sources) > 30
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & unpicklers, source
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), source
                for keyword in node.keywords:
                    if keyword.arg == "allow_pickle":
                        assert ast.unparse(keyword.value) == "False", source


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
