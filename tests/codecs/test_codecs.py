"""Codecs: how much each one loses, how many bytes it makes, and what a decoder refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor

from fomoe_flwr.codecs.compression import compress
from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.sizes import BLOCK, CHUNK, CODECS, INTEGERS, SPARSE, Codec
from fomoe_flwr.codecs.slabs import SLAB, is_finite, slabs, squared_norm
from fomoe_flwr.codecs.vectors import decode, encode, rounding_error

LARGEST = torch.finfo(torch.float32).max
TINY = 1e-45
"""The smallest number that fp32 has."""
SIZES = (0, 1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, SLAB, SLAB + 3 * 77)
EVERY = [
    *(Codec(name) for name in CODECS),
    Codec("topk_bfloat16", keep=1),
    Codec("topk_int2", keep=7),
    Codec("topk_bfloat16", keep=CHUNK),
    *(Codec(name, stochastic=True) for name in INTEGERS),
    Codec("int4", zstd_level=1),
]


def named(codec: Codec) -> str:
    return f"{codec.label}-{codec.keep}-{codec.stochastic}"


def made_up(size: int, seed: int = 0) -> Tensor:
    """Return numbers like those of a pseudo-gradient: heavy tails, several magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 0, max(size, 1))[:size]
    return torch.randn(size, generator=generator) ** 3 * scale


def through(vector: Tensor, codec: Codec, seed: int = 0) -> Tensor:
    return decode(encode(vector, codec, seed), codec, vector.numel())


vectors = st_numpy.arrays(
    np.float32,
    st.integers(0, 300),
    elements=st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-(2.0**-126), 2.0**-126, width=32),
).map(torch.from_numpy)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", EVERY, ids=named)
def test_bytes_are_what_the_cost_model_says(codec: Codec, size: int) -> None:
    data = encode(made_up(size), codec)
    if not codec.zstd_level:
        assert len(data) == codec.num_bytes(size)
    back = decode(data, codec, size)
    assert back.shape == (size,)
    assert back.dtype == torch.float32


def test_bytes_by_hand() -> None:
    assert [Codec(name).num_bytes(CHUNK) for name in CODECS] == [
        4 * 4096,
        2 * 4096,
        2 * 4096,
        4096 + 32 * 4,
        2048 + 32 * 4,
        96 + 128,
        96 + 16 + 4,
    ]
    # 3 * 12 bits of places are 5 bytes; 3 * 2 bits of numbers 1; two levels 4.
    assert Codec("topk_int2").num_bytes(3) == 5 + 1 + 4
    assert Codec("int4").num_bytes(129) == 65 + 8


def test_known_bytes_of_integers_and_places() -> None:
    vector = torch.tensor([7.0, -7.0, 3.0])
    assert encode(vector, Codec("int4")) == b"\x00\x00\x80\x3f" + bytes([15 | 1 << 4, 11 | 8 << 4])
    assert encode(vector, Codec("int8")) == encode(vector, Codec("int8"))
    assert encode(vector * 127, Codec("int8"))[4:] == bytes([127, 256 - 127, 54])
    chunk = torch.zeros(CHUNK)
    chunk[[0x123, 0xABC]] = torch.tensor([1.0, -2.0])
    data = encode(chunk, Codec("topk_bfloat16", keep=2))
    assert data == bytes([0x23, 0xC1, 0xAB]) + b"\x80\x3f\x00\xc0"
    data = encode(chunk, Codec("topk_int2", keep=2))
    assert data == bytes([0x23, 0xC1, 0xAB]) + b"\x80\x3f\x00\x40" + bytes([0b1100])


@pytest.mark.parametrize("codec", EVERY, ids=named)
def test_what_codecs_do_to_a_vector_does_not_depend_on_slabs(codec: Codec) -> None:
    """Whole slabs on their own give what they give inside a longer vector."""
    if codec.stochastic:
        pytest.skip("the slabs share one stream of random numbers")
    vector = made_up(2 * SLAB + 100)
    whole = through(vector, codec)
    for part in slabs(vector.numel()):
        assert torch.equal(through(vector[part].clone(), codec), whole[part])


@pytest.mark.parametrize("codec", EVERY, ids=named)
def test_zeros_come_back_as_zeros(codec: Codec) -> None:
    for size in SIZES:
        assert not through(torch.zeros(size), codec).any()


