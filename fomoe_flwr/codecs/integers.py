"""Integers with one fp32 scale for each block of numbers: int8 and int4.

A block's largest number becomes the largest integer, so an error is at most half a step, 1/254 or
1/14 of the block's largest number; stochastic rounding errs up to a whole step and is unbiased.
Bytes: all scales, then all integers; two int4 share a byte, the earlier one in the low half.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Data, Empty, from_bytes, to_bytes
from fomoe_flwr.codecs.sizes import BLOCK, SCALE_BYTES
from fomoe_flwr.codecs.slabs import slabs

_LARGEST = {"int8": 127, "int4": 7}
_LARGEST_SCALE = {name: torch.finfo(torch.float32).max / (n + 1) for name, n in _LARGEST.items()}
"""Times any integer it is still finite."""


def encode_integers(vector: Tensor, name: str, generator: torch.Generator | None) -> Data:
    """Quantise; with a generator, round by chance."""
    size, top = vector.numel(), _LARGEST[name]
    num_blocks = -(-size // BLOCK)
    scale_bytes = SCALE_BYTES * num_blocks
    out = torch.empty(scale_bytes + (size if name == "int8" else -(-size // 2)), dtype=torch.uint8)
    scales, codes = out[:scale_bytes].view(torch.float32), out[scale_bytes:]
    for part in slabs(size):
        blocks = _blocks(vector[part])
        first = part.start // BLOCK
        scale = _scales(blocks, name)
        scales[first : first + len(blocks)] = scale
        # A block of zeros, or of numbers too small for a scale, is sent as zeros.
        steps = blocks / scale.masked_fill(scale == 0, torch.inf).unsqueeze(1)
        if generator is None:
            steps.round_()
        else:
            steps.add_(torch.rand(steps.shape, generator=generator)).floor_()
        levels = steps.clamp_(-top, top).to(torch.int8).view(-1)[: part.stop - part.start]
        if name == "int8":
            codes[part] = levels.view(torch.uint8)
        else:
            packed = _pack(levels)
            codes[part.start // 2 : part.start // 2 + len(packed)] = packed
    return to_bytes(out)


def decode_integers(data: Data, name: str, size: int, empty: Empty = torch.empty) -> Tensor:
    """Read numbers back. Raises CodecError for a scale that no encoder writes."""
    num_blocks = -(-size // BLOCK)
    scales = from_bytes(data[: SCALE_BYTES * num_blocks], torch.float32)
    if not bool(((scales >= 0) & (scales <= _LARGEST_SCALE[name])).all()):
        raise CodecError("a block's scale is negative, NaN or infinite")
    codes = from_bytes(memoryview(data)[SCALE_BYTES * num_blocks :], torch.uint8)
    vector = empty(size)
    for part in slabs(size):
        if name == "int8":
            levels = codes[part].view(torch.int8)
        else:
            levels = _unpack(codes[part.start // 2 : -(-part.stop // 2)], part.stop - part.start)
        blocks = _blocks(levels.float())
        first = part.start // BLOCK
        blocks = blocks * scales[first : first + len(blocks)].unsqueeze(1)
        vector[part] = blocks.view(-1)[: part.stop - part.start]
    return vector


def _blocks(part: Tensor) -> Tensor:
    return pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)


def _scales(blocks: Tensor, name: str) -> Tensor:
    largest = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=1)
    scale = (largest / _LARGEST[name]).clamp(max=_LARGEST_SCALE[name])
    # An infinite number keeps its scale infinite: the receiver refuses it.
    return torch.where(largest < torch.inf, scale, largest)


def _pack(levels: Tensor) -> Tensor:
    pairs = pad(levels, (0, len(levels) % 2)).view(-1, 2).add(8).view(torch.uint8)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(codes: Tensor, size: int) -> Tensor:
    pairs = torch.stack((codes & 15, codes >> 4), dim=1).view(torch.int8) - 8
    return pairs.view(-1)[:size]
