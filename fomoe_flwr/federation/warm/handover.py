"""Flower's side: hand a message to the node's warm worker. Imports no torch.

The keys of a SuperNode's `--node-config`:

    worker-dir            the worker's folder; without it Flower's own process does the work
    worker-start          true (default): start a worker where none answers; false: wait for one
    worker-idle-seconds   how long a worker started here waits for its next task
    worker-stuck-seconds  how long a worker may compute nothing while a task waits (0: any time);
                          then it is replaced
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

import fomoe_flwr
from fomoe_flwr.errors import RunError, one_line, reason_of
from fomoe_flwr.federation.warm.contents import content_of, frame_of
from fomoe_flwr.federation.warm.folder import Folder
from fomoe_flwr.federation.warm.frames import (
    ClosedError,
    Frame,
    FrameError,
    SilentError,
    limit_silence,
    receive,
    send,
)
from fomoe_flwr.federation.warm.handshake import (
    BEAT,
    END,
    OtherCodeError,
    StrangerError,
    greet_as_giver,
    peer_pid,
)

CLIENT_APP_RAISED = 2
"""Flower's own code for an exception in a ClientApp."""
IN_PROCESS = "in-process"
"""Key of the node configuration of nodes that are in the server's process."""
START_SECONDS = 60.0
"""How long a worker may take until it listens, whether we or a supervisor started it."""
IDLE_SECONDS = 1800
STUCK_SECONDS = 600
SILENT_SECONDS = 60.0
"""Without a heartbeat for so long, a worker is taken for stopped, and replaced."""
MOST_TRIES = 2
"""A task whose worker died is given to its successor once."""

_POLL_SECONDS = 0.05
_LEAST_SHARE = 0.01
"""Whoever trains, reads or waits for a GPU uses more of a processor than this."""


class NoWorkerError(RunError):
    """No warm worker that takes the task."""


class TaskFailedError(RunError):
    """A task that the warm worker could not do; the text is its reason."""


def reply(kind: str, message: Message, context: Context) -> Message:
    """Answer a message of this kind (`query`, `train`); of an error, with its reason.

    Left to Flower, the reason would be an error's class or a traceback. Raises OSError in the
    server's process, which cannot go on without its disk either.
    """
    try:
        return Message(_answer(kind, message, context), reply_to=message)
    except Exception as error:
        if isinstance(error, OSError) and context.node_config.get(IN_PROCESS):
            raise
        if not isinstance(error, ValueError | RunError):
            traceback.print_exc()
        return Message(Error(CLIENT_APP_RAISED, reason_of(error)), reply_to=message)


def _answer(kind: str, message: Message, context: Context) -> RecordDict:
    content = message.content
    if context.node_config.get("worker-dir"):
        # What a query prepares serves the next run, too, however long it takes.
        limit = message.metadata.ttl if kind == "train" else math.inf
        return hand_over(kind, content, context, limit)
    from fomoe_flwr.federation.client import ANSWERS

    return ANSWERS[kind](content, context)


def hand_over(
    kind: str, content: RecordDict, context: Context, seconds: float = math.inf
) -> RecordDict:
    """Give a task to the node's warm worker and wait for its answer.

    After `seconds` nobody takes the answer. A worker that is still at the task is replaced then.
    Raises NoWorkerError, and TaskFailedError with the worker's reason.
    """
    door = _Door.of(context.node_config)
    fields = {
        "kind": kind,
        "run_id": context.run_id,
        "node_id": context.node_id,
        "node_config": context.node_config,
        "run_config": context.run_config,
    }
    task = frame_of(content, fields)
    deadline = time.monotonic() + seconds
    for _ in range(MOST_TRIES):
        with door.enter() as peer:
            try:
                reply = _exchange(peer, task, _Pulse(door.stuck_seconds, deadline))
            except (SilentError, _StuckError) as error:
                door.end_worker(peer, one_line(error))
                if time.monotonic() >= deadline:
                    raise NoWorkerError(f"the warm worker was {error}") from error
                continue
            except ClosedError:
                continue
        if "error" in reply.fields:
            raise TaskFailedError(str(reply.fields["error"]))
        return content_of(reply)
    raise NoWorkerError(
        f"the warm worker in {door.folder.path} died {MOST_TRIES} times over this task, see "
        f"{door.folder.log}"
    )


def _exchange(peer: socket.socket, task: Frame, pulse: _Pulse) -> Frame:
    """Wait for our turn, then for the answer, as long as the worker lives and moves."""
    pulse.until_frame(peer)
    send(peer, task)
    pulse.is_ours = True
    return pulse.until_frame(peer)


class _StuckError(FrameError):
    """A worker that lives and does nothing."""


