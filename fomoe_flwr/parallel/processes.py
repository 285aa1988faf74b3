"""Processes that work together on one job at a time, and end together.

They are started by `python -m MODULE`, neither forked nor through pickle: the starter may be a Ray
actor, a process of Flower or a warm worker, with threads, a GPU or a main module of its own. A job
and its answer are JSON on pipes of their own. If one fails, all of them end: the others would wait
for it for ever. If the starter dies its pipes close, and the processes end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fomoe_flwr.errors import RunError, one_line, reason_of

_GRACE_SECONDS = 1.0
"""How long others may take to tell what went wrong, after the first one did."""
_LOG_CHARACTERS = 2000
_DEFAULTS = {
    # One machine: nothing listens beyond it.
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    # Multicast needs rights that containers often lack, and fails only when first used.
    "NCCL_NVLS_ENABLE": "0",
}


class ProcessesError(RunError):
    """Processes that did not do their job; `kind` names the first one's error class."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class Processes:
    """`count` processes of `python -m module`, in which `serve` takes the jobs."""

    def __init__(self, module: str, count: int) -> None:
        self.count = count
        self.folder = Path(tempfile.mkdtemp(prefix="fomoe-ranks-"))
        """Private to this user; goes with the processes."""
        self._children: list[_Child] = []
        try:
            for rank in range(count):
                self._children.append(_Child(module, rank, count, self.folder))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Return the ids of the processes, first rank first."""
        return [child.process.pid for child in self._children]

    def is_alive(self) -> bool:
        """Tell whether all are there for another job."""
        return bool(self._children) and all(c.process.poll() is None for c in self._children)

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Give all of them a job and return the first one's answer.

        Raises ProcessesError, after ending all of them, if one raises or dies.
        """
        try:
            for child in self._children:
                child.give(job)
            answers = self._answers()
        except BaseException:
            self.close()
            raise
        return answers[0]

    def close(self) -> None:
        """End all processes now."""
        for child in self._children:
            child.end()
        self._children = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> dict[int, dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        failures: list[_Failure] = []
        deadline = 0.0
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.answers, selectors.EVENT_READ, child)
            while len(answers) + len(failures) < self.count:
                if failures and time.monotonic() > deadline:
                    break
                for event, _ in selector.select(0.1 if failures else None):
                    child = event.data
                    line = child.answers.readline()
                    answer = json.loads(line) if line.endswith("\n") else None
                    if answer is not None and "error" not in answer:
                        answers[child.rank] = answer
                    else:
                        deadline = deadline or time.monotonic() + _GRACE_SECONDS
                        failures.append(_Failure.of(child, answer))
                        selector.unregister(child.answers)
        if failures:
            # A killed process leaves no error. The first of the other errors names the cause.
            first = min(failures, key=lambda failure: failure.when)
            raise ProcessesError(f"process {first.rank} of {self.count} {first.text}", first.kind)
        return answers


class _Failure:
    def __init__(self, rank: int, when: float, text: str, kind: str) -> None:
        self.rank, self.when, self.text, self.kind = rank, when, text, kind

    @classmethod
    def of(cls, child: _Child, answer: Mapping[str, Any] | None) -> _Failure:
        if answer is not None:
            text = f"failed: {answer['text']}"
            return cls(child.rank, float(answer["time"]), text, str(answer["error"]))
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(_GRACE_SECONDS)
        code = child.process.poll()
        how = f"was ended by signal {-code}" if code and code < 0 else f"ended with status {code}"
        log = one_line(child.log_tail())
        return cls(child.rank, 0.0, f"{how}{': ' if log else ''}{log}", "")


class _Child:
    """One process and the pipes to it."""

    def __init__(self, module: str, rank: int, count: int, folder: Path) -> None:
        self.rank = rank
        self._log = folder / f"rank-{rank}.log"
        read_end, write_end = os.pipe()
        environment = _DEFAULTS | dict(os.environ)
        environment |= {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "FOMOE_RANK": str(rank),
            "FOMOE_RANKS": str(count),
            "FOMOE_RANKS_FOLDER": str(folder),
            "FOMOE_ANSWERS": str(write_end),
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[write_end],
                env=environment,
                text=True,
            )
        os.close(write_end)
        self.answers: IO[str] = os.fdopen(read_end, encoding="utf-8")

    def give(self, job: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        # If the process is dead already, the end of its answers will tell.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()

    def log_tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


class Seat:
    """One of these processes as it sees itself; read from its environment."""

    def __init__(self) -> None:
        self.rank = int(os.environ["FOMOE_RANK"])
        self.size = int(os.environ["FOMOE_RANKS"])
        self.folder = Path(os.environ["FOMOE_RANKS_FOLDER"])
        self._answers = os.fdopen(int(os.environ["FOMOE_ANSWERS"]), "w", encoding="utf-8")
        self._jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def next_job(self) -> dict[str, Any]:
        """Wait for a job. The process ends, even in the midst of one, when the starter does."""
        return self._jobs.get()

    def answer(self, fields: Mapping[str, Any]) -> None:
        """Tell that the job is done."""
        self._answers.write(json.dumps(dict(fields)) + "\n")
        self._answers.flush()

    def fail(self, error: BaseException) -> None:
        """Tell why the job is not done."""
        self.answer(
            {"error": type(error).__name__, "text": reason_of(error), "time": time.monotonic()}
        )

    def _listen(self) -> None:
        for line in sys.stdin:
            self._jobs.put(json.loads(line))
        os._exit(1)
