"""Integers with one fp32 scale for each block of numbers: int8 and int4.

A block's largest number becomes the largest integer, so an error is at most half a step, 1/254 or
1/14 of the block's largest number; stochastic rounding errs up to a whole step and is unbiased.
Bytes: all scales, then all integers; two int4 share a byte, the earlier one in the low half.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock

import torch
from torch import Tensor
from torch.nn.functional import pad

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Data, Empty, from_bytes, to_bytes
from fomoe_flwr.codecs.sizes import BLOCK, SCALE_BYTES
from fomoe_flwr.codecs.slabs import blank, spread

_LARGEST = {"int8": 127, "int4": 7}
_LARGEST_SCALE = {name: torch.finfo(torch.float32).max / (n + 1) for name, n in _LARGEST.items()}
"""Times any integer it is still finite."""


def encode_integers(vector: Tensor, name: str, generator: torch.Generator | None) -> Data:
    """Quantise; with a generator, round by chance."""
    size, top = vector.numel(), _LARGEST[name]
    num_blocks = -(-size // BLOCK)
    scale_bytes = SCALE_BYTES * num_blocks
    num_bytes = scale_bytes + (size if name == "int8" else -(-size // 2))
    out = blank(num_bytes, torch.uint8).to(vector.device)
    scales, codes = out[:scale_bytes].view(torch.float32), out[scale_bytes:]
    in_order = Lock()

    def write(parts: Iterator[slice]) -> None:
        scratch = vector.new_empty(0)
        while True:
            with in_order:  # the numbers of chance come slab by slab
                part = next(parts, None)
                if part is None:
                    return
                blocks = _blocks(vector[part])
                chance = _chance(blocks, generator)
            if len(scratch) < blocks.numel():
                scratch = vector.new_empty(blocks.numel())
            steps = scratch[: blocks.numel()].view_as(blocks)
            scale = _scales(torch.abs(blocks, out=steps), name)
            first = part.start // BLOCK
            scales[first : first + len(blocks)] = scale
            # A block of zeros, or of numbers too small for a scale, is sent as zeros.
            divisor = scale.masked_fill(scale == 0, torch.inf).unsqueeze(1)
            torch.div(blocks, divisor, out=steps)
            if chance is None:
                steps.round_()
            else:
                steps.add_(chance).floor_()
            steps.clamp_(-top, top)
            levels = steps.view(-1)[: part.stop - part.start]
            if name == "int8":
                codes[part].view(torch.int8).copy_(levels)
            else:
                _pack(levels.to(torch.int8), codes[part.start // 2 : -(-part.stop // 2)])

    spread(vector, write)
    return to_bytes(out)


def decode_integers(data: Data, name: str, size: int, empty: Empty = blank) -> Tensor:
    """Read numbers back. Raises CodecError for a scale that no encoder writes."""
    num_blocks = -(-size // BLOCK)
    scales = from_bytes(data[: SCALE_BYTES * num_blocks], torch.float32)
    if not bool(((scales >= 0) & (scales <= _LARGEST_SCALE[name])).all()):
        raise CodecError("a block's scale is negative, NaN or infinite")
    codes = from_bytes(memoryview(data)[SCALE_BYTES * num_blocks :], torch.uint8)
    vector = empty(size)

    def read(parts: Iterator[slice]) -> None:
        for part in parts:
            target = vector[part]
            if name == "int8":
                target.copy_(codes[part].view(torch.int8))
            else:
                target.copy_(_unpack(codes[part.start // 2 : -(-part.stop // 2)])[: len(target)])
            first, whole = part.start // BLOCK, len(target) // BLOCK
            target[: whole * BLOCK].view(-1, BLOCK).mul_(scales[first : first + whole, None])
            if whole * BLOCK < len(target):
                target[whole * BLOCK :].mul_(scales[first + whole])

    spread(vector, read)
    return vector


def _blocks(part: Tensor) -> Tensor:
    return pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)


def _chance(blocks: Tensor, generator: torch.Generator | None) -> Tensor | None:
    # Drawn on the CPU, so that they do not depend on where the vector lies.
    if generator is None:
        return None
    return torch.rand(blocks.shape, generator=generator).to(blocks.device)


def _scales(magnitudes: Tensor, name: str) -> Tensor:
    largest = magnitudes.amax(dim=1)
    # By a tensor: a GPU multiplies by the inverse of a plain number, which rounds otherwise.
    scale = (largest / largest.new_tensor(_LARGEST[name])).clamp(max=_LARGEST_SCALE[name])
    # An infinite number keeps its scale infinite: the receiver refuses it.
    return torch.where(largest < torch.inf, scale, largest)


def _pack(levels: Tensor, packed: Tensor) -> None:
    pairs = pad(levels, (0, len(levels) % 2)).add_(8).view(torch.int16)
    packed.copy_((pairs >> 4).bitwise_or_(pairs))  # which keeps the lower byte


def _unpack(codes: Tensor) -> Tensor:
    pairs = codes.to(torch.int16)
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)
