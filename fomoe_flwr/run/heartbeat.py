"""The heartbeat of a run: a small file that says which process is at what, renewed all the time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fomoe_flwr.errors import RunError
from fomoe_flwr.files import remove_drafts, save_json

BEAT_SECONDS = 10.0
_LOOK_SECONDS = 1.0
"""How soon a change of those who are waited for is written down."""


class BusyRunError(RunError):
    """A run directory that another living process writes to."""


class Heartbeat:
    """Holds a run directory for one process, and writes down that it lives.

    Raises BusyRunError on entry if another process holds it: a server that was thought dead may
    still be writing. The hold ends with the process, however that ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._phase = "start"
        self._round = 0
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._hold: IO[str] | None = None
        self.awaited: Callable[[], list[dict[str, Any]]] = list
        """Tells whom the process waits for: `worker`, `for` what, `since` when (Unix seconds)."""
        self._told: list[dict[str, Any]] = []
        self._written = 0.0

    def __enter__(self) -> Heartbeat:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._hold = self.path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._hold.close()
            raise BusyRunError(
                f"another process writes to {self.path.parent}: end it before you resume the run"
            ) from None
        try:
            for name in ("*.json*", "config.yaml"):  # Written by this process alone.
                remove_drafts(self.path.parent, name)
            self._write()
        except BaseException:
            self._hold.close()  # Without it the hold would last as long as the error is kept.
            raise
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.awaited = list
        # What has ended the run says more than a heartbeat that cannot be written.
        with contextlib.suppress(OSError):
            self.note("end", self._round)
        if self._hold is not None:
            self._hold.close()

    def note(self, phase: str, server_round: int) -> None:
        """Say what the process does now."""
        self._phase, self._round = phase, server_round
        self._write()

    def _beat(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            is_news = _names(self.awaited()) != _names(self._told)
            if is_news or time.monotonic() - self._written >= BEAT_SECONDS:
                with contextlib.suppress(OSError):
                    self._write()

    def _write(self) -> None:
        with self._writing:
            self._told, self._written = self.awaited(), time.monotonic()
            save_json(
                {
                    "time": time.time(),
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "phase": self._phase,
                    "round": self._round,
                    "awaited": self._told,
                },
                self.path,
            )


def _names(awaited: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(each["worker"], each["for"]) for each in awaited]
