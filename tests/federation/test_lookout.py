"""The lookout: whom a round waits for, in every state of a run."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from fomoe_flwr.federation import lookout
from fomoe_flwr.federation.lookout import Lookout
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.layout import Layout


def record(ago: float, sent: set[int], replied: set[int], failed: set[int]) -> RoundRecord:
    return RoundRecord(
        1,
        Layout.full(1, 1, 4),
        sent=frozenset(sent),
        started=time.monotonic() - ago,
        configure_seconds=1.0,
        send_seconds=2.0,
        replies={worker: {} for worker in replied},
        failures=dict.fromkeys(failed, "no"),
    )


@pytest.mark.parametrize(
    ("found", "missing", "awaited"),
    [
        ((33, {0, 1, 2}, {0}, set()), [3], {1: ("reply", 30), 2: ("reply", 30)}),
        ((33, {0, 1, 2}, {0}, {2, 3}), [3], {1: ("reply", 30)}),
        ((33, {0, 1}, {0, 1}, set()), [3], {}),
        ((3.5, {0, 1}, set(), set()), [], {}),
        (None, [3], {3: ("node", 60)}),
        (None, [], {}),
    ],
    ids=["two", "one", "all came", "just sent", "no node", "no round"],
)
def test_it_names_who_is_waited_for_and_since_when(
    found: tuple[float, set[int], set[int], set[int]] | None,
    missing: list[int],
    awaited: dict[int, tuple[str, float]],
) -> None:
    seats = SimpleNamespace(missing_workers=lambda: missing)
    strategy: Any = SimpleNamespace(record=found and record(*found), seats=seats)
    look = Lookout(strategy)
    look._since = time.monotonic() - 60
    got = look()
    assert [each["worker"] for each in got] == list(awaited)
    for each in got:
        what, ago = awaited[each["worker"]]
        assert each["for"] == what
        assert time.time() - each["since"] == pytest.approx(ago, abs=0.5)


def test_after_a_round_the_next_one_waits_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "_SOON_SECONDS", -1.0)
    seats = SimpleNamespace(missing_workers=lambda: [2])
    strategy: Any = SimpleNamespace(record=record(9, {0, 1, 2}, {0}, set()), seats=seats)
    look = Lookout(strategy)
    assert [(each["worker"], each["for"]) for each in look()] == [(1, "reply"), (2, "reply")]
    look.close_round(strategy.record)
    assert [(each["worker"], each["for"]) for each in look()] == [(2, "node")]
