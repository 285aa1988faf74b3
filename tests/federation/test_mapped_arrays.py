"""Arrays that arrive in mapped files are the arrays that were sent."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fomoe_flwr.federation import wire
from fomoe_flwr.federation.mapped_arrays import arrays_in
from fomoe_flwr.model.homes import MEMORY, Home, SlabHome


def received(array: Array, home: Home) -> Array:
    """Take an array apart as Flower sends it, and put it together again."""
    sent = RecordDict({"x": wire.arrays_of(wire.encode(torch.ones(3), "float32"), array)})
    contents = {name: item.deflate() for name, item in get_all_nested_objects(sent).items()}
    with arrays_in(home):
        found = inflate_object_from_contents(sent.object_id, contents)
    assert isinstance(found, RecordDict)
    record = found["x"]
    assert isinstance(record, ArrayRecord)
    assert bytes(record["shared"].data) == bytes(sent["x"]["shared"].data)
    return record["experts"]


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int4", "topk_int2"])
@pytest.mark.parametrize("size", [0, 5, 300_001, 3_000_000])
def test_what_arrives_is_what_was_sent(codec: str, size: int, tmp_path: Path) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(size))
    sent = wire.encode(vector, codec)
    arrived = received(sent, SlabHome(tmp_path / "server"))
    assert bytes(arrived.data) == bytes(sent.data)
    assert (arrived.dtype, arrived.shape, arrived.stype) == (sent.dtype, sent.shape, sent.stype)
    assert torch.equal(wire.decode(arrived, codec, size), wire.decode(sent, codec, size))


def test_equal_chunks_that_travel_once_are_all_there(tmp_path: Path) -> None:
    sent = wire.encode(torch.ones(6_000_000), "float32")
    assert len(set(sent.children)) < len(sent.slice_array())
    arrived = received(sent, SlabHome(tmp_path / "server"))
    assert bytes(arrived.data) == bytes(sent.data)


def test_the_file_goes_with_the_array_and_memory_needs_none(tmp_path: Path) -> None:
    home = SlabHome(tmp_path / "server")
    sent = wire.encode(torch.ones(1_000_000), "float32")
    arrived = received(sent, home)
    assert type(arrived.data) is memoryview
    assert type(received(sent, MEMORY).data) is bytes
    assert [path.name for path in home.folder.iterdir()] == [".made-by-fomoe"]
    mapped = Path("/proc/self/maps")
    assert str(home.folder) in mapped.read_text()
    del arrived
    gc.collect()
    assert str(home.folder) not in mapped.read_text()
