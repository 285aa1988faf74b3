"""Memory of this process and this machine."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_LOOK_SECONDS = 0.2


def anonymous_bytes() -> int:
    """Return this process's anonymous memory: what no file backs. 0 where nobody can tell."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    kilobytes = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(kilobytes[0]) if kilobytes else 0


def available_bytes() -> int:
    """Return the memory that this machine, or its container, has left."""
    left = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(left, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return left


class AnonymousPeak:
    """Watches this process's anonymous memory: the system keeps no peak of it."""

    def __init__(self) -> None:
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def look(self) -> int:
        """Take a look, and return what was found."""
        now = anonymous_bytes()
        self._peak = max(self._peak, now)
        return now

    def take(self) -> int:
        """Return the most since the last call."""
        self.look()
        peak, self._peak = self._peak, 0
        return peak

    def close(self) -> None:
        """Watch no longer."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self.look()
