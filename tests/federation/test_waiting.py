"""When a round closes, and what becomes of workers that answer later, or never."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from federated import CountingGrid, Federation, assert_identical, use_made_up_data
from flwr.app import Message, MessageType
from micro import micro

from fomoe_flwr.federation import wire
from fomoe_flwr.federation.strategy import FederationError

Delay = Callable[[int, int], float]
"""(round, worker) -> seconds until its reply is there."""
NEVER = 1e9


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowGrid(CountingGrid):
    """Workers that take their time; what was asked of them is done when it is due."""

    works_when_asked = False

    def __init__(self, folder: Path, num_nodes: int, clock: Clock, delay: Delay) -> None:
        super().__init__(folder, num_nodes)
        self.clock, self.delay = clock, delay
        self.due: dict[str, float] = {}
        self.pulled: list[int] = []
        self.asked: list[tuple[int, int]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            if message.metadata.message_type == MessageType.TRAIN:
                words = wire.json_in(message.content, wire.TASK)
                place = words["server_round"], words["worker"]
                self.asked.append(place)
                self.due[message_id] = self.clock.now + self.delay(*place)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [i for i in message_ids if self.due.get(i, 0.0) <= self.clock.now]
        arrived = list(super().pull_messages(ready))
        self.pulled += [self._places[i][1] for i in ready if i in self.due and arrived]
        return arrived


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from fomoe_flwr.federation import strategy, waiting

    use_made_up_data(monkeypatch)
    clock = Clock()
    patched = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    for module in (strategy, waiting):
        monkeypatch.setattr(module, "time", patched)
    return clock


def federation(folder: Path, clock: Clock, delay: Delay, *overrides: str) -> Federation:
    made = Federation(micro(*overrides), folder)
    made.grid = SlowGrid(folder, 3, clock, delay)
    return made


def test_without_a_grace_period_a_round_waits_for_everybody_in_worker_order(
    tmp_path: Path, clock: Clock
) -> None:
    slow = federation(tmp_path, clock, lambda r, w: 30.0 - 10 * w, "federation.min_workers=1")
    slow.run()
    assert [sorted(s.record.replies) for s in slow.rounds] == [[0, 1, 2]] * 2
    assert slow.grid.pulled == [0, 1, 2] * 2
    assert 60 <= clock.now < 61


def test_a_quorum_and_a_grace_period_close_a_round(tmp_path: Path, clock: Clock) -> None:
    def delay(server_round: int, worker: int) -> float:
        return {0: NEVER, 1: 20.0, 2: 10.0}[worker]

    limits = ["federation.min_workers=2", "federation.grace_seconds=5", "rounds=1"]
    run = federation(tmp_path, clock, delay, *limits).run()
    (only,) = run.rounds
    assert sorted(only.record.replies) == [1, 2]
    assert only.record.failures == {0: "no reply before the round's deadline"}
    assert run.grid.pulled == [2, 1]
    assert 25 <= clock.now < 26


def test_the_deadline_closes_a_round_without_a_quorum_and_the_run_says_so(
    tmp_path: Path, clock: Clock
) -> None:
    limits = [
        "federation.min_workers=2",
        "federation.grace_seconds=5",
        "federation.round_timeout_seconds=40",
    ]
    with pytest.raises(FederationError, match="1 of 3 workers replied"):
        federation(tmp_path, clock, lambda r, w: 1.0 if w == 1 else NEVER, *limits).run()
    assert 40 <= clock.now < 42


@pytest.mark.parametrize("grace", ["0", "5"])
def test_at_the_deadline_replies_behind_a_silent_worker_count(
    grace: str, tmp_path: Path, clock: Clock
) -> None:
    limits = [
        "federation.round_timeout_seconds=40",
        f"federation.grace_seconds={grace}",
        "federation.min_workers=2",
        "rounds=1",
    ]
    run = federation(tmp_path, clock, lambda r, w: NEVER if w == 0 else 1.0, *limits).run()
    assert sorted(run.rounds[0].record.replies) == [1, 2]


def test_a_late_reply_is_dropped_and_counted_and_its_worker_comes_back(
    tmp_path: Path, clock: Clock
) -> None:
    def delay(server_round: int, worker: int) -> float:
        return 18.0 if (server_round, worker) == (2, 1) else 10.0

    limits = ["federation.min_workers=2", "federation.grace_seconds=5", "rounds=5"]
    limits += ["layout.rehome_after=0", "layout.overlap=3"]
    run = federation(tmp_path, clock, delay, *limits).run()
    records = [snapshot.record for snapshot in run.rounds]
    assert [sorted(r.replies) for r in records] == [[0, 1, 2], [0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert records[1].failures == {1: "no reply before the round's deadline"}
    assert records[2].failures == {1: "still at its task of round 2"}
    assert sum(r.late_replies for r in records) == 1
    assert [r.rejoined for r in records] == [set(), set(), set(), {1}, set()]
    # It was not asked while it was at work, and it kept the state of the round that came too late.
    assert (3, 1) not in run.grid.asked
    assert records[3].replies[1]["fresh_state"] == 0

    def lost(server_round: int, worker: int) -> float:
        return NEVER if (server_round, worker) in ((2, 1), (3, 1)) else 1.0

    # What it answered changed nothing: the weights are those of a run in which it never did.
    never = federation(tmp_path / "never", Clock(), lost, *limits)
    never.grid.clock = clock
    never.run()
    assert_identical(run.rounds[2].state, never.rounds[2].state)


def test_a_worker_that_answers_late_is_counted_on_again_at_once(
    tmp_path: Path, clock: Clock
) -> None:
    def delay(server_round: int, worker: int) -> float:
        return 38.0 if (server_round, worker) == (2, 1) else 10.0

    limits = ["federation.min_workers=2", "federation.grace_seconds=5", "rounds=6"]
    run = federation(tmp_path, clock, delay, *limits, "layout.rehome_after=2").run()
    records = [snapshot.record for snapshot in run.rounds]
    assert [r.absent for r in records] == [(), (), (), (1,), (1,), ()]
    assert [1 in r.replies for r in records] == [True, False, False, False, False, True]


def test_nobody_rests_when_there_is_no_quorum_without_him(tmp_path: Path, clock: Clock) -> None:
    limits = ["federation.min_workers=3", "federation.round_timeout_seconds=40", "rounds=1"]
    run = federation(tmp_path, clock, lambda r, w: 1.0, *limits)
    attendance = run.strategy.round_state.attendance
    run.strategy.seats.gather(run.grid)
    attendance.missed, attendance.resting = {1: 3}, {1: 9}
    run.strategy._begin = lambda: None  # type: ignore[method-assign]
    run.run()
    assert sorted(run.rounds[0].record.replies) == [0, 1, 2]


def test_a_round_waits_for_busy_workers_when_too_few_are_free(tmp_path: Path, clock: Clock) -> None:
    def delay(server_round: int, worker: int) -> float:
        return 100.0 if server_round == 1 and worker else 1.0

    limits = ["federation.min_workers=1", "federation.grace_seconds=5"]
    first = federation(tmp_path, clock, delay, *limits)
    first.strategy._waiting.limits.min_workers = 1

    def ask_for_all(record: object) -> None:
        first.settings.federation.min_workers = 3

    first.after_round = ask_for_all
    first.run()
    assert sorted(first.rounds[0].record.replies) == [0]
    assert sorted(first.rounds[1].record.replies) == [0, 1, 2]
    assert first.rounds[1].record.late_replies == 2
    assert 100 <= clock.now < 104
