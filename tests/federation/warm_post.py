"""A node with a folder for its warm worker, and worker processes to put into it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fomoe_flwr.federation.warm.folder import Folder
from fomoe_flwr.federation.warm.frames import Frame, receive
from fomoe_flwr.federation.warm.handshake import BEAT, greet_as_giver

SCRIPT = Path(__file__).with_name("warm_worker_process.py")
ROOT = Path(__file__).parents[2]


class Post:
    """A node with a folder, and the worker processes that its supervisor starts."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path / "w")
        self.notes = path / "notes"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, idle_seconds: float = 0, with_process: int = 0) -> subprocess.Popen[bytes]:
        """Start a worker with the answers of the script; it listens when this returns."""
        command = [sys.executable, str(SCRIPT), str(self.folder.path)]
        process = subprocess.Popen(
            [*command, str(idle_seconds), str(with_process)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.processes.append(process)
        wait_for(lambda: self.folder.token.is_file() or process.poll() is not None)
        return process

    def context(self, **more: Any) -> Context:
        """Return what Flower tells a ClientApp."""
        node_config = {
            "worker-dir": str(self.folder.path),
            "worker-start": False,
            "notes": str(self.notes),
            **more,
        }
        return Context(3, 7, node_config, RecordDict(), {"state-dir": "/s"})

    def lines(self) -> list[str]:
        """Return what workers noted."""
        return self.notes.read_text(encoding="utf-8").splitlines() if self.notes.is_file() else []

    def connect(self) -> socket.socket:
        """Connect like anybody who finds the socket."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(20)
        peer.connect(str(self.folder.socket))
        return peer

    def enter(self) -> socket.socket:
        """Connect like one who knows the token, and wait for our turn."""
        peer = self.connect()
        greet_as_giver(peer, self.folder.read_token())
        assert next_frame(peer).fields == {"ready": True}
        return peer


def next_frame(peer: socket.socket) -> Frame:
    """Receive what is no heartbeat."""
    while BEAT in (frame := receive(peer)).fields:
        pass
    return frame


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def some_content(num_bytes: int = 8) -> RecordDict:
    arrays = ArrayRecord()
    data = bytes(i % 251 for i in range(num_bytes))
    arrays["shared"] = Array(dtype="float32", shape=(num_bytes // 4,), stype="x.flat", data=data)
    arrays["experts"] = Array(dtype="float32", shape=(0,), stype="x.flat", data=b"")
    return RecordDict(
        {
            "weights": arrays,
            "task": ConfigRecord({"json": '{"a": [1, null]}', "ids": [1, 2], "on": True}),
            "metrics": MetricRecord({"loss": 0.1 + 0.2, "tokens": 2**40, "all": [1.5, 2.5]}),
        }
    )


def assert_same(got: RecordDict, want: RecordDict) -> None:
    assert sorted(got) == sorted(want)
    for name, record in want.array_records.items():
        assert list(got.array_records[name]) == list(record)
        for key, array in record.items():
            other = got.array_records[name][key]
            assert (other.dtype, tuple(other.shape)) == (array.dtype, tuple(array.shape))
            assert (other.stype, other.data) == (array.stype, array.data)
    for name, record in want.config_records.items():
        assert dict(got.config_records[name]) == dict(record)
    for name, record in want.metric_records.items():
        assert dict(got.metric_records[name]) == dict(record)


def end_started(folder: Folder) -> None:
    """End workers that were started on demand in a folder; they are nobody's children."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "worker" in words and str(folder.path) in words:
            process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(20)
