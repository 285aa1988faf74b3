"""Frames: garbage and bytes without measure are refused, and the worker goes on."""

from __future__ import annotations

import contextlib
import socket

import pytest
from warm_post import Post, assert_same, next_frame, some_content

from fomoe_flwr.federation.warm import frames
from fomoe_flwr.federation.warm.contents import content_of, frame_of
from fomoe_flwr.federation.warm.frames import ClosedError, Frame, FrameError, receive, send
from fomoe_flwr.federation.warm.handover import hand_over

GARBAGE = {
    "random bytes": bytes(range(7, 250)),
    "no JSON": b"\0\0\0\4{{{{",
    "no object": b"\0\0\0\2[]",
    "no sizes": b"\0\0\0\2{}",
    "wrong sizes": b'\0\0\0\x0f{"sizes": [-1]}',
    "long header": b"\x7f\xff\xff\xff" + b"x" * 64,
    "bytes before a greeting": b'\0\0\0\x0f{"sizes": [99]}' + b"x" * 99,
    "deep": b"\0\0\x0f\xa0" + b"[" * 4000,
    "nothing": b"",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_turned_away_and_others_are_served(post: Post, garbage: bytes) -> None:
    process = post.start()
    with post.connect() as peer:
        with contextlib.suppress(BrokenPipeError):
            peer.sendall(garbage)
            peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ClosedError):
            while "proof" not in receive(peer).fields:
                pass
            raise AssertionError("a stranger was let in")
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    assert process.poll() is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff" + b"x" * 64,
        b'\0\0\0\x2a{"kind": "echo", "sizes": [4611686018427]}',
        b'\0\0\0\x1d{"kind": "echo", "sizes": []}',
        b'\0\0\0\x20{"kind": "\\u0000rm", "sizes": []}',
    ],
    ids=["long header", "more bytes than memory", "no records", "unknown kind"],
)
def test_garbage_after_the_greeting_is_refused_and_others_are_served(
    post: Post, garbage: bytes
) -> None:
    process = post.start()
    with post.enter() as peer:
        peer.sendall(garbage)
        with contextlib.suppress(ClosedError):
            error = next_frame(peer).fields["error"]
            assert "malformed" in error or "is not one of" in error
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    assert process.poll() is None


def test_records_that_are_none_are_refused() -> None:
    good = frame_of(some_content(), {})
    for fields in ({}, {"records": []}, {"records": {"arrays": {"a": {"b": ["x", [1], "y", 9]}}}}):
        with pytest.raises(FrameError, match="malformed"):
            content_of(Frame(fields, good.blobs))


def test_frames_have_limits() -> None:
    one, other = socket.socketpair()
    with one, other:
        send(one, Frame({"a": 1}, [b"12345"]))
        with pytest.raises(FrameError, match="5 bytes, at most 4"):
            receive(other, most_blob_bytes=4)
    one, other = socket.socketpair()
    with one, other:
        send(one, Frame({"a": "b" * 99}))
        with pytest.raises(FrameError, match="at most 50"):
            receive(other, most_header_bytes=50)
    one, other = socket.socketpair()
    with one, other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "MOST_HEADER_BYTES", 50)
        with pytest.raises(FrameError, match="at most 50"):
            send(one, Frame({"a": "b" * 99}))
