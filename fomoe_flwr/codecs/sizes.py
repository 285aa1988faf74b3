"""What every codec is called and how many bytes it makes of how many numbers. No torch.

The wire and the cost model both ask here, so a prediction equals what travels. Only zstd makes
sizes depend on the numbers: predicted bytes are then those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Plain numbers, and the bytes of one."""

BLOCK = 128
"""Numbers that share one fp32 scale in `int8` and `int4`."""

CHUNK = 4096
"""Numbers of which the `topk` codecs keep a few; an index into it takes 12 bits (SparseLoCo)."""

INDEX_BITS = 12
SCALE_BYTES = 4

INTEGERS = {"int8": 8, "int4": 4}
"""Integers with a scale for each block, and the bits of one."""

SPARSE = {"topk_bfloat16": 16, "topk_int2": 2}
"""The largest numbers of each chunk with their places, and the bits of one number."""

CODECS = (*FLOATS, *INTEGERS, *SPARSE)
"""Names that `wire.up` takes; `wire.down` takes all but those of `SPARSE`."""

WITH_FEEDBACK = (*INTEGERS, *SPARSE)
"""Codecs that lose enough for error feedback to matter."""


@dataclass(frozen=True)
class Codec:
    """How a flat fp32 vector becomes bytes."""

    name: str
    keep: int = 64
    """Numbers that a `topk` codec keeps of each chunk."""
    stochastic: bool = False
    """`int8` and `int4`: round up or down by chance, so that the mean of many is exact."""
    zstd_level: int = 0
    """Compress the bytes further; 0 does not."""

    def __post_init__(self) -> None:
        if self.name not in CODECS:
            raise ValueError(f"{self.name!r} is not one of {', '.join(CODECS)}")
        if not 1 <= self.keep <= CHUNK:
            raise ValueError(f"a codec keeps 1 to {CHUNK} numbers of a chunk (got {self.keep})")

    @property
    def label(self) -> str:
        """Name the codec on the wire."""
        return f"{self.name}+zstd" if self.zstd_level else self.name

    def num_kept(self, elements: int) -> int:
        """Count the numbers that are sent of so many."""
        if self.name not in SPARSE:
            return elements
        whole, rest = divmod(elements, CHUNK)
        return whole * self.keep + min(self.keep, rest)

    @property
    def bytes_per_element(self) -> float:
        """Return the bytes of one number of a long vector, before zstd."""
        return self.num_bytes(CHUNK) / CHUNK

    def num_bytes(self, elements: int) -> int:
        """Return the bytes of a vector of so many numbers, before zstd."""
        if self.name in FLOATS:
            return elements * FLOATS[self.name]
        if self.name in INTEGERS:
            return _bytes(elements * INTEGERS[self.name]) + SCALE_BYTES * _parts(elements, BLOCK)
        kept = self.num_kept(elements)
        # The two levels of `topk_int2` are a pair of bfloat16 for each chunk.
        levels = 4 * _parts(elements, CHUNK) if self.name == "topk_int2" else 0
        return _bytes(kept * INDEX_BITS) + _bytes(kept * SPARSE[self.name]) + levels


@dataclass(frozen=True)
class CodecPair:
    """The codecs of one direction; what is neither shared nor an expert's does not travel."""

    shared: Codec
    experts: Codec

    @classmethod
    def plain(cls, name: str) -> CodecPair:
        """Use one codec with its defaults for both."""
        return cls(Codec(name), Codec(name))


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _parts(elements: int, size: int) -> int:
    return -(-elements // size)
