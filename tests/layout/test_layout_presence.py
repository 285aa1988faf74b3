"""Layouts of those who are there: every kind, with workers away and workers back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr.config import LayoutSettings
from fomoe_flwr.layout import Layout, LayoutContext, Rehomed, draw_layout, settle

LAYERS, EXPERTS, WORKERS = 2, 12, 4
KINDS = ("fixed", "random", "rolling", "balanced", "weighted", "explicit")
LOAD = tuple(tuple(float(1 + (3 * e + layer) % 7) for e in range(EXPERTS)) for layer in range(2))


def settings_of(kind: str, tmp_path: Path) -> LayoutSettings:
    more: dict[str, Any] = {}
    if kind == "weighted":
        more = {"residents": [9, 6, 6, 3]}
    if kind == "explicit":
        path = tmp_path / "layout.json"
        path.write_text(
            json.dumps([[[e for e in range(EXPERTS) if (e + w) % 4 < 2] for w in range(WORKERS)]])
        )
        more = {"path": str(path)}
    return LayoutSettings(
        kind=kind, num_workers=WORKERS, overlap=2, reshuffle_every=2, tolerance=0.0, **more
    )


class History:
    """Rounds of a run whose workers come and go, without training."""

    def __init__(self, settings: LayoutSettings) -> None:
        self.settings = settings
        self.context = LayoutContext()
        self.rounds: list[Rehomed] = []

    def run(self, *present: set[int]) -> list[Rehomed]:
        for here in present:
            number = len(self.rounds) + 1
            drawn = draw_layout(self.settings, LAYERS, EXPERTS, 0, number, self.context)
            done = settle(drawn, here, self.settings, self.context)
            self.context = self.context.after(self.settings, number, done.layout, LOAD)
            # A resumed run reads it from a checkpoint.
            self.context = LayoutContext.from_json(json.loads(json.dumps(self.context.to_json())))
            self.rounds.append(done)
        return self.rounds


def holders(layout: Layout) -> list[int]:
    return [len(layout.holders(layer, e)) for layer in range(LAYERS) for e in range(EXPERTS)]


ALL = set(range(WORKERS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [{1}, {0, 3}])
def test_those_away_hold_nothing_and_every_expert_keeps_its_overlap(
    kind: str, gone: set[int], tmp_path: Path
) -> None:
    here = ALL - gone
    rounds = History(settings_of(kind, tmp_path)).run(ALL, here, here, ALL, ALL)
    for done, present in zip(rounds, (ALL, here, here, ALL, ALL), strict=True):
        for worker in range(WORKERS):
            assert all(bool(held) == (worker in present) for held in done.layout.of_worker(worker))
        assert set(holders(done.layout)) == {2}
        assert done.short == 0
        assert done.moved == done.lower_bound


@pytest.mark.parametrize("kind", ["fixed", "weighted", "explicit"])
def test_kinds_that_stay_move_only_what_left(kind: str, tmp_path: Path) -> None:
    first, without, same, back = History(settings_of(kind, tmp_path)).run(
        ALL, ALL - {1}, ALL - {1}, ALL
    )
    lost = sum(len(held) for held in first.layout.of_worker(1))
    assert without.moved == without.layout.moved_from(first.layout) == lost
    assert same.layout == without.layout
    assert same.moved == 0
    # The worker that returns is the only one that fetches anything.
    fetched = back.layout.moved_from(without.layout)
    assert fetched == sum(len(held) for held in back.layout.of_worker(1)) == back.moved


@pytest.mark.parametrize("kind", ["random", "rolling"])
def test_kinds_that_move_give_those_present_what_they_would_have_had(
    kind: str, tmp_path: Path
) -> None:
    settings = settings_of(kind, tmp_path)
    done = History(settings).run(ALL, ALL, ALL - {1})[-1]
    drawn = draw_layout(settings, LAYERS, EXPERTS, 0, 3)
    for worker in ALL - {1}:
        for now, planned in zip(
            done.layout.of_worker(worker), drawn.of_worker(worker), strict=True
        ):
            assert set(planned) <= set(now)
    again = History(settings).run(ALL, ALL, ALL - {1}, ALL - {1}, ALL)[-1]
    assert again.layout == draw_layout(settings, LAYERS, EXPERTS, 0, 5)
    assert again.moved == 0


def test_shares_of_a_list_of_residents_stay_in_proportion(tmp_path: Path) -> None:
    _, without = History(settings_of("weighted", tmp_path)).run(ALL, ALL - {1})
    assert [len(held) for held in without.layout.residents[0]] == [12, 0, 8, 4]


def test_room_is_never_exceeded_and_too_little_of_it_is_told() -> None:
    settings = LayoutSettings(kind="weighted", num_workers=3, overlap=2, capacity_gib=[1, 1, 1])
    context = LayoutContext(room=(12, 8, 5))
    drawn = draw_layout(settings, LAYERS, EXPERTS, 0, 1, context)
    done = settle(drawn, {1, 2}, settings, context)
    assert [len(held) for held in done.layout.residents[0]] == [0, 8, 5]
    assert min(holders(done.layout)) == 1
    assert done.short == LAYERS * (24 - 13)
    with pytest.raises(ValueError, match="have room for 5 residents of a layer, fewer than its 12"):
        settle(drawn, {2}, settings, context)
