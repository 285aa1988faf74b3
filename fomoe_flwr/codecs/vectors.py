"""Encode and decode whole vectors, and what a codec leaves behind for error feedback."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from fomoe_flwr.codecs.compression import compress, decompress
from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Data, Empty, decode_floats, encode_floats
from fomoe_flwr.codecs.integers import decode_integers, encode_integers
from fomoe_flwr.codecs.sizes import FLOATS, INTEGERS, Codec
from fomoe_flwr.codecs.slabs import blank
from fomoe_flwr.codecs.sparse import decode_sparse, encode_sparse


def encode(vector: Tensor, codec: Codec, seed: int = 0) -> Data:
    """Turn a flat fp32 vector into bytes; `seed` decides what is rounded by chance.

    A vector on a GPU is encoded there, to the same bits; only the bytes are copied.
    The bytes may be the vector's own memory: it must not change while they are in use.
    """
    vector = vector.detach()
    if codec.name in FLOATS:
        data = encode_floats(vector, codec.name)
    elif codec.name in INTEGERS:
        generator = torch.Generator().manual_seed(seed) if codec.stochastic else None
        data = encode_integers(vector, codec.name, generator)
    else:
        data = encode_sparse(vector, codec)
    return compress(data, codec.zstd_level) if codec.zstd_level else data


def decode(data: Data, codec: Codec, size: int, empty: Empty = blank) -> Tensor:
    """Turn bytes back into a flat fp32 vector of `size` elements, not to be written to.

    Plain fp32 is a view of `data`; what any other codec needs, `empty` makes.
    Raises CodecError for bytes of another length and for numbers that are not finite.
    """
    expected = codec.num_bytes(size)
    if codec.zstd_level:
        data = decompress(data, expected)
    if len(data) != expected:
        raise CodecError(f"array has {len(data)} bytes, its shape needs {expected}")
    if codec.name in FLOATS:
        return decode_floats(data, codec.name, empty)
    if codec.name in INTEGERS:
        # Finite scales times small integers.
        return decode_integers(data, codec.name, size, empty)
    return decode_sparse(data, codec, size, empty)


def rounding_error(vector: Tensor, codec: Codec, seed: int = 0) -> Tensor:
    """Return a vector minus what arrives of it; infinite where nothing would be accepted."""
    plain = replace(codec, zstd_level=0)  # which loses nothing
    try:
        return vector - decode(encode(vector, plain, seed), plain, vector.numel())
    except CodecError:
        return torch.full_like(vector, torch.inf)


def seed_of(*words: int | str) -> int:
    """Return a seed that depends on all of the words, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
