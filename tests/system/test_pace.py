"""Unequal sites: a round gives every worker its seconds, and so its own number of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from federated import Federate, Federation, assert_identical
from micro import micro

from fomoe_flwr.config import SettingsError
from fomoe_flwr.federation.pace import steps_at
from fomoe_flwr.federation.round_state import RoundState
from fomoe_flwr.worker.optimizer import learning_rate
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer

pytestmark = pytest.mark.usefixtures("made_up_data")

UNEQUAL = ["local.round_seconds=2", "local.speeds=[3,1.5,0.2]", "local.steps=4"]


@pytest.mark.parametrize("outer", ["nesterov", "local_adamw"])
def test_equal_speeds_are_no_speeds(outer: str, federate: Federate) -> None:
    words = [f"outer={outer}", "rounds=3", "local.steps=4"]
    plain = federate(*words)
    paced = federate(*words, "local.round_seconds=2", "local.speeds=[2,2,2]")
    assert_identical(paced.state, plain.state)
    assert_identical(paced.outer.tensors(), plain.outer.tensors())


def test_every_worker_takes_the_steps_of_its_speed_and_passes_through_the_same_rates(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, rates = LocalTrainer._set_rate, dict[int, list[float]]()

    def note(self: Any, step: float) -> float:
        rate = inner(self, step)
        rates.setdefault(self.batches.worker, []).append(rate)
        return rate

    monkeypatch.setattr(LocalTrainer, "_set_rate", note)
    federation = federate("outer=nesterov", "rounds=3", *UNEQUAL)
    local, tokens = federation.settings.local, federation.settings.tokens_per_worker_step
    for snapshot in federation.rounds:
        sent = {w: reply["tokens"] / tokens for w, reply in snapshot.record.replies.items()}
        assert sent == {0: 6, 1: 3, 2: 1}
        row = snapshot.record.metrics_row()
        assert row["train/tokens"] == 10 * tokens
        assert row["round/worker_tokens"] == {str(w): int(n * tokens) for w, n in sent.items()}
    for worker, steps in {0: 6, 1: 3, 2: 1}.items():
        want = [
            learning_rate(local, 4 * done + 4 * step / steps, 12)
            for done in range(3)
            for step in range(steps)
        ]
        assert rates[worker] == pytest.approx(want)


def test_text_goes_on_where_a_worker_really_stopped(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, read = LocalTrainer.train, dict[int, list[int]]()

    def note(self: Any, num_steps: int, span: int | None = None) -> LocalReport:
        begun = self.batches.position
        report = inner(self, num_steps, span)
        read.setdefault(self.batches.worker, []).extend(range(begun, self.batches.position))
        return report

    monkeypatch.setattr(LocalTrainer, "train", note)
    federate("outer=average", "rounds=3", *UNEQUAL)
    assert read == {0: list(range(18)), 1: list(range(9)), 2: list(range(3))}


def test_without_speeds_the_last_reply_says_them(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = LocalTrainer.train

    def timed(self: Any, num_steps: int, span: int | None = None) -> LocalReport:
        report = inner(self, num_steps, span)
        return replace(report, seconds=num_steps / (1, 2, 8)[self.batches.worker])

    monkeypatch.setattr(LocalTrainer, "train", timed)
    federation = federate("outer=average", "rounds=3", "local.steps=4", "local.round_seconds=3")
    tokens = federation.settings.tokens_per_worker_step
    steps = [
        [reply["tokens"] / tokens for _, reply in sorted(s.record.replies.items())]
        for s in federation.rounds
    ]
    assert steps == [[4, 4, 4], [3, 6, 24], [3, 6, 24]]
    state = federation.strategy.round_state
    again = RoundState.from_json(state.to_json(), federation.settings.layout)
    assert again.speeds == state.speeds == {0: 1, 1: 2, 2: 8}


@pytest.mark.parametrize(
    ("speed", "seconds", "steps"), [(0.1, 30, 3), (0.01, 30, 1), (2.5, 3, 7), (1e9, 1e9, 2**20)]
)
def test_steps_are_whole_at_least_one_and_bounded(speed: float, seconds: float, steps: int) -> None:
    settings = micro(f"local.round_seconds={seconds}", f"local.speeds=[{speed},1,1]")
    assert steps_at(settings, 0, {}) == steps


def test_a_worker_may_not_report_more_than_its_steps(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = LocalTrainer.train

    def boast(self: Any, num_steps: int, span: int | None = None) -> LocalReport:
        report = inner(self, num_steps, span)
        return replace(report, tokens=report.tokens + (self.batches.worker == 2))

    monkeypatch.setattr(LocalTrainer, "train", boast)
    federation: Federation = federate("outer=average", "rounds=1", *UNEQUAL)
    (snapshot,) = federation.rounds
    assert list(snapshot.record.failures) == [2]
    assert "what the settings give" in snapshot.record.failures[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local.speeds=[1,1,1]"], "needs local.round_seconds > 0"),
        (["local.round_seconds=1", "local.speeds=[1,1]"], "must be layout.num_workers=3 numbers"),
        (["local.round_seconds=1", "local.speeds=[1,0,1]"], "must be layout.num_workers=3 numbers"),
        (["local.round_seconds=-1"], "local.round_seconds=-1"),
        (
            ["local.round_seconds=1", "local.steps=4", "outer.delay_steps=1"],
            "local.round_seconds=1.0 needs outer.delay_steps=0 (got 1)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        micro(*words)
    assert message in str(caught.value)
