"""Warm workers: real processes that are killed, deceived and fought over."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.errors import InputError
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.server import serve
from fomoe_flwr.federation.warm import frames, handover
from fomoe_flwr.federation.warm import handshake as greeting
from fomoe_flwr.federation.warm.contents import content_of, frame_of
from fomoe_flwr.federation.warm.folder import Folder
from fomoe_flwr.federation.warm.frames import ClosedError, Frame, FrameError, receive, send
from fomoe_flwr.federation.warm.handover import NoWorkerError, TaskFailedError, hand_over
from fomoe_flwr.federation.warm.handshake import (
    OtherCodeError,
    StrangerError,
    greet_as_giver,
    greet_as_worker,
)
from fomoe_flwr.run.directory import RunDirectory

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
        assert receive(peer).fields == {"ready": True}
        return peer


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def post(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    # A short path: a socket's must fit into about a hundred bytes.
    post = Post(tmp_path_factory.mktemp("p"))
    yield post
    for process in post.processes:
        process.kill()
        process.wait()


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


def test_a_task_goes_through_the_worker_and_back_unchanged(post: Post) -> None:
    process = post.start()
    for num_bytes in (8, 2**24):
        content = some_content(num_bytes)
        assert_same(hand_over("echo", content, post.context()), content)
    assert post.lines() == [f"{process.pid} echo 3 7 {{'state-dir': '/s'}}"] * 2


def test_the_token_and_the_folder_are_for_their_owner_only(post: Post) -> None:
    post.start()
    folder = post.folder
    for path, mode in ((folder.path, 0o700), (folder.token, 0o600), (folder.socket, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    folder.path.chmod(0o750)
    with pytest.raises(InputError, match="mode 0700"):
        hand_over("echo", some_content(), post.context())
    with pytest.raises(InputError, match="mode 0700"):
        hand_over("echo", some_content(), post.context(**{"worker-start": True}))


@pytest.mark.parametrize(
    ("path", "reason"),
    [("relative/path", "absolute"), ("/tmp/" + "x" * 100, "too long for a socket")],
)
def test_a_folder_that_cannot_serve_is_refused(path: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Folder(path)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="must be a folder"):
        Folder(tmp_path / "link").create()


def test_who_does_not_know_the_token_is_turned_away(post: Post) -> None:
    post.start()
    right = post.folder.read_token()
    with post.connect() as peer, pytest.raises(StrangerError, match="the same token"):
        greet_as_giver(peer, b"0" * 64)
    post.folder.token.write_bytes(b"0" * 64)
    started = time.monotonic()
    with pytest.raises(StrangerError):
        hand_over("echo", some_content(), post.context())
    assert time.monotonic() - started < handover.START_SECONDS / 2
    post.folder.token.write_bytes(right)
    assert_same(hand_over("echo", some_content(), post.context()), some_content())


def test_a_worker_that_does_not_know_the_token_gets_no_task() -> None:
    worker, giver = socket.socketpair()

    def impostor() -> None:
        with contextlib.suppress(StrangerError, FrameError):
            greet_as_worker(worker, b"guessed")

    thread = threading.Thread(target=impostor)
    thread.start()
    with giver, pytest.raises(StrangerError):
        greet_as_giver(giver, b"right")
    thread.join()
    worker.close()


def test_a_proof_is_of_no_use_in_another_greeting() -> None:
    one = greeting._proof(b"t", "giver", "a", "b")
    assert one != greeting._proof(b"t", "worker", "a", "b")
    assert one != greeting._proof(b"t", "giver", "c", "b")
    assert one != greeting._proof(b"t", "giver", "a", "c")
    assert one != greeting._proof(b"u", "giver", "a", "b")


GARBAGE = {
    "random bytes": bytes(range(7, 250)),
    "no JSON": b"\0\0\0\4{{{{",
    "no object": b"\0\0\0\2[]",
    "no sizes": b"\0\0\0\2{}",
    "wrong sizes": b'\0\0\0\x0f{"sizes": [-1]}',
    "long header": b"\x7f\xff\xff\xff" + b"x" * 64,
    "bytes before a greeting": b'\0\0\0\x0f{"sizes": [99]}' + b"x" * 99,
    "deep": b"\0\0\x0f\xa0" + b"[" * 4000,
    "nothing": b"",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_turned_away_and_others_are_served(post: Post, garbage: bytes) -> None:
    process = post.start()
    with post.connect() as peer:
        with contextlib.suppress(BrokenPipeError):
            peer.sendall(garbage)
            peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ClosedError):
            while "proof" not in receive(peer).fields:
                pass
            raise AssertionError("a stranger was let in")
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    assert process.poll() is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff" + b"x" * 64,
        b'\0\0\0\x2a{"kind": "echo", "sizes": [4611686018427]}',
        b'\0\0\0\x1d{"kind": "echo", "sizes": []}',
        b'\0\0\0\x20{"kind": "\\u0000rm", "sizes": []}',
    ],
    ids=["long header", "more bytes than memory", "no records", "unknown kind"],
)
def test_garbage_after_the_greeting_is_refused_and_others_are_served(
    post: Post, garbage: bytes
) -> None:
    process = post.start()
    with post.enter() as peer:
        peer.sendall(garbage)
        with contextlib.suppress(ClosedError):
            assert "FrameError" in receive(peer).fields["error"]
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    assert process.poll() is None


def test_a_dawdler_does_not_hold_up_the_others_for_long(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    post.start()
    with post.connect() as dawdler:
        dawdler.sendall(b"\0")
        monkeypatch.setattr(greeting, "GREETING_SECONDS", 30.0)
        assert_same(hand_over("echo", some_content(), post.context()), some_content())


def test_records_that_are_none_are_refused() -> None:
    good = frame_of(some_content(), {})
    for fields in ({}, {"records": []}, {"records": {"arrays": {"a": {"b": ["x", [1], "y", 9]}}}}):
        with pytest.raises(FrameError, match="malformed"):
            content_of(Frame(fields, good.blobs))


def test_frames_have_limits() -> None:
    one, other = socket.socketpair()
    with one, other:
        send(one, Frame({"a": 1}, [b"12345"]))
        with pytest.raises(FrameError, match="5 bytes, at most 4"):
            receive(other, most_blob_bytes=4)
    one, other = socket.socketpair()
    with one, other:
        send(one, Frame({"a": "b" * 99}))
        with pytest.raises(FrameError, match="at most 50"):
            receive(other, most_header_bytes=50)
    one, other = socket.socketpair()
    with one, other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "MOST_HEADER_BYTES", 50)
        with pytest.raises(FrameError, match="at most 50"):
            send(one, Frame({"a": "b" * 99}))


def test_a_task_whose_worker_was_killed_goes_to_its_successor(post: Post) -> None:
    first = post.start()

    def supervise() -> None:
        first.wait()
        post.start()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    content = some_content()
    assert_same(hand_over("fragile", content, post.context(deaths=1)), content)
    supervisor.join()
    assert first.returncode == -signal.SIGKILL
    assert post.lines() == [f"{first.pid} dies"]


def test_a_task_that_kills_two_workers_is_given_up(post: Post) -> None:
    post.start()

    def supervise() -> None:
        for process in post.processes[:2]:
            process.wait()
            post.start()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    with pytest.raises(NoWorkerError, match="died 2 times over this task"):
        hand_over("fragile", some_content(), post.context(deaths=99))
    supervisor.join()
    assert len(post.lines()) == 2


def test_where_nobody_answers_the_operator_is_told(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "START_SECONDS", 0.3)
    post.folder.create()
    with pytest.raises(NoWorkerError, match="start one with `fomoe worker"):
        hand_over("echo", some_content(), post.context())


def test_two_tasks_at_once_are_done_one_after_the_other(post: Post) -> None:
    post.start()
    answers: list[RecordDict] = []

    def give() -> None:
        answers.append(hand_over("slow", some_content(), post.context(seconds=0.3)))

    givers = [threading.Thread(target=give) for _ in range(3)]
    for giver in givers:
        giver.start()
    for giver in givers:
        giver.join()
    assert len(answers) == 3
    assert [line.split()[1] for line in post.lines()] == ["begin", "end"] * 3


def test_a_folder_has_one_worker(post: Post) -> None:
    first = post.start()
    command = [sys.executable, "-m", "fomoe_flwr.cli", "worker", str(post.folder.path)]
    second = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    assert second.stderr.startswith("error: a warm worker lives in")
    assert len(second.stderr.splitlines()) == 1
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    assert first.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_that_is_told_to_end_leaves_nothing(
    post: Post, number: signal.Signals, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = post.start()
    failures: list[BaseException] = []

    def give() -> None:
        try:
            hand_over("slow", some_content(), post.context(seconds=30))
        except NoWorkerError as error:
            failures.append(error)

    giver = threading.Thread(target=give)
    if busy:
        monkeypatch.setattr(handover, "START_SECONDS", 0.5)
        giver.start()
        wait_for(lambda: post.lines())
    process.send_signal(number)
    assert process.wait(timeout=20) == 0
    if busy:
        giver.join()
        assert len(failures) == 1
    left = sorted(path.name for path in post.folder.path.iterdir())
    assert left == ["lock"]


def test_an_idle_worker_ends(post: Post) -> None:
    process = post.start(idle_seconds=0.2)
    assert process.wait(timeout=20) == 0


def test_a_worker_ends_with_the_process_that_it_serves(post: Post) -> None:
    served = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = post.start(with_process=served.pid)
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    served.kill()
    served.wait()
    assert process.wait(timeout=20) == 0


def test_a_worker_whose_task_giver_is_gone_ends(post: Post) -> None:
    process = post.start()
    peer = post.enter()
    fields = {
        "kind": "slow",
        "run_id": 1,
        "node_id": 1,
        "node_config": {"notes": str(post.notes), "seconds": 60},
        "run_config": {},
    }
    send(peer, frame_of(some_content(), fields))
    wait_for(lambda: post.lines())
    peer.close()
    assert process.wait(timeout=20) == 0


def test_a_bad_message_does_not_end_the_worker_and_a_bug_does(post: Post) -> None:
    process = post.start()
    with pytest.raises(TaskFailedError, match=r"^ValueError: not with me$"):
        hand_over("refuse", some_content(), post.context())
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    with pytest.raises(TaskFailedError, match="KeyError: 'a bug'"):
        hand_over("break_down", some_content(), post.context())
    assert process.wait(timeout=20) == 0


def test_a_worker_of_other_code_is_reported(post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    process = post.start()
    monkeypatch.setattr(greeting, "code", lambda: {"version": "9.9", "digest": "beef"})
    with pytest.raises(OtherCodeError, match=r"this ClientApp 9\.9 .*install the same version"):
        hand_over("echo", some_content(), post.context())
    assert process.poll() is None


def test_the_code_has_a_version_and_a_digest_that_its_modules_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fomoe_flwr

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(fomoe_flwr, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(greeting, "code", greeting.code.__wrapped__)
    before = greeting.code()
    assert before == greeting.code()
    assert before["version"] == fomoe_flwr.__version__
    (package / "more.py").write_text("a = 1\n")
    middle = greeting.code()
    (package / "more.py").write_text("a = 2\n")
    assert len({before["digest"], middle["digest"], greeting.code()["digest"]}) == 3


def test_a_worker_of_other_code_that_we_may_replace_is_replaced(post: Post) -> None:
    old = post.start()
    context = post.context(**{"worker-start": True, "worker-idle-seconds": 60})
    try:
        with pytest.MonkeyPatch.context() as patch:
            # The old one was started with modules that have since been changed.
            inner = greeting.code()
            patch.setattr(greeting, "code", lambda: {**inner, "digest": "beef"})
            with pytest.raises(OtherCodeError):
                handover._Door.of(context.node_config)._greeted()
        assert old.wait(timeout=20) == 0
        # In its place the real one, which knows no echo.
        with pytest.raises(TaskFailedError, match="not one of query, train"):
            hand_over("echo", some_content(), context)
    finally:
        end_started(post.folder)


def end_started(folder: Folder) -> None:
    """End workers that were started on demand in a folder; they are nobody's children."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "worker" in words and str(folder.path) in words:
            process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(20)


