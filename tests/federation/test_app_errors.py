"""The ClientApp's errors: replies with a reason, never a class, a traceback or an exception."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fomoe_flwr.data import DataError
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.warm import handover
from fomoe_flwr.federation.wire import WireError

FULL = OSError(errno.ENOSPC, "No space left on device", "/x")


def task() -> Message:
    for name in ("run_id", "task_id", "node_id"):  # As Flower does in a ClientApp's process.
        setattr(TaskIdentity, name, 1)
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    return message


@pytest.mark.parametrize(
    ("error", "reason", "is_logged"),
    [
        (DataError("no text"), "no text", False),
        (WireError("no\nrecords"), "no records", False),
        (FULL, "/x: No space left on device: make room, or name another place", True),
        (KeyError("bug"), "a fault in the program (KeyError: 'bug')", True),
    ],
)
def test_an_error_becomes_a_reply_with_its_reason(
    error: Exception,
    reason: str,
    is_logged: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> RecordDict:
        raise error

    monkeypatch.setattr(handover, "_answer", fail)
    reply = client_app(task(), Context(1, 1, {}, RecordDict(), {}))
    assert str(wire.error_in(reply)) == f"{reason} (Flower error 2)"
    assert ("Traceback" in capsys.readouterr().err) == is_logged


def test_a_server_without_room_on_its_disk_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> RecordDict:
        raise FULL

    monkeypatch.setattr(handover, "_answer", fail)
    with pytest.raises(OSError, match="No space left"):
        client_app(task(), Context(1, 1, {handover.IN_PROCESS: True}, RecordDict(), {}))
