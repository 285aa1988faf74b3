"""What travels: flat vectors as Flower arrays, the records of each message, and their bytes.

An array carries a codec's bytes under a serialization type of our own: no pickle, no NumPy header.
So payload bytes are exactly those that the codec and the cost model name for so many numbers.
Everything read from a peer is checked before use.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fomoe_flwr.codecs import vectors as codecs
from fomoe_flwr.codecs.errors import CodecError
from fomoe_flwr.codecs.floats import Empty
from fomoe_flwr.codecs.sizes import Codec, CodecPair
from fomoe_flwr.errors import one_line
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT

STYPE = "fomoe.flat"
LARGE_BYTES = 2**20
"""From here on an array is a view of the vector's own memory."""
KINDS = ("shared", "experts", "moments", "overhead")
"""Kinds by which bytes are counted."""

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

Seed = Callable[[str], int]
"""Maps the name of a vector to the seed of its stochastic rounding."""

WEIGHTS, TASK, METRICS, SETUP = "weights", "task", "metrics", "setup"
VECTORS = ("shared", "experts")
_PLAIN = ("ValueError", "RuntimeError", "OSError")
"""Errors of Python whose text says enough."""


class WireError(ValueError):
    """A message that breaks the protocol; the text names the reason."""


def error_in(message: Message) -> WireError:
    """Make an error of an error reply; what an app raised comes without its class's name."""
    reason = message.error.reason or "no reason given"
    raised = re.fullmatch(r"<class '([\w.]+)'>:<'(.*)'>", reason, re.DOTALL)
    if raised is not None:
        kind, reason = raised[1].rpartition(".")[2], one_line(raised[2])
        if not (raised[1].startswith("fomoe_flwr.") or raised[1] in _PLAIN) or not reason:
            reason = f"a fault in the program ({kind}: {reason})"
    return WireError(f"{reason} (Flower error {message.error.code})")


def encode(vector: Tensor, codec: Codec | str, seed: int = 0) -> Array:
    """Turn a flat fp32 vector into an array; a name stands for the codec with its defaults.

    `seed` is that of the codec's stochastic rounding.
    """
    codec = Codec(codec) if isinstance(codec, str) else codec
    data = codecs.encode(vector, codec, seed)
    is_large = len(data) >= LARGE_BYTES
    own = b"" if is_large else bytes(data)
    array = Array(dtype=codec.label, shape=(vector.numel(),), stype=STYPE, data=own)
    if is_large:
        # As Flower's own `inflate` does: the constructor takes nothing but `bytes`, and to make
        # them would copy a whole model.
        array.data = data  # type: ignore[assignment]
    return array


def decode(array: Array, codec: Codec | str, size: int, empty: Empty = torch.empty) -> Tensor:
    """Turn an array back into a flat fp32 vector of `size` elements, not to be written to.

    Raises WireError for another type, shape or length than agreed, and for non-finite numbers.
    """
    codec = Codec(codec) if isinstance(codec, str) else codec
    if array.stype != STYPE or array.dtype != codec.label:
        raise WireError(
            f"array is {array.dtype}/{array.stype}, the run's settings need {codec.label}/{STYPE}"
        )
    if tuple(array.shape) != (size,):
        raise WireError(f"array has shape {list(array.shape)}, the layout needs [{size}]")
    try:
        return codecs.decode(array.data, codec, size, empty)
    except CodecError as error:
        raise WireError(str(error)) from error


def encode_pair(
    shared: Tensor, experts: Tensor, pair: CodecPair, seed: Seed
) -> tuple[Array, Array]:
    """Encode the two vectors of a record."""
    return (
        encode(shared, pair.shared, seed("shared")),
        encode(experts, pair.experts, seed("experts")),
    )


def arrays_of(shared: Array, experts: Array) -> ArrayRecord:
    """Bundle two arrays. A `shared` object that goes to several nodes is uploaded once."""
    record = ArrayRecord()
    record["shared"] = shared
    record["experts"] = experts
    return record


