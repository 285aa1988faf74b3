"""Warm workers: real processes that take tasks, are killed, and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from flwr.app import RecordDict
from warm_post import ROOT, Post, assert_same, end_started, some_content, wait_for

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.server import serve
from fomoe_flwr.federation.warm import handover
from fomoe_flwr.federation.warm.contents import frame_of
from fomoe_flwr.federation.warm.frames import send
from fomoe_flwr.federation.warm.handover import NoWorkerError, TaskFailedError, hand_over
from fomoe_flwr.run.directory import RunDirectory


def test_a_task_goes_through_the_worker_and_back_unchanged(post: Post) -> None:
    process = post.start()
    for num_bytes in (8, 2**24):
        content = some_content(num_bytes)
        assert_same(hand_over("echo", content, post.context()), content)
    assert post.lines() == [f"{process.pid} echo 3 7 {{'state-dir': '/s'}}"] * 2


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


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_worker_that_is_stopped_is_replaced(
    busy: bool, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "SILENT_SECONDS", 4.0)
    first = post.start()

    def supervise() -> None:
        if busy:
            wait_for(lambda: post.lines())
            first.send_signal(signal.SIGSTOP)
        first.wait()
        post.start()

    if not busy:
        first.send_signal(signal.SIGSTOP)
    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    began = time.monotonic()
    content = some_content(2**21)  # More than a socket takes from one who waits for a reader.
    assert_same(hand_over("slow", content, post.context(seconds=0.5)), content)
    assert 3 < time.monotonic() - began < 20
    supervisor.join()
    assert first.returncode == -signal.SIGKILL
    assert f"warm worker {first.pid}: killed" in post.folder.log.read_text(encoding="utf-8")


def test_a_worker_that_waits_for_ever_is_replaced_and_one_that_computes_is_not(post: Post) -> None:
    first = post.start()

    def supervise() -> None:
        first.wait()
        post.start()

    supervisor = threading.Thread(target=supervise)
    supervisor.start()
    limit = {"worker-stuck-seconds": 5}
    assert_same(hand_over("hang", some_content(), post.context(**limit)), some_content())
    supervisor.join()
    assert first.returncode == -signal.SIGKILL
    _, second = post.processes
    grinding = post.context(seconds=9, **limit)
    assert_same(hand_over("grind", some_content(), grinding), some_content())
    assert second.poll() is None


def test_a_worker_that_is_at_a_task_when_its_round_is_over_is_replaced(post: Post) -> None:
    process = post.start()
    with pytest.raises(NoWorkerError, match="still at a task when its round was over"):
        hand_over("grind", some_content(), post.context(seconds=60), seconds=3.0)
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert len(post.lines()) == 1


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
    with pytest.raises(TaskFailedError, match=r"^not with me$"):
        hand_over("refuse", some_content(), post.context())
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    with pytest.raises(TaskFailedError, match="KeyError: 'a bug'"):
        hand_over("break_down", some_content(), post.context())
    assert process.wait(timeout=20) == 0


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
