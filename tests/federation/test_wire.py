"""The wire: numbers arrive as they were sent, and no malformed array gets past a WireError."""

from __future__ import annotations

import math

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    RecordDict,
)
from flwr.supercore.inflatable.inflatable_object import get_object_tree, iterate_object_tree
from headers import HEADER
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.federation import wire
from fomoe_flwr.federation.wire import WireError

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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


def test_a_large_plain_vector_travels_without_a_copy() -> None:
    large, small = torch.randn(wire.LARGE_BYTES // 4), torch.randn(10)
    sent = wire.encode(large, "float32")
    assert torch.frombuffer(sent.data, dtype=torch.float32).data_ptr() == large.data_ptr()
    assert wire.decode(sent, "float32", large.numel()).data_ptr() == large.data_ptr()
    assert type(wire.encode(small, "float32").data) is bytes
    arrived = Array.inflate(sent.deflate(), dict(sent.slice_array()))
    assert torch.equal(wire.decode(arrived, "float32", large.numel()), large)
