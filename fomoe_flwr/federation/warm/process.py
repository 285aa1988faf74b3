"""The warm worker: a process that takes one task at a time and keeps what tasks share."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import psutil
from flwr.app import Context, RecordDict

from fomoe_flwr.errors import RunError, one_line, reason_of
from fomoe_flwr.events import tell
from fomoe_flwr.federation.warm.contents import content_of, frame_of
from fomoe_flwr.federation.warm.folder import Folder
from fomoe_flwr.federation.warm.frames import Frame, FrameError, receive, send, send_short
from fomoe_flwr.federation.warm.handshake import BEAT, END, StrangerError, code, greet_as_worker
from fomoe_flwr.worker.heap import prefer_large_pages

Answer = Callable[[RecordDict, Context], RecordDict]

_WAITING_ROOM = 16
"""Task givers that may wait after the handshake; more are turned away."""
_POLL_SECONDS = 1.0
BEAT_SECONDS = 2.0
_CHILDREN_BEATS = 15
"""Children are looked at once in so many heartbeats: to find them takes a moment."""


def run_warm_worker(
    folder: Folder,
    idle_seconds: float = 0,
    with_process: int = 0,
    answers: Mapping[str, Answer] | None = None,
) -> None:
    """Take tasks until told to end (SIGTERM, SIGINT), idle for too long, or left alone.

    `idle_seconds=0` waits forever. The worker ends with the process `with_process`, because nobody
    else gives it tasks; 0 names none. Raises InputError if the folder is not ours or another worker
    has it.
    """
    prefer_large_pages()
    folder.create()
    version = code()["version"]  # read now: the modules that are running, not later ones
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
    with folder.occupied(), _listening(folder) as listener:
        token = folder.new_token()
        waiting: queue.Queue[_Guest] = queue.Queue(_WAITING_ROOM)
        guests: set[_Guest] = set()
        _beside(_let_in, listener, token, waiting, guests)
        _beside(_beat, guests)
        if with_process:
            _beside(_end_with, with_process)
        _say(f"waiting in {folder.path}, fomoe-flwr {version}")
        # Imported before the first task comes, because the imports take seconds.
        if answers is not None:
            _work(waiting, guests, answers, idle_seconds)
        else:
            _work_with_memory(waiting, guests, idle_seconds)
    _say("done")


def _work_with_memory(
    waiting: queue.Queue[_Guest], guests: set[_Guest], idle_seconds: float
) -> None:
    """Answer as every node does, and keep workers' states in memory meanwhile."""
    from fomoe_flwr.federation.client import ANSWERS
    from fomoe_flwr.worker.delay import DELAYED
    from fomoe_flwr.worker.state_store import STATES

    def settled(answer: Answer, content: RecordDict, context: Context) -> RecordDict:
        given = answer(content, context)
        # The server's next checkpoint relies on it.
        STATES.settle()
        return given

    answers = {kind: partial(settled, answer) for kind, answer in ANSWERS.items()}
    with STATES.in_memory():
        try:
            _work(waiting, guests, answers, idle_seconds, DELAYED.take)
        finally:
            STATES.write_all()


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def _beside(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


@contextmanager
def _listening(folder: Folder) -> Iterator[socket.socket]:
    """Listen on the folder's socket; whoever comes before there is a token will try again."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder.leave()
    try:
        before = os.umask(0o177)
        try:
            listener.bind(str(folder.socket))
        finally:
            os.umask(before)
        listener.listen(_WAITING_ROOM)
        yield listener
    finally:
        folder.leave()
        listener.close()


@dataclass(eq=False)
class _Guest:
    """A task giver after the handshake."""

    peer: socket.socket
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that sends to it."""

    def send(self, frame: Frame) -> None:
        """Send a frame. Raises ClosedError."""
        with self.turn:
            send(self.peer, frame)


def _beat(guests: set[_Guest]) -> None:
    """Tell everybody who waits that this process lives, and what it computes."""
    children, beats = 0.0, 0
    while True:
        time.sleep(BEAT_SECONDS)
        if beats % _CHILDREN_BEATS == 0:
            children = _seconds_of_children()
        beats += 1
        # Without this thread's own time: it would look like work.
        used = time.process_time() - time.thread_time() + children
        for guest in list(guests):
            # Whoever is being sent something hears that anyway.
            if guest.turn.acquire(blocking=False):
                send_short(guest.peer, {BEAT: used})
                guest.turn.release()


def _seconds_of_children() -> float:
    """Return the processor time of all processes below this one; of those that ended, too."""
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


def _let_in(
    listener: socket.socket, token: bytes, waiting: queue.Queue[_Guest], guests: set[_Guest]
) -> None:
    """Greet whoever comes, one after the other; strangers are turned away."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        try:
            greet_as_worker(peer, token)
            guest = _Guest(peer)
            if waiting.full():
                raise StrangerError("too many wait")
            guests.add(guest)
            waiting.put(guest)
        except (FrameError, StrangerError) as error:
            _say(f"turned a peer away: {one_line(error)}")
            peer.close()


def _work(
    waiting: queue.Queue[_Guest],
    guests: set[_Guest],
    answers: Mapping[str, Answer],
    idle_seconds: float,
    go_on: Callable[[], object] = lambda: None,
) -> None:
    """Do one task after the other; `go_on` is what can be done of the next before it is there."""
    while True:
        try:
            guest = waiting.get(timeout=idle_seconds or None)
        except queue.Empty:
            _say(f"idle for {idle_seconds:g} s")
            return
        with guest.peer as peer:
            try:
                guest.send(Frame({"ready": True}))
                task = receive(peer)
                if task.fields.get("kind") == END:
                    _say("told to end")
                    return
                is_sound = _do(guest, task, answers)
            except FrameError as error:
                _say(f"lost a task giver: {one_line(error)}")
                continue
            finally:
                guests.discard(guest)
        if not (is_sound and _is_done(go_on)):
            _say("ends after an error that may have left anything behind")
            return


def _is_done(go_on: Callable[[], object]) -> bool:
    """Call, and tell whether this process may take another task. The next task tells an error."""
    started = time.monotonic()
    try:
        done = go_on()
    except Exception as error:
        _say(f"ahead: {reason_of(error)}")
        if not isinstance(error, ValueError | RunError):
            traceback.print_exc()
            return False
        return True
    if done is not None:
        _say(f"ahead: done ({time.monotonic() - started:.2f} s)")
    return True


def _do(guest: _Guest, task: Frame, answers: Mapping[str, Answer]) -> bool:
    """Do a task and send its answer; return whether this process may take another one."""
    started, kind, is_sound = time.monotonic(), task.fields.get("kind"), True
    with _alive_with(guest.peer):
        try:
            answer = answers.get(str(kind))
            if answer is None:
                raise FrameError(f"a task of kind {kind!r} is not one of {', '.join(answers)}")
            context, content = _context_of(task), [content_of(task)]
            # Now only `content` holds the bytes, so the answer can free them.
            task.blobs.clear()
            reply = frame_of(answer(content.pop(), context), {})
        except Exception as error:  # the waiting task giver must hear of every error
            reply = Frame({"error": reason_of(error)})
            # A CUDA error poisons the process, a bug may have done so.
            is_sound = isinstance(error, ValueError | RunError)
            if not is_sound:
                traceback.print_exc()
    guest.send(reply)
    took = time.monotonic() - started
    _say(f"{kind}: {reply.fields.get('error', 'done')} ({took:.2f} s)")
    return is_sound


def _context_of(task: Frame) -> Context:
    fields = task.fields
    try:
        return Context(
            run_id=int(fields["run_id"]),
            node_id=int(fields["node_id"]),
            node_config=dict(fields["node_config"]),
            run_config=dict(fields["run_config"]),
            state=RecordDict(),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FrameError(f"a task's context is malformed: {error}") from error


@contextmanager
def _alive_with(peer: socket.socket) -> Iterator[None]:
    """End this process if the task giver hangs up: nobody waits for the answer any more.

    In that case Flower has ended its own process. The run was stopped, or another round may have
    begun, and a worker that is still busy with the old task would only delay it.
    """
    done = threading.Event()

    def watch() -> None:
        poller = select.poll()
        poller.register(peer, select.POLLHUP | select.POLLERR)
        while not done.is_set():
            if poller.poll(100):
                if not done.is_set():
                    _say("the task giver is gone")
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = _beside(watch)
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _end_with(pid: int) -> None:
    """End this process with another one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        other = psutil.Process(pid)
        while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_SECONDS)
    _say(f"process {pid} is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def _say(text: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    tell("worker", f"{stamp} warm worker {os.getpid()}: {text}", pid=os.getpid(), text=text)
