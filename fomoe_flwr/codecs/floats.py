"""Plain numbers: fp32 exact, bf16 and fp16 rounded to nearest."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.slabs import blank, is_finite, spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Data = bytes | memoryview
"""Encoded bytes, which nobody may change: perhaps a view of a tensor's own memory."""

Empty = Callable[[int], Tensor]
"""Makes a flat fp32 vector of so many numbers, to be filled."""


def encode_floats(vector: Tensor, name: str) -> Data:
    """Write little-endian numbers without a header; fp32 itself is a view of `vector`."""
    dtype = DTYPES[name]
    if dtype == torch.float32 or vector.device.type != "cpu":
        return to_bytes(vector.to(dtype))
    numbers = blank(vector.numel(), dtype)

    def write(parts: Iterator[slice]) -> None:
        for part in parts:
            numbers[part] = vector[part]

    spread(vector, write)
    return to_bytes(numbers)


def decode_floats(data: Data, name: str, empty: Empty = blank) -> Tensor:
    """Read numbers back as fp32; fp32 itself is a view of `data` and must not be written to.

    Raises CodecError for numbers that are not finite.
    """
    numbers = from_bytes(data, DTYPES[name])
    if name == "float32":
        check(is_finite(numbers))
        return numbers
    vector = empty(len(numbers))

    def read(parts: Iterator[slice]) -> None:
        for part in parts:
            check(is_finite(vector[part].copy_(numbers[part])))

    spread(vector, read)
    return vector


def check(finite: bool) -> None:
    """Raise CodecError for numbers that are not finite."""
    if not finite:
        raise CodecError("array holds NaN or infinite numbers")


def to_bytes(values: Tensor) -> Data:
    """View a tensor's memory as bytes."""
    if not values.numel():
        return b""
    return values.cpu().contiguous().view(torch.uint8).numpy().data


def from_bytes(data: Data, dtype: torch.dtype) -> Tensor:
    """View bytes as a flat tensor, without a copy."""
    if not len(data):
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        # torch warns that these bytes are read-only. Nobody writes to them.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype)
