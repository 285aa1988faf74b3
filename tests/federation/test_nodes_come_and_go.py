"""Nodes that die, hang, lose their network, return or join, on a grid that works like Flower's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from federated import Federation, use_made_up_data, use_no_training
from flower_grid import FIRST_NODE, FlowerGrid
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from micro import micro

from fomoe_flwr.errors import RunError
from fomoe_flwr.federation import node_grid, waiting

BAD = 1
OFFLINE = 2.0
TIMEOUT = 3.0
LATE = "no reply before the round's deadline"
LOST = "its node came back without this task"
GONE = f"its node is out of touch for federation.offline_seconds={OFFLINE:g}"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    use_made_up_data(monkeypatch)
    use_no_training(monkeypatch)
    monkeypatch.setattr(node_grid, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(node_grid, "_PULL_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "_ARRIVAL_SECONDS", 0.5)


def later(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def federation(folder: Path, *overrides: str) -> tuple[Federation, FlowerGrid]:
    words = [
        f"federation.round_timeout_seconds={TIMEOUT}",
        f"federation.offline_seconds={OFFLINE}",
        "layout.rehome_after=9",
        "layout.overlap=3",
        "rounds=2",
    ]
    made = Federation(micro(*words, *overrides), folder)
    made.grid = FlowerGrid(folder, 3)  # type: ignore[assignment]
    return made, made.grid  # type: ignore[return-value]


def dies_before_its_reply(grid: FlowerGrid) -> None:
    grid.kill(BAD)


def dies_in_its_upload(grid: FlowerGrid) -> None:
    grid.worker(BAD).upload_seconds = 60


def dies_in_its_upload_and_returns(grid: FlowerGrid) -> None:
    dies_in_its_upload(grid)
    later(0.4, lambda: grid.kill(BAD))
    later(0.6, lambda: grid.start(BAD))
    later(0.6, lambda: setattr(grid.worker(BAD), "upload_seconds", 0))


def uploads_slowly(grid: FlowerGrid) -> None:
    grid.worker(BAD).upload_seconds = 0.8


def works_long(grid: FlowerGrid) -> None:
    grid.worker(BAD).work_seconds = 0.8


def loses_its_network(grid: FlowerGrid) -> None:
    """Work goes on meanwhile, and what is ready is sent when the network is back."""
    grid.worker(BAD).work_seconds = 0.5
    later(0.1, lambda: grid.silence(BAD))
    later(1.6, lambda: grid.hear(BAD))


def is_started_anew(grid: FlowerGrid) -> None:
    grid.worker(BAD).work_seconds = 60
    later(0.3, lambda: grid.kill(BAD))
    later(0.6, lambda: grid.start(BAD))
    later(0.6, lambda: setattr(grid.worker(BAD), "work_seconds", 0))


def is_started_anew_unseen(grid: FlowerGrid) -> None:
    """Between two looks, so that it never seems to be away."""

    def act() -> None:
        grid.worker(BAD).work_seconds = 0
        grid.kill(BAD)
        grid.start(BAD)

    grid.worker(BAD).work_seconds = 60
    later(0.3, act)


KINDS = {
    dies_before_its_reply: (OFFLINE, GONE, "no node plays this worker"),
    dies_in_its_upload: (TIMEOUT, LATE, "still at its task of round 1"),
    dies_in_its_upload_and_returns: (1.1, LOST, ""),
    uploads_slowly: (0.8, "", ""),
    works_long: (0.8, "", ""),
    loses_its_network: (1.6, "", ""),
    is_started_anew: (0.6, LOST, ""),
    is_started_anew_unseen: (0.3, LOST, ""),
}
"""What happens in round 1 -> its seconds, and why the worker is left out of rounds 1 and 2."""


@pytest.mark.parametrize("grace", [0, 30])
@pytest.mark.parametrize("happens", KINDS, ids=lambda kind: kind.__name__)
def test_a_round_ends_in_time_and_counts_what_arrives(
    happens: Callable[[FlowerGrid], None], grace: float, tmp_path: Path
) -> None:
    run, grid = federation(tmp_path, f"federation.grace_seconds={grace}")
    seconds, *reasons = KINDS[happens]

    def on_task(node: int, number: int) -> None:
        if (node, number) == (FIRST_NODE + BAD, 1):
            happens(grid)

    def after(record: object) -> None:
        ended.append(time.monotonic())

    grid.on_task, run.after_round = on_task, after
    ended = [time.monotonic()]
    run.run()
    for snapshot, reason in zip(run.rounds, reasons, strict=True):
        assert snapshot.record.failures == ({BAD: reason} if reason else {})
        assert sorted(snapshot.record.replies) == ([0, 2] if reason else [0, 1, 2])
    assert seconds - 0.5 <= ended[1] - ended[0] <= seconds + 1.5


def test_a_node_that_joins_during_a_round_takes_part_in_the_next(tmp_path: Path) -> None:
    run, grid = federation(tmp_path, "federation.start_workers=2", "rounds=3")
    grid.silence(BAD, ago=9)
    grid.worker(0).work_seconds = 1.0

    def on_task(node: int, number: int) -> None:
        if (node, number) == (FIRST_NODE, 1):
            later(0.3, lambda: grid.start(BAD))

    grid.on_task = on_task
    run.run()
    assert [sorted(s.record.replies) for s in run.rounds] == [[0, 2], [0, 1, 2], [0, 1, 2]]


def test_a_node_that_joins_while_the_server_evaluates_takes_part_in_the_next_round(
    tmp_path: Path,
) -> None:
    run, grid = federation(tmp_path, "federation.start_workers=2", "rounds=3")
    grid.silence(BAD, ago=9)

    def evaluate(record: object) -> None:
        grid.start(BAD)
        time.sleep(1)

    run.after_round = evaluate
    run.run()
    assert [sorted(s.record.replies) for s in run.rounds] == [[0, 2], [0, 1, 2], [0, 1, 2]]


def test_a_late_reply_of_a_slow_upload_is_counted_as_late_and_the_worker_is_free_again(
    tmp_path: Path,
) -> None:
    words = ["federation.grace_seconds=0.5", "federation.min_workers=2", "rounds=5"]
    run, grid = federation(tmp_path, *words)
    grid.worker(0).work_seconds = grid.worker(2).work_seconds = 0.6

    def on_task(node: int, number: int) -> None:
        if node == FIRST_NODE + BAD:
            grid.worker(BAD).upload_seconds = 1.5 if number == 1 else 0

    grid.on_task = on_task
    run.run()
    records = [s.record for s in run.rounds]
    assert BAD not in records[0].replies
    assert BAD in records[-1].replies
    assert sum(record.late_replies for record in records) == 1


def test_an_error_of_the_grid_ends_the_run(tmp_path: Path) -> None:
    run, grid = federation(tmp_path)

    def broken(message_ids: object) -> list[object]:
        raise ConnectionError("no SuperLink")

    run.grid = grid  # type: ignore[assignment]
    grid.on_task = lambda node, number: setattr(grid, "pull_messages", broken)
    with pytest.raises(ConnectionError, match="no SuperLink"):
        run.run()


@pytest.mark.parametrize("refusals", [1, len(node_grid._PUSH_PAUSES)])
def test_a_superlink_too_busy_to_store_a_task_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    made, grid = federation(tmp_path)
    refuse(grid, refusals, monkeypatch)
    run = made.run()
    assert [sorted(s.record.replies) for s in run.rounds] == [[0, 1, 2], [0, 1, 2]]


def test_a_superlink_that_stores_nothing_ends_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, grid = federation(tmp_path)
    refuse(grid, 1000, monkeypatch)
    with pytest.raises(RunError, match="did not store a message in 6 attempts") as caught:
        made.run()
    assert "\n" not in str(caught.value)


def refuse(grid: FlowerGrid, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the grid fail to store objects of messages, as a SuperLink with a busy database does."""
    left, store = [times], grid.push_messages

    def push(messages: list[Message]) -> list[str]:
        if left[0]:
            left[0] -= 1
            raise ObjectPushError("an object", 1, "a session")
        return list(store(messages))

    monkeypatch.setattr(grid, "push_messages", push)
    monkeypatch.setattr(node_grid, "_PUSH_PAUSES", (0.0,) * len(node_grid._PUSH_PAUSES))
