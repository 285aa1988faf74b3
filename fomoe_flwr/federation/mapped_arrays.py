"""Arrays that arrive in mapped files, for a server that does not hold the model.

Flower copies every chunk, puts an array together from the copies in a bytearray, and copies that.
Here chunks are put into a file without a name as they came: one reply is in memory, not three.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_children_ids_from_object_content,
)

from fomoe_flwr.model.homes import MEMORY, Home

_LARGE_BYTES = 2**20
"""A file of its own pays from here on."""


@contextmanager
def arrays_in(home: Home) -> Iterator[None]:
    """Let large arrays that Flower receives in this process lie in a home that is no memory."""
    registry: dict[str, Any] = inflatable_utils.inflatable_class_registry
    before = {name: registry[name] for name in ("ArrayChunk", "Array", "ArrayRecord")}
    if home is not MEMORY:
        registry |= {"ArrayChunk": _Chunk, "Array": _class_of(home), "ArrayRecord": _Record}
    try:
        yield
    finally:
        registry |= before


class _Chunk(ArrayChunk):
    """A view of what came; Flower's copy of it is in another thread's heap."""

    @classmethod
    def inflate(cls, object_content: bytes, children: dict[str, Any] | None = None) -> ArrayChunk:
        size = len(ArrayChunk.inflate(object_content, children).data)
        return ArrayChunk(memoryview(object_content)[len(object_content) - size :])


class _Record(ArrayRecord):
    """Takes arrays as they are; Flower makes new ones, which must be of bytes."""

    @classmethod
    def inflate(
        cls, object_content: bytes, children: Mapping[str, Any] | None = None
    ) -> ArrayRecord:
        given = dict(children or {})
        empty: dict[str, Any] = {
            name: Array(each.dtype, tuple(each.shape), each.stype, b"")
            if isinstance(each, Array)
            else each
            for name, each in given.items()
        }
        record = ArrayRecord.inflate(object_content, empty)
        for key, name in json.loads(get_object_body(object_content, ArrayRecord)).items():
            record[key] = given[name]
        return record


def _class_of(home: Home) -> type[Array]:
    class Mapped(Array):
        @classmethod
        def inflate(cls, object_content: bytes, children: Mapping[str, Any] | None = None) -> Array:
            chunks = dict(children or {})
            if sum(len(chunk.data) for chunk in chunks.values()) < _LARGE_BYTES:
                return Array.inflate(object_content, chunks)
            # Flower checks the content and makes the array, without its numbers.
            empty: dict[str, Any] = {name: ArrayChunk(memoryview(b"")) for name in chunks}
            array = Array.inflate(object_content, empty)
            names = get_object_children_ids_from_object_content(object_content)
            places = json.loads(get_object_body(object_content, Array))["arraychunk_ids"]
            pieces = [memoryview(chunks[names[place]].data) for place in places]
            size = sum(map(len, pieces))
            target = home.scratch(-(-size // 4)).view(torch.uint8).numpy().data[:size]
            start = 0
            for piece in pieces:
                target[start : start + len(piece)] = piece
                start += len(piece)
            array.data = target  # type: ignore[assignment]
            return array

    return Mapped
