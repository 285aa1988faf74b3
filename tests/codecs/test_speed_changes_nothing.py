"""Threads, slabs and devices decide how fast a codec is, never which bytes it makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plain_codecs import plain_bytes
from torch import Tensor

from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.sizes import CODECS, INTEGERS, Codec
from fomoe_flwr.codecs.slabs import SLAB, is_finite, spread
from fomoe_flwr.codecs.vectors import decode, encode

EVERY = [
    *(Codec(name) for name in CODECS),
    Codec("topk_bfloat16", keep=1),
    Codec("topk_int2", keep=255),
    *(Codec(name, stochastic=True) for name in INTEGERS),
]
LONG = 17 * SLAB + 4099
"""Enough for two threads, with a part of every block left over."""


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(kind: str) -> Tensor:
    vector = torch.randn(LONG, generator=torch.Generator().manual_seed(3)) ** 3
    if kind == "equal sizes":  # many of a chunk's largest are equal
        vector = vector.clamp(-2, 2).mul(4).round()
    if kind == "tiny":
        vector *= 1e-41
    if kind == "huge":
        vector = vector.clamp(-3, 3) * 1e38
    return vector


@pytest.mark.parametrize("kind", ["usual", "equal sizes", "tiny", "huge"])
@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_bytes_are_those_of_the_plain_formula(codec: Codec, kind: str, threads: int) -> None:
    vector = numbers(kind)
    data = bytes(encode(vector, codec, seed=5))
    assert data == plain_bytes(vector, codec, seed=5)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_threads_decode_what_one_thread_decodes(codec: Codec, threads: int) -> None:
    data = encode(numbers("usual"), codec)
    found = decode(data, codec, LONG)
    torch.set_num_threads(1)
    assert torch.equal(found, decode(data, codec, LONG))


@pytest.mark.parametrize("place", [0, 9 * SLAB, LONG - 1])
def test_every_thread_refuses_what_is_not_finite(place: int, threads: int) -> None:
    vector = numbers("usual")
    vector[place] = -torch.inf
    assert not is_finite(vector)
    for codec in EVERY:
        with pytest.raises(CodecError):
            decode(encode(vector, codec), codec, LONG)
        assert torch.get_num_threads() == threads


def test_each_slab_is_given_once(threads: int) -> None:
    seen: list[slice] = []
    spread(torch.empty(LONG), seen.extend)
    assert sorted(part.start for part in seen) == list(range(0, LONG, SLAB))
    assert sum(part.stop - part.start for part in seen) == LONG


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["usual", "equal sizes", "tiny"])
@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_a_gpu_makes_the_same_bytes(codec: Codec, kind: str) -> None:
    vector = numbers(kind)
    assert bytes(encode(vector.cuda(), codec, 5)) == bytes(encode(vector, codec, 5))
