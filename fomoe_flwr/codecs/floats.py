"""Plain numbers: fp32 exact, bf16 and fp16 rounded to nearest."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Data = bytes | memoryview
"""Encoded bytes, which nobody may change: perhaps a view of a tensor's own memory."""

Empty = Callable[[int], Tensor]
"""Makes a flat fp32 vector of so many numbers, to be filled."""


def encode_floats(vector: Tensor, name: str) -> Data:
    """Write little-endian numbers without a header; fp32 itself is a view of `vector`."""
    return to_bytes(vector.to(DTYPES[name]))


def decode_floats(data: Data, name: str, empty: Empty = torch.empty) -> Tensor:
    """Read numbers back as fp32; fp32 itself is a view of `data` and must not be written to."""
    numbers = from_bytes(data, DTYPES[name])
    return numbers if name == "float32" else empty(len(numbers)).copy_(numbers)


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
