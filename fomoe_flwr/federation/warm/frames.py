"""Frames: a length, a JSON header, and the raw bytes whose sizes the header names."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fomoe_flwr.errors import RunError

MOST_HEADER_BYTES = 2**28
"""Limit for a header. It holds settings, counts and, in a query, a tokenizer of some megabytes."""
SHORT_HEADER_BYTES = 2**12
"""Limit for the header of a peer that has not yet proved who it is."""

_LENGTH = struct.Struct(">I")
_SIZES = "sizes"
_PIECE_BYTES = 2**30


class FrameError(RunError):
    """Bytes that are no frame, or one that is too large."""


class ClosedError(FrameError):
    """A peer that closed the connection, or died."""


class SilentError(ClosedError):
    """A peer from which nothing came for too long, or that took nothing."""


@dataclass(frozen=True)
class Frame:
    """One message on the socket."""

    fields: Mapping[str, Any]
    """JSON-able."""
    blobs: list[bytes | memoryview] = field(default_factory=list)


def send(peer: socket.socket, frame: Frame) -> None:
    """Send a frame. Raises ClosedError."""
    sizes = [len(blob) for blob in frame.blobs]
    header = json.dumps({**frame.fields, _SIZES: sizes}).encode()
    if len(header) > MOST_HEADER_BYTES:
        raise FrameError(f"a frame's header has {len(header)} bytes, at most {MOST_HEADER_BYTES}")
    try:
        peer.sendall(_LENGTH.pack(len(header)) + header)
        for blob in frame.blobs:
            peer.sendall(blob)
    except OSError as error:
        raise _broken(error) from error


def send_short(peer: socket.socket, fields: Mapping[str, Any]) -> None:
    """Send a frame without bytes, unless the peer is gone or has left too many unread."""
    header = json.dumps({**fields, _SIZES: []}).encode()
    with contextlib.suppress(OSError):
        peer.send(_LENGTH.pack(len(header)) + header, socket.MSG_DONTWAIT)


def limit_silence(peer: socket.socket, seconds: float) -> None:
    """Let `send` and `receive` raise SilentError when nothing moves for so long.

    The kernel keeps the time: with a timeout of Python's, `receive` would copy every piece.
    """
    whole = int(seconds)
    limit = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        peer.setsockopt(socket.SOL_SOCKET, option, limit)


def receive(
    peer: socket.socket,
    most_header_bytes: int = MOST_HEADER_BYTES,
    most_blob_bytes: int | None = None,
) -> Frame:
    """Receive a frame; without `most_blob_bytes` its bytes may fill this machine's memory.

    Sizes are checked before anything is allocated. Raises FrameError, and ClosedError at the end of
    the connection.
    """
    limit = _memory_bytes() if most_blob_bytes is None else most_blob_bytes
    (length,) = _LENGTH.unpack(_read(peer, _LENGTH.size))
    if length > most_header_bytes:
        raise FrameError(f"a frame's header has {length} bytes, at most {most_header_bytes}")
    try:
        fields = json.loads(_read(peer, length))
        sizes = fields.pop(_SIZES)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise FrameError("a frame's header is not a JSON object with sizes") from error
    if not isinstance(fields, dict) or not _are_sizes(sizes):
        raise FrameError("a frame's header is not a JSON object with sizes")
    if sum(sizes) > limit:
        raise FrameError(f"a frame has {sum(sizes)} bytes, at most {limit}")
    return Frame(fields, [_read(peer, size) for size in sizes])


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)


def _read(peer: socket.socket, size: int) -> bytes:
    pieces, left = [], size
    while left:
        try:
            # Without a timeout the kernel fills a whole piece, and no second copy is made.
            piece = peer.recv(min(left, _PIECE_BYTES), socket.MSG_WAITALL)
        except OSError as error:
            raise _broken(error) from error
        if not piece:
            raise ClosedError("the connection was closed")
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _broken(error: OSError) -> ClosedError:
    if isinstance(error, BlockingIOError | TimeoutError):
        return SilentError("nothing came for too long")
    return ClosedError(f"the connection broke: {error.strerror or error}")


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
