"""The heartbeat: a hold on a run directory that ends with whoever has it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fomoe_flwr.run import heartbeat
from fomoe_flwr.run.heartbeat import Heartbeat


def test_a_heartbeat_that_cannot_be_written_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heartbeat.json"

    def refuse(value: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(heartbeat, "save_json", refuse)
        with pytest.raises(OSError, match="No space") as kept, Heartbeat(path):
            pass
    with Heartbeat(path):
        assert path.exists()
    del kept
