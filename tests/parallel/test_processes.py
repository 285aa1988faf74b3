"""Processes that work together end together, whatever happens to one of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fomoe_flwr.parallel.processes import Processes, ProcessesError

HERE = Path(__file__).parent


def job(parallel: str = "ddp", timeout_seconds: float = 60, **what: str) -> dict[str, Any]:
    return {
        "what": {rank.removeprefix("rank"): deed for rank, deed in what.items()},
        "device": "cpu",
        "parallel": parallel,
        "state_bytes": 1,
        "threads": 1,
        "timeout_seconds": timeout_seconds,
    }


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Processes]]:
    """Return a function that starts light processes; all of them end with the test."""
    monkeypatch.syspath_prepend(str(HERE))
    started: list[Processes] = []

    def make(count: int) -> Processes:
        started.append(Processes("light", count))
        return started[-1]

    yield make
    for processes in started:
        processes.close()


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_processes_do_one_job_after_the_other_and_end_when_told(
    start: Callable[[int], Processes],
) -> None:
    processes = start(2)
    pids = processes.pids
    assert len(set(pids)) == 2
    assert processes.run(job()) == {"sum": 3.0, "team": "ddp"}
    assert processes.run(job("auto")) == {"sum": 3.0, "team": "ddp"}
    assert processes.run(job("fsdp")) == {"sum": 3.0, "team": "fsdp"}
    assert processes.is_alive()
    assert processes.folder.stat().st_mode & 0o077 == 0
    processes.close()
    assert gone(pids)
    assert not processes.is_alive()
    assert not processes.folder.exists()


@pytest.mark.parametrize(
    ("rank", "what", "message", "kind"),
    [
        (1, "raise", "process 1 of 2 failed: rank 1 does not want to", "SomeError"),
        (0, "kill", "process 0 of 2 was ended by signal 9", ""),
        pytest.param(
            1,
            "exit",
            "process 1 of 2 ended with status 7: going home early",
            "",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_that_fails_ends_all_and_says_why(
    rank: int, what: str, message: str, kind: str, start: Callable[[int], Processes]
) -> None:
    processes = start(2)
    pids = processes.pids
    with pytest.raises(ProcessesError) as raised:
        processes.run(job(**{f"rank{rank}": what}))
    # What else the log holds depends on the versions of others.
    assert str(raised.value).startswith(message.partition(":")[0])
    assert message.rpartition(": ")[2] in str(raised.value)
    assert raised.value.kind == kind
    assert gone(pids)


@pytest.mark.slow
def test_one_that_never_comes_ends_all_after_the_timeout(
    start: Callable[[int], Processes],
) -> None:
    processes = start(2)
    processes.run(job(timeout_seconds=2))
    pids = processes.pids
    with pytest.raises(ProcessesError, match="process 0 of 2 failed"):
        processes.run(job(rank1="sleep"))
    assert gone(pids)


@pytest.mark.slow
def test_processes_end_with_their_starter() -> None:
    code = (
        "import sys, time; from fomoe_flwr.parallel.processes import Processes;"
        "p = Processes('light', 2); print(*p.pids, flush=True); time.sleep(600)"
    )
    path = os.pathsep.join([str(HERE), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as starter:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        assert len(pids) == 2
        starter.kill()
    deadline = time.monotonic() + 60
    while not gone(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(pids)