def test_a_client_app_with_a_warm_worker_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "hydra", "omegaconf", "datasets", "pandas")
    script = f"import client_app, sys; print([n for n in {heavy!r} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.strip() == "[]"


def tiny(small_text: Path, output_dir: Path) -> Settings:
    return load_settings(
        [
            "preset=tiny",
            f"data.path={small_text}",
            f"output_dir={output_dir}",
            "eval.sample_tokens=0",
            "local.threads=1",
        ]
    )


def test_a_run_with_a_warm_worker_is_the_run_without_bit_by_bit(
    small_text: Path, tmp_path: Path, post: Post
) -> None:
    runs = []
    try:
        for name in ("warm", "here"):
            settings = tiny(small_text, tmp_path / name)
            workers = RunDirectory(tmp_path / name).workers
            grid = InProcessGrid(client_app, settings.layout.num_workers, workers)
            for context in grid._contexts.values():
                if name == "warm":
                    context.node_config["worker-dir"] = str(post.folder.path)
                    context.node_config["worker-idle-seconds"] = 60
            torch.set_num_threads(1)
            serve(settings, lambda run, grid=grid: grid)  # type: ignore[misc]
            runs.append(RunDirectory(tmp_path / name).read_metrics())
        log = post.folder.log.read_text(encoding="utf-8")
    finally:
        end_started(post.folder)
    warm, here = runs
    assert len(warm) == len(here) == 2
    for got, want in zip(warm, here, strict=True):
        for key in ("eval/loss", "train/loss", "train/grad_norm", "comm/bytes_up"):
            assert got[key] == want[key], key
    # One process did it all: two queries and two tasks in each of two rounds.
    assert log.count("query: done") == 2
    assert log.count("train: done") == 4
    assert log.count("waiting in") == 1
