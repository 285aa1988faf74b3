"""The largest numbers of each chunk of 4096 with their places (SparseLoCo, arXiv 2508.15706).

Bytes: places as 12-bit numbers, ascending in a chunk, two in three bytes; then, for `topk_int2`,
two bfloat16 levels for each chunk; then the numbers: bfloat16, or two bits for sign and level.
The levels are the mean sizes of what lies below and above the mean size of what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Data, Empty, check, from_bytes, to_bytes
from fomoe_flwr.codecs.sizes import CHUNK, Codec
from fomoe_flwr.codecs.slabs import blank, is_finite, spread

_ROWS = 8
"""Rows of a chunk when its largest numbers are looked for."""

_FEW = CHUNK // _ROWS // 4
"""Numbers kept of a chunk up to which they are few among the columns' largest."""


def encode_sparse(vector: Tensor, codec: Codec) -> Data:
    """Keep the largest numbers of each chunk."""
    size, two = vector.numel(), codec.name == "topk_int2"
    if not size:
        return b""
    count = codec.num_kept(size)
    places = torch.empty(count, dtype=torch.int16)
    levels = torch.empty(2 * -(-size // CHUNK) if two else 0, dtype=torch.bfloat16)
    codes = torch.empty(count, dtype=torch.uint8 if two else torch.bfloat16)

    def write(parts: Iterator[slice]) -> None:
        for part in parts:
            for chunks, chunk, keep in _by_chunk(vector, part, codec.keep):
                place = _largest(chunks, keep)
                # Little is left. On the CPU sums have the same bits wherever the vector lies.
                kept = chunks.gather(1, place).cpu()
                own = slice(chunk * codec.keep, chunk * codec.keep + kept.numel())
                places[own] = place.view(-1).cpu()
                if two:
                    level, coded = _two_levels(kept)
                    levels[2 * chunk : 2 * chunk + len(level)] = level
                    codes[own] = coded
                else:
                    codes[own] = kept.view(-1)

    spread(vector, write)
    packed = _pack_pairs(codes) if two else codes
    return b"".join((to_bytes(_pack_places(places)), to_bytes(levels), to_bytes(packed)))


def decode_sparse(data: Data, codec: Codec, size: int, empty: Empty = blank) -> Tensor:
    """Read numbers back, zeros elsewhere.

    Raises CodecError for places out of range, repeated or not ascending, and for levels or numbers
    that are not finite.
    """
    count, num_chunks = codec.num_kept(size), -(-size // CHUNK)
    end = -(-count * 12 // 8)
    places = _unpack_places(from_bytes(data[:end], torch.uint8), count)
    if codec.name == "topk_int2":
        levels = from_bytes(data[end : end + 4 * num_chunks], torch.bfloat16).float().view(-1, 2)
        if not bool(((levels >= 0) & (levels < torch.inf)).all()):
            raise CodecError("a chunk's level is negative, NaN or infinite")
        codes = _unpack_pairs(from_bytes(data[end + 4 * num_chunks :], torch.uint8), count)
    else:
        levels = torch.empty(0)
        codes = from_bytes(data[end:], torch.bfloat16)
        check(is_finite(codes))
    vector = empty(size)

    def read(parts: Iterator[slice]) -> None:
        for part in parts:
            vector[part].zero_()
            for chunks, chunk, keep in _by_chunk(vector, part, codec.keep):
                first, num_codes = chunk * codec.keep, keep * len(chunks)
                place = places[first : first + num_codes].view(len(chunks), keep).long()
                rises = bool((place[:, 1:] > place[:, :-1]).all())
                if not rises or bool((place[:, -1] >= chunks.shape[1]).any()):
                    raise CodecError("places in a chunk must ascend and lie inside it")
                code = codes[first : first + num_codes].view(len(chunks), keep)
                if codec.name == "topk_int2":
                    value = levels[chunk : chunk + len(chunks)].gather(1, code >> 1)
                    value = torch.where((code & 1).bool(), -value, value)
                else:
                    value = code.float()
                chunks.scatter_(1, place, value)

    spread(vector, read)
    return vector


def _by_chunk(vector: Tensor, part: slice, keep: int) -> Iterator[tuple[Tensor, int, int]]:
    """View a slab as whole chunks and what is left over: first chunk's number, numbers kept."""
    first, last = part.start // CHUNK, part.stop // CHUNK
    if first < last:
        yield vector[part.start : last * CHUNK].view(-1, CHUNK), first, keep
    rest = part.stop - last * CHUNK
    if rest:
        yield vector[last * CHUNK : part.stop].view(1, -1), last, min(keep, rest)


def _largest(chunks: Tensor, keep: int) -> Tensor:
    """Return [chunks, keep] ascending places of the numbers of largest size."""
    if chunks.device.type != "cpu" or chunks.shape[1] < CHUNK or keep > _FEW:
        return _largest_of_all(chunks, keep)
    # numpy's `partition` is many times as fast as `topk`: it guesses no branches.
    sizes = chunks.abs()
    columns = sizes.view(len(chunks), _ROWS, -1).amax(dim=1).numpy()
    edge = -(keep + 1)  # one more than is kept shows whether equal ones are on both sides
    # So many columns reach this size, so at least as many numbers do, and seldom many more.
    floor = np.partition(columns, edge, axis=1)[:, edge, None]
    found = np.flatnonzero(~(sizes.numpy() < floor))  # NaN is the largest
    starts = np.searchsorted(found, np.arange(0, sizes.numel() + 1, CHUNK))
    counts = np.diff(starts)
    clear = (counts > keep) & (counts <= 4 * (keep + 1))
    width = int(counts[clear].max(initial=keep + 1))
    # [chunks, width] of what was found; beyond a chunk's own stands -1, smaller than any size.
    table = starts[:-1, None] + np.arange(width)
    beyond = np.arange(width) >= counts[:, None]
    places = found.take(table, mode="clip")
    candidates = sizes.view(-1).numpy().take(places)
    candidates[beyond] = -1
    ranked = np.partition(candidates, (edge + width, edge + 1 + width), axis=1)
    clear &= ranked[:, edge + 1] > ranked[:, edge]  # false where it is NaN
    kept = ~(candidates < ranked[:, edge + 1, None])
    answer = torch.empty(len(chunks), keep, dtype=torch.int64)
    if clear.all():
        return answer.copy_(torch.from_numpy(places[kept] % CHUNK).view(-1, keep))
    kept[~clear] = False
    known = torch.from_numpy(clear)
    answer[known] = torch.from_numpy(places[kept] % CHUNK).view(-1, keep)
    answer[~known] = _largest_of_all(chunks[~known], keep)
    return answer


def _largest_of_all(chunks: Tensor, keep: int) -> Tensor:
    # On the CPU: which of equal numbers is kept depends on the device.
    found = chunks.cpu().abs().topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
    return found.to(chunks.device)


def _two_levels(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return [chunks * 2] levels and a code for each number: its level times two plus its sign."""
    sizes = kept.abs()
    high = sizes > sizes.mean(dim=1, keepdim=True)
    num_high = high.sum(dim=1)
    total_high = (sizes * high).sum(dim=1)
    low = (sizes * ~high).sum(dim=1) / (kept.shape[1] - num_high).clamp(min=1)
    levels = torch.stack((low, total_high / num_high.clamp(min=1)), dim=1)
    codes = high.to(torch.uint8) << 1 | (kept < 0).to(torch.uint8)
    return levels.to(torch.bfloat16).view(-1), codes.view(-1)


def _pack_places(places: Tensor) -> Tensor:
    pairs = pad(places, (0, len(places) % 2)).view(-1, 2).int()
    both = pairs[:, 0] | (pairs[:, 1] << 12)
    packed = torch.stack((both & 255, both >> 8 & 255, both >> 16), dim=1).to(torch.uint8).view(-1)
    return packed[: -(-len(places) * 12 // 8)]


def _unpack_places(packed: Tensor, count: int) -> Tensor:
    triples = pad(packed, (0, -len(packed) % 3)).view(-1, 3).int()
    both = triples[:, 0] | (triples[:, 1] << 8) | (triples[:, 2] << 16)
    return torch.stack((both & 4095, both >> 12), dim=1).view(-1)[:count]


def _pack_pairs(codes: Tensor) -> Tensor:
    fours = pad(codes, (0, -len(codes) % 4)).view(-1, 4)
    return fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6


def _unpack_pairs(packed: Tensor, count: int) -> Tensor:
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    return ((packed.unsqueeze(1) >> shifts) & 3).view(-1)[:count].long()
