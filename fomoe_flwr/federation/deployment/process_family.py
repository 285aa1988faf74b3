"""A family of Flower's processes: its environment, its ports, its health and its end.

All processes of a family have the same mark in their environment, and their children inherit it.
So all members can be found and ended by pid, even when some of their parents were killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from fomoe_flwr.errors import RunError
from fomoe_flwr.events import without_colours
from fomoe_flwr.files import save_text

MARK = "FOMOE_FAMILY"
"""Environment variable that tells to which family a process belongs."""

_END_SECONDS = 8.0
_LOG_BYTES = 8 * 2**20


class ProcessError(RunError):
    """A process that did not start or died; the text names its log."""


def environment(home: Path, mark: Path) -> dict[str, str]:
    """Return the environment of Flower's processes.

    `home` becomes Flower's own folder, `mark` names the family.
    """
    return {
        **os.environ,
        MARK: str(mark),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Otherwise every run installs the app's dependencies, torch included, into a fresh
        # environment that shadows this one.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Otherwise Ray joins, or waits for, any cluster that was ever started on this machine.
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        # Flower starts its helpers by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def tool(name: str) -> str:
    """Return the command of this very environment, activated or not."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def free_port() -> int:
    """Return a port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    command: list[str], variables: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own; its output is added to `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            env=dict(variables),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def take_colours_out(log: Path) -> None:
    """Remove a terminal's codes from the log of a process that ended: Flower always writes them."""
    with contextlib.suppress(FileNotFoundError):
        text = log.read_text(encoding="utf-8", errors="replace")
        save_text(without_colours(text), log)


def shorten(log: Path) -> None:
    """Move the content of a long log to `.1` while its process goes on writing."""
    if log.stat().st_size < _LOG_BYTES:
        return
    # The process has the file open: it is copied and emptied, not renamed.
    log.with_suffix(".log.1").write_bytes(log.read_bytes())
    os.truncate(log, 0)


def wait_until_healthy(
    address: str, authority: Path | None, is_alive: Callable[[], bool], log: Path, seconds: float
) -> None:
    """Wait until `address` answers on /health; over TLS where there is an authority to trust.

    Raises ProcessError when the process ends or the time is over.
    """
    scheme = "http" if authority is None else "https"
    context = None if authority is None else ssl.create_default_context(cafile=str(authority))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and is_alive():
        try:
            with urllib.request.urlopen(f"{scheme}://{address}/health", timeout=2, context=context):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ProcessError(f"nothing healthy answers at {address}; the log is {log}")


def family(mark: Path | str, variable: str = MARK) -> list[psutil.Process]:
    """List the processes with this mark in their environment, without the one that asks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.pid != os.getpid() and process.environ().get(variable) == str(mark):
                found.append(process)
    return found


def end_family(mark: Path | str, variable: str = MARK) -> int:
    """End a family: politely, then by force; return how many processes were ended."""
    ended: set[psutil.Process] = set()
    for number, seconds in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, 3.0)):
        asked: set[psutil.Process] = set()
        # Twice: a process may have started another one while it was being ended.
        for _ in range(2):
            members = family(mark, variable)
            if not members:
                return len(ended | asked)
            if asked.issuperset(members):
                break
            asked.update(members)
            for process in members:
                send(process, number)
            psutil.wait_procs(members, timeout=seconds)
        ended |= asked
    return len(ended)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Signal a process that may be gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
