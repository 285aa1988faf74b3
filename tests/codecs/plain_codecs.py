"""The codecs' formulas in their plainest form, over a whole vector: what the bytes must be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fomoe_flwr.codecs.sizes import BLOCK, CHUNK, FLOATS, INTEGERS, Codec


def plain_bytes(vector: Tensor, codec: Codec, seed: int) -> bytes:
    if codec.name in FLOATS:
        return _raw(vector.to(getattr(torch, codec.name)))
    return _integers(vector, codec, seed) if codec.name in INTEGERS else _sparse(vector, codec)


def _raw(values: Tensor) -> bytes:
    return bytes(values.contiguous().view(torch.uint8).numpy().tobytes())


def _integers(vector: Tensor, codec: Codec, seed: int) -> bytes:
    top = {"int8": 127, "int4": 7}[codec.name]
    highest = torch.finfo(torch.float32).max / (top + 1)
    blocks = pad(vector, (0, -len(vector) % BLOCK)).view(-1, BLOCK)
    scale = (blocks.abs().amax(dim=1) / top).clamp(max=highest)
    steps = blocks / scale.masked_fill(scale == 0, torch.inf).unsqueeze(1)
    if codec.stochastic:
        chance = torch.rand(steps.shape, generator=torch.Generator().manual_seed(seed))
        steps = (steps + chance).floor()
    levels = steps.round().clamp(-top, top).to(torch.int8).view(-1)[: len(vector)]
    if codec.name == "int8":
        return _raw(scale) + _raw(levels)
    halves = pad(levels, (0, len(levels) % 2)).add(8).to(torch.uint8).view(-1, 2)
    return _raw(scale) + _raw(halves[:, 0] | halves[:, 1] << 4)


def _sparse(vector: Tensor, codec: Codec) -> bytes:
    places, levels, numbers = [], [], []
    for chunk in vector.split(CHUNK):
        place = chunk.abs().topk(min(codec.keep, len(chunk)), sorted=False).indices.sort().values
        kept = chunk[place]
        places += place.tolist()
        if codec.name == "topk_bfloat16":
            numbers.append(kept.to(torch.bfloat16))
            continue
        sizes = kept.abs()
        high = sizes > sizes.mean()
        low = (sizes * ~high).sum() / (~high).sum().clamp(min=1)
        levels += [low, (sizes * high).sum() / high.sum().clamp(min=1)]
        numbers.append(high.to(torch.uint8) << 1 | (kept < 0).to(torch.uint8))
    packed = bytearray()
    for index in range(0, len(places), 2):
        bits = places[index] | (places[index + 1] << 12 if index + 1 < len(places) else 0)
        packed += bits.to_bytes(3, "little")
    packed = packed[: -(-len(places) * 12 // 8)]
    codes = torch.cat(numbers)
    if codec.name == "topk_bfloat16":
        return bytes(packed) + _raw(codes)
    fours = pad(codes, (0, -len(codes) % 4)).view(-1, 4)
    codes = (fours << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(dim=1).to(torch.uint8)
    return bytes(packed) + _raw(torch.stack(levels).to(torch.bfloat16)) + _raw(codes)
