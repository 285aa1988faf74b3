"""The two output streams of a command: whatever becomes of them, printing never raises.

A reader that went away (`| head`), a full disk, a closed descriptor, a console that knows only
ASCII: the command goes on, and training with it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import Any

from fomoe_flwr.events import without_colours


class _Descriptor(io.FileIO):
    """A descriptor that takes every write; the first reason why one was lost is kept."""

    lost: OSError | None = None

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # It does not block, and its reader is slow.
        except OSError as error:
            self.lost = self.lost or error
            return len(data)
        return written


class _Stream(io.TextIOWrapper):
    """Text to a descriptor: what its encoding lacks is escaped; only terminals get colours."""

    def __init__(self, number: int, encoding: str) -> None:
        self.descriptor = _Descriptor(number, "wb", closefd=False)
        raw: Any = self.descriptor
        super().__init__(
            io.BufferedWriter(raw),
            encoding,
            "backslashreplace",
            line_buffering=number == 2 or self.descriptor.isatty(),
        )
        coloured = self.isatty() and os.environ.get("TERM") != "dumb"
        self._plain = not coloured or bool(os.environ.get("NO_COLOR"))

    def write(self, text: str, /) -> int:
        return super().write(without_colours(text) if self._plain else text)


def guard_streams() -> None:
    """Make stdout and stderr of this process safe; streams that somebody replaced stay."""
    for number in (0, 1, 2):
        # A closed one would be given to the next file that is opened.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            setattr(sys, name, _Stream(number, encoding))


def lost_output() -> OSError | None:
    """Flush stdout; return why some of it was lost, unless only its reader went away."""
    if not isinstance(sys.stdout, _Stream):
        return None
    sys.stdout.flush()
    lost = sys.stdout.descriptor.lost
    return None if lost is None or lost.errno == errno.EPIPE else lost