@pytest.mark.parametrize(("name", "step"), [("int8", 1 / 127), ("int4", 1 / 7)])
@pytest.mark.parametrize("stochastic", [False, True])
@given(vector=vectors, seed=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_integers_err_by_half_a_step_of_their_block(
    name: str, step: float, stochastic: bool, vector: Tensor, seed: int
) -> None:
    back = through(vector, Codec(name, stochastic=stochastic), seed)
    for start in range(0, len(vector), BLOCK):
        block, got = vector[start : start + BLOCK].double(), back[start : start + BLOCK].double()
        allowed = float(block.abs().max()) * step * (1 if stochastic else 0.5) * (1 + 1e-5)
        # Below that a step is rounded off to the grid of fp32's smallest numbers.
        assert float((block - got).abs().max()) <= allowed + 128 * TINY


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int8", "int4"])
@given(vector=vectors)
@settings(max_examples=60, deadline=None)
def test_what_was_decoded_is_encoded_without_further_loss(name: str, vector: Tensor) -> None:
    codec = Codec(name)
    if name == "float16":
        vector = vector.clamp(-60000, 60000)
    once = through(vector, codec)
    # Sevenths and parts of 127 do not divide evenly: an ulp of the scale may move.
    torch.testing.assert_close(through(once, codec), once, rtol=1e-6, atol=float(128 * TINY))


@pytest.mark.parametrize("name", SPARSE)
@given(seed=st.integers(0, 1000), size=st.integers(0, 3 * CHUNK), keep=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_the_largest_of_each_chunk_are_kept(name: str, seed: int, size: int, keep: int) -> None:
    vector, codec = made_up(size, seed), Codec(name, keep=keep)
    back = through(vector, codec)
    for start in range(0, size, CHUNK):
        chunk, got = vector[start : start + CHUNK], back[start : start + CHUNK]
        kept = chunk.abs().topk(min(keep, len(chunk))).indices
        others = torch.ones(len(chunk), dtype=torch.bool)
        others[kept] = False
        assert not got[others].any()
        if name == "topk_bfloat16":
            assert torch.equal(got[kept], chunk[kept].to(torch.bfloat16).float())
        else:
            assert torch.equal(got[kept].sign() * got[kept].sign().abs(), got[kept].sign())
            assert bool((got[kept].sign() == chunk[kept].sign())[got[kept] != 0].all())
            assert len(got[kept].abs().unique()) <= 2
            # Two levels at the means of the two halves never err more than none.
            assert float((chunk[kept] - got[kept]).norm()) <= float(chunk[kept].norm()) * 1.01


@pytest.mark.parametrize("name", INTEGERS)
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(name: str) -> None:
    vector = torch.full((BLOCK,), 0.3)
    vector[0] = 7.0 if name == "int4" else 127.0
    draws = torch.stack([through(vector, Codec(name, stochastic=True), seed) for seed in range(64)])
    # 64 * 127 draws of 0 or 1 with mean 0.3: five standard errors.
    error = float(draws[:, 1:].mean()) - 0.3
    assert abs(error) < 5 * math.sqrt(0.21 / (64 * (BLOCK - 1)))
    assert set(draws[:, 1:].unique().tolist()) == {0.0, 1.0}
    assert not through(vector, Codec(name))[1:].any()


def test_stochastic_rounding_depends_on_the_seed_alone() -> None:
    vector, codec = made_up(1000), Codec("int4", stochastic=True)
    assert encode(vector, codec, 3) == encode(vector, codec, 3)
    assert encode(vector, codec, 3) != encode(vector, codec, 4)


@pytest.mark.parametrize(
    ("name", "error"), [("int8", 1 / 128), ("int4", 1 / 8), ("topk_bfloat16", 1 / 256)]
)
def test_denormals_and_huge_numbers_survive(name: str, error: float) -> None:
    # The largest of all lies beyond what bfloat16 can say.
    for size in (TINY, 1e-40, 1e30, 3e38 if name == "topk_bfloat16" else LARGEST):
        vector = torch.tensor([size, -size, 0.0, size / 2])
        back = through(vector, Codec(name))
        assert bool(torch.isfinite(back).all())
        torch.testing.assert_close(back, vector, rtol=0, atol=max(error * size * 1.001, 1e-40))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK, SLAB, SLAB + 5])
