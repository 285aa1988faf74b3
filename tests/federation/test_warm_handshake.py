"""The handshake: strangers, impostors, dawdlers and workers of other code."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
from warm_post import Post, assert_same, end_started, some_content

from fomoe_flwr.federation.warm import handover, handshake
from fomoe_flwr.federation.warm.frames import FrameError
from fomoe_flwr.federation.warm.handover import TaskFailedError, hand_over
from fomoe_flwr.federation.warm.handshake import (
    OtherCodeError,
    StrangerError,
    greet_as_giver,
    greet_as_worker,
)


def test_who_does_not_know_the_token_is_turned_away(post: Post) -> None:
    post.start()
    right = post.folder.read_token()
    with post.connect() as peer, pytest.raises(StrangerError, match="the same token"):
        greet_as_giver(peer, b"0" * 64)
    post.folder.token.write_bytes(b"0" * 64)
    started = time.monotonic()
    with pytest.raises(StrangerError):
        hand_over("echo", some_content(), post.context())
    assert time.monotonic() - started < handover.START_SECONDS / 2
    post.folder.token.write_bytes(right)
    assert_same(hand_over("echo", some_content(), post.context()), some_content())


def test_a_worker_that_does_not_know_the_token_gets_no_task() -> None:
    worker, giver = socket.socketpair()

    def impostor() -> None:
        with contextlib.suppress(StrangerError, FrameError):
            greet_as_worker(worker, b"guessed")

    thread = threading.Thread(target=impostor)
    thread.start()
    with giver, pytest.raises(StrangerError):
        greet_as_giver(giver, b"right")
    thread.join()
    worker.close()


def test_a_proof_is_of_no_use_in_another_greeting() -> None:
    one = handshake._proof(b"t", "giver", "a", "b")
    assert one != handshake._proof(b"t", "worker", "a", "b")
    assert one != handshake._proof(b"t", "giver", "c", "b")
    assert one != handshake._proof(b"t", "giver", "a", "c")
    assert one != handshake._proof(b"u", "giver", "a", "b")


def test_a_dawdler_does_not_hold_up_the_others_for_long(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    post.start()
    with post.connect() as dawdler:
        dawdler.sendall(b"\0")
        monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 30.0)
        assert_same(hand_over("echo", some_content(), post.context()), some_content())


def test_a_worker_of_other_code_is_reported(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    process = post.start()
    monkeypatch.setattr(handshake, "code", lambda: {"version": "9.9", "digest": "beef"})
    with pytest.raises(OtherCodeError, match=r"this ClientApp 9\.9 .*install the same version"):
        hand_over("echo", some_content(), post.context())
    assert process.poll() is None


def test_the_code_has_a_version_and_a_digest_that_its_modules_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fomoe_flwr

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(fomoe_flwr, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(handshake, "code", handshake.code.__wrapped__)
    before = handshake.code()
    assert before == handshake.code()
    assert before["version"] == fomoe_flwr.__version__
    (package / "more.py").write_text("a = 1\n")
    middle = handshake.code()
    (package / "more.py").write_text("a = 2\n")
    assert len({before["digest"], middle["digest"], handshake.code()["digest"]}) == 3


def test_a_worker_of_other_code_that_we_may_replace_is_replaced(post: Post) -> None:
    old = post.start()
    context = post.context(**{"worker-start": True, "worker-idle-seconds": 60})
    try:
        with pytest.MonkeyPatch.context() as patch:
            # The old one was started with modules that have since been changed.
            inner = handshake.code()
            patch.setattr(handshake, "code", lambda: {**inner, "digest": "beef"})
            with pytest.raises(OtherCodeError):
                handover._Door.of(context.node_config)._greeted()
        assert old.wait(timeout=20) == 0
        # In its place the real one, which knows no echo.
        with pytest.raises(TaskFailedError, match="not one of query, train"):
            hand_over("echo", some_content(), context)
    finally:
        end_started(post.folder)
