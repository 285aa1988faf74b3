"""A message's records as a frame, and back: arrays as they are, everything else as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fomoe_flwr.federation.warm.frames import Frame, FrameError


def frame_of(content: RecordDict, fields: Mapping[str, Any]) -> Frame:
    """Put records and further fields into a frame; the arrays' bytes are not copied."""
    blobs: list[bytes | memoryview] = []
    arrays: dict[str, dict[str, Any]] = {}
    for name, record in content.array_records.items():
        arrays[name] = {}
        for key, array in record.items():
            arrays[name][key] = [array.dtype, list(array.shape), array.stype, len(blobs)]
            blobs.append(array.data)
    records = {
        "arrays": arrays,
        "configs": {name: dict(record) for name, record in content.config_records.items()},
        "metrics": {name: dict(record) for name, record in content.metric_records.items()},
    }
    return Frame({**fields, "records": records}, blobs)


def content_of(frame: Frame) -> RecordDict:
    """Take the records out of a frame. Raises FrameError."""
    content = RecordDict()
    try:
        records = frame.fields["records"]
        for name, arrays in records["arrays"].items():
            record = ArrayRecord()
            for key, (dtype, shape, stype, place) in arrays.items():
                data = frame.blobs[place]
                record[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)
            content[name] = record
        for name, values in records["configs"].items():
            content[name] = ConfigRecord(values)
        for name, values in records["metrics"].items():
            content[name] = MetricRecord(values)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise FrameError(f"a frame's records are malformed: {error}") from error
    return content