def vectors_in(
    content: RecordDict,
    name: str,
    pair: CodecPair | str,
    sizes: tuple[int, int],
    empty: Empty = torch.empty,
) -> tuple[Tensor, Tensor]:
    """Read the shared and the expert vector of a message, not to be written to. Raises WireError.

    A name stands for one codec with its defaults for both. `empty` makes decoded vectors.
    """
    pair = CodecPair.plain(pair) if isinstance(pair, str) else pair
    record = _record(content, name, ArrayRecord)
    if record is None or sorted(record) != sorted(VECTORS):
        found = sorted(record) if record is not None else sorted(content)
        raise WireError(f"needs the arrays {', '.join(VECTORS)} in {name!r} (got {found})")
    return (
        decode(record["shared"], pair.shared, sizes[0], empty),
        decode(record["experts"], pair.experts, sizes[1], empty),
    )


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays of a message: what the cost model predicts."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())


@dataclass
class Traffic:
    """Bytes of one direction, by what they carry.

    `overhead` is the text of tasks and metrics. The platform's own framing is not counted.
    """

    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def payload(self) -> int:
        """Bytes of arrays."""
        return sum(self.by_kind.values()) - self.by_kind["overhead"]

    def add(self, content: RecordDict) -> None:
        """Count a message."""
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                for key, array in record.items():
                    is_main = name in (WEIGHTS, PSEUDO_GRADIENT) and key in VECTORS
                    self.by_kind[key if is_main else "moments"] += len(array.data)
            elif isinstance(record, ConfigRecord):
                texts = [value for value in record.values() if isinstance(value, str)]
                self.by_kind["overhead"] += sum(map(len, texts))
            else:
                self.by_kind["overhead"] += sum(len(key) + 8 for key in record)


def json_record(fields: Mapping[str, Any]) -> ConfigRecord:
    """Pack JSON-able fields into a record."""
    return ConfigRecord({"json": json.dumps(dict(fields))})


def json_in(content: RecordDict, name: str) -> dict[str, Any]:
    """Read a record written by `json_record`. Raises WireError."""
    record = _record(content, name, ConfigRecord)
    text = record.get("json") if record is not None else None
    if not isinstance(text, str):
        raise WireError(f"needs the record {name!r} (got {sorted(content)})")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep
        raise WireError(f"record {name!r} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise WireError(f"record {name!r} is not a JSON object")
    return fields


def metrics_in(content: RecordDict, required: Sequence[str]) -> dict[str, float]:
    """Read the scalar metrics. Raises WireError when one is missing, or any is not finite."""
    record = _record(content, METRICS, MetricRecord)
    if record is None:
        raise WireError(f"needs the record {METRICS!r} (got {sorted(content)})")
    metrics = {k: float(v) for k, v in record.items() if isinstance(v, int | float)}
    for key in sorted({*required, *metrics}):
        value = metrics.get(key)
        if value is None or not math.isfinite(value):
            raise WireError(f"metric {key}={value} must be a finite number")
    return metrics


def metrics_record(metrics: Mapping[str, float]) -> MetricRecord:
    """Pack scalar metrics into a record."""
    return MetricRecord(dict(metrics))


def is_count(value: Any) -> bool:
    """Return whether a JSON value is an integer that a tensor can hold, and at least 0."""
    # JSON's integers have no upper end, a tensor's have; and counts are added up.
    return type(value) is int and 0 <= value < 2**53


def are_counts(value: Any) -> bool:
    """Return whether a JSON value is a list of counts; see `is_count`."""
    return isinstance(value, list) and all(is_count(item) for item in value)


def _record(content: RecordDict, name: str, kind: type[Record]) -> Record | None:
    # Flower's own views (`content.array_records` and its like) tie a message into a cycle of
    # references, and its bytes, maybe a gigabyte, would stay until Python's collector runs.
    record = content.get(name)
    return record if isinstance(record, kind) else None