class _Pulse:
    """What a worker's heartbeats tell: how much processor time it and its children have used."""

    is_ours = False
    """Whether the worker is at our task."""

    def __init__(self, stuck_seconds: float, deadline: float = math.inf) -> None:
        self._limit, self._deadline = stuck_seconds, deadline
        self._used = -math.inf
        self._since = 0.0

    def until_frame(self, peer: socket.socket) -> Frame:
        """Return the next frame that is no heartbeat. Raises SilentError and _StuckError."""
        while BEAT in (frame := receive(peer)).fields:
            self._feel(float(frame.fields[BEAT]), time.monotonic())
        return frame

    def _feel(self, used: float, now: float) -> None:
        if self.is_ours and now >= self._deadline:
            raise _StuckError("still at a task when its round was over")
        if used - self._used >= _LEAST_SHARE * self._limit or used < self._used:
            self._used, self._since = used, now
        elif self._limit and now - self._since > self._limit:
            raise _StuckError(
                f"busy for less than {_LEAST_SHARE:.0%} of {self._limit:g} s while a task waited"
            )


@dataclass(frozen=True)
class _Door:
    """The way to a node's worker."""

    folder: Folder
    may_start: bool
    idle_seconds: float
    stuck_seconds: float

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> _Door:
        return cls(
            Folder(str(node_config["worker-dir"])),
            bool(node_config.get("worker-start", True)),
            float(node_config.get("worker-idle-seconds", IDLE_SECONDS)),
            float(node_config.get("worker-stuck-seconds", STUCK_SECONDS)),
        )

    def enter(self) -> socket.socket:
        """Return a connection to a worker after the handshake; start or await one if needed."""
        if self.may_start:
            self.folder.create()
        else:
            self.folder.check()
        deadline = time.monotonic() + START_SECONDS
        started: subprocess.Popen[bytes] | None = None
        strangers = silences = 0
        problem: Exception
        while True:
            try:
                return self._greeted()
            except SilentError as error:
                # It is killed. Its successor gets its own time.
                silences += 1
                if silences > 1:
                    raise NoWorkerError(f"{self.folder.path}: a worker hangs: {error}") from error
                deadline, problem = time.monotonic() + START_SECONDS, error
            except OtherCodeError as error:
                if not self.may_start:
                    raise
                problem = error
            except StrangerError as error:
                # The token may have been that of an earlier worker.
                strangers += 1
                if strangers > 1:
                    raise
                problem = error
            except (OSError, FrameError) as error:
                problem = error
                if self.may_start and (started is None or started.poll() is not None):
                    started = self._start()
            if time.monotonic() >= deadline:
                raise NoWorkerError(
                    f"no warm worker answers in {self.folder.path} ({problem}): start one with "
                    f"`fomoe worker {self.folder.path}`, or see {self.folder.log}"
                ) from problem
            time.sleep(_POLL_SECONDS)

    def _greeted(self) -> socket.socket:
        token = self.folder.read_token()
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        limit_silence(peer, SILENT_SECONDS)
        try:
            peer.connect(str(self.folder.socket))
            greet_as_giver(peer, token)
        except SilentError:
            with peer:
                self.end_worker(peer, f"silent for {SILENT_SECONDS:g} s")
            raise
        except OtherCodeError:
            with peer:
                if self.may_start:
                    # It ends after the tasks that it has. One with our code takes its place.
                    _send_home(peer)
            raise
        except BaseException:
            peer.close()
            raise
        return peer

    def end_worker(self, peer: socket.socket, why: str) -> None:
        """Kill a worker that is stuck: nothing gentler reaches a process that is stopped."""
        pid = peer_pid(peer)
        if pid in (0, os.getpid()):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.folder.open_log() as log:
            log.write(f"{stamp} warm worker {pid}: killed, it was {why}\n".encode())

    def _start(self) -> subprocess.Popen[bytes]:
        # The very modules that run here: Flower unpacks them to a folder of its own.
        paths = [str(Path(fomoe_flwr.__file__).parents[1]), *filter(None, sys.path)]
        command = [sys.executable, "-m", "fomoe_flwr.cli", "worker", str(self.folder.path)]
        command += ["--idle-seconds", f"{self.idle_seconds:g}", "--with-process", str(os.getppid())]
        with self.folder.open_log() as log:
            return subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                cwd=self.folder.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Whoever ends Flower's process and its group shall not end the worker.
                start_new_session=True,
            )


def _send_home(peer: socket.socket) -> None:
    try:
        pulse = _Pulse(0)
        pulse.until_frame(peer)
        send(peer, Frame({"kind": END}))
        pulse.until_frame(peer)
    except FrameError:
        pass