@pytest.mark.parametrize("codec", EVERY, ids=named)
def test_what_is_not_finite_is_refused_wherever_it_stands(
    codec: Codec, place: int, bad: float
) -> None:
    vector = made_up(SLAB + 6)
    vector[place] = bad
    with pytest.raises(CodecError, match="NaN or infinite"):
        through(vector, codec)
    assert not bool(torch.isfinite(rounding_error(vector, codec)).any())


@pytest.mark.parametrize("codec", EVERY, ids=named)
def test_what_a_codec_leaves_behind_is_what_did_not_arrive(codec: Codec) -> None:
    vector = made_up(5000)
    left = rounding_error(vector, codec, seed=9)
    assert torch.equal(left, vector - through(vector, codec, seed=9))
    assert bool(left.any()) == (codec.name != "float32" and codec.keep != 0)


@pytest.mark.parametrize("codec", EVERY, ids=named)
@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: bytes(d) + b"\0", lambda d: b""])
def test_other_lengths_are_refused(codec: Codec, change: Callable[[bytes], bytes]) -> None:
    data = change(encode(made_up(1000), codec))
    with pytest.raises(CodecError, match="bytes"):
        decode(data, codec, 1000)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, LARGEST])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_hostile_scale_is_refused(name: str, scale: float) -> None:
    data = bytearray(encode(made_up(300), Codec(name)))
    data[4:8] = np.float32(scale).tobytes()
    with pytest.raises(CodecError, match="scale"):
        decode(bytes(data), Codec(name), 300)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("places", [(5, 5), (6, 5), (0, 100), (4095, 4095)])
def test_places_that_repeat_descend_or_lie_outside_are_refused(
    name: str, places: tuple[int, int]
) -> None:
    codec = Codec(name, keep=2)
    both = places[0] | places[1] << 12
    data = both.to_bytes(3, "little") + encode(torch.ones(100), codec)[3:]
    with pytest.raises(CodecError, match="places in a chunk must ascend and lie inside it"):
        decode(data, codec, 100)


@pytest.mark.parametrize("level", [math.nan, math.inf, -1.0])
def test_hostile_levels_are_refused(level: float) -> None:
    codec = Codec("topk_int2", keep=2)
    data = bytearray(encode(torch.ones(100), codec))
    data[3:5] = torch.tensor([level], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with pytest.raises(CodecError, match="level"):
        decode(bytes(data), codec, 100)


def test_a_frame_that_opens_to_more_is_refused_before_it_is_opened() -> None:
    codec = Codec("float32", zstd_level=3)
    bomb = compress(bytes(2**24), 3)
    assert len(bomb) < 2000
    with pytest.raises(CodecError, match="announce 16777216 bytes, the shape needs 40"):
        decode(bomb, codec, 10)
    good = encode(torch.ones(10), codec)
    for bad in (good + b"\0", good[:-1], b"", b"not zstd at all", good[:4] + bytes(len(good) - 4)):
        with pytest.raises(CodecError):
            decode(bad, codec, 10)


@pytest.mark.parametrize("codec", EVERY, ids=named)
@given(data=st.data(), size=st.integers(0, 700))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_finite_vector_or_a_codec_error(
    codec: Codec, data: st.DataObject, size: int
) -> None:
    length = codec.num_bytes(size)
    exact = st.binary(min_size=length, max_size=length)
    raw = data.draw(exact | st.binary(max_size=1500))
    try:
        vector = decode(raw, codec, size)
    except CodecError:
        return
    assert vector.shape == (size,)
    assert bool(torch.isfinite(vector).all())


def test_a_codec_must_be_one_of_ours() -> None:
    with pytest.raises(ValueError, match="'int3' is not one of float32"):
        Codec("int3")
    with pytest.raises(ValueError, match="keeps 1 to 4096"):
        Codec("topk_int2", keep=0)


def test_finiteness_and_norm_of_a_long_vector() -> None:
    vector = made_up(3 * SLAB + 11)
    assert is_finite(vector)
    assert squared_norm(vector) == pytest.approx(float(vector.double().square().sum()), rel=1e-6)
    assert is_finite(torch.tensor([LARGEST, -LARGEST]))
    assert is_finite(torch.empty(0))
    for bad in (math.nan, math.inf, -math.inf):
        vector[-1] = bad
        assert not is_finite(vector)
