"""The largest numbers of each chunk of 4096 with their places (SparseLoCo, arXiv 2508.15706).

Bytes: places as 12-bit numbers, ascending in a chunk, two in three bytes; then, for `topk_int2`,
two bfloat16 levels for each chunk; then the numbers: bfloat16, or two bits for sign and level.
The levels are the mean sizes of what lies below and above the mean size of what is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Data, Empty, from_bytes, to_bytes
from fomoe_flwr.codecs.sizes import CHUNK, Codec
from fomoe_flwr.codecs.slabs import slabs


def encode_sparse(vector: Tensor, codec: Codec) -> Data:
    """Keep the largest numbers of each chunk."""
    places, levels, values = [], [], []
    for part in slabs(vector.numel()):
        for chunks, keep in _by_chunk(vector[part], codec.keep):
            place = chunks.abs().topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
            kept = chunks.gather(1, place)
            places.append(place.view(-1).to(torch.int16))
            if codec.name == "topk_int2":
                level, coded = _two_levels(kept)
                levels.append(level)
                values.append(coded)
            else:
                values.append(kept.view(-1).to(torch.bfloat16))
    if not places:
        return b""
    codes = torch.cat(values)
    if codec.name == "topk_int2":
        codes = _pack_pairs(codes)
    level_bytes = to_bytes(torch.cat(levels)) if levels else b""
    return b"".join((to_bytes(_pack_places(torch.cat(places))), level_bytes, to_bytes(codes)))


def decode_sparse(data: Data, codec: Codec, size: int, empty: Empty = torch.empty) -> Tensor:
    """Read numbers back, zeros elsewhere.

    Raises CodecError for places out of range, repeated or not ascending, and for levels that are
    not finite.
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
    vector = empty(size).zero_()
    first_code = first_chunk = 0
    for part in slabs(size):
        for chunks, keep in _by_chunk(vector[part], codec.keep):
            last_code = first_code + keep * len(chunks)
            place = places[first_code:last_code].view(len(chunks), keep).long()
            rises = bool((place[:, 1:] > place[:, :-1]).all())
            if not rises or bool((place[:, -1] >= chunks.shape[1]).any()):
                raise CodecError("places in a chunk must ascend and lie inside it")
            code = codes[first_code:last_code].view(len(chunks), keep)
            if codec.name == "topk_int2":
                value = levels[first_chunk : first_chunk + len(chunks)].gather(1, code >> 1)
                value = torch.where((code & 1).bool(), -value, value)
            else:
                value = code.float()
            chunks.scatter_(1, place, value)
            first_code, first_chunk = last_code, first_chunk + len(chunks)
    return vector


def _by_chunk(part: Tensor, keep: int) -> list[tuple[Tensor, int]]:
    """View a slab as whole chunks and what is left over, each with how many numbers are kept."""
    whole = len(part) // CHUNK * CHUNK
    views = [(part[:whole].view(-1, CHUNK), keep)] if whole else []
    if whole < len(part):
        views.append((part[whole:].view(1, -1), min(keep, len(part) - whole)))
    return views


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
