"""Workers that leave and join: who takes over, and how few experts move."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.config import LayoutSettings
from fomoe_flwr.layout import Layout, draw_layout, rehome


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """A layout and its overlap."""
    workers = draw(st.integers(1, 8))
    overlap = draw(st.integers(1, workers))
    chosen = LayoutSettings(
        kind=draw(st.sampled_from(["fixed", "random", "rolling"])),
        num_workers=workers,
        overlap=overlap,
        allow_uneven=True,
        draw=draw(st.sampled_from(["same", "per_layer"])),
    )
    experts = draw(st.integers(-(-workers // overlap), 20))
    seed, server_round = draw(st.integers(0, 1000)), draw(st.integers(1, 9))
    return draw_layout(chosen, draw(st.integers(1, 3)), experts, seed, server_round), overlap


def missing(layout: Layout, present: set[int], overlap: int) -> int:
    """Count the residencies that experts lack among the workers that are present."""
    wanted = min(overlap, len(present))
    return sum(
        max(0, wanted - len(present.intersection(layout.holders(layer, expert))))
        for layer in range(layout.num_layers)
        for expert in range(layout.num_experts)
    )


def all_holders(layout: Layout) -> list[tuple[int, ...]]:
    return [
        layout.holders(layer, expert)
        for layer in range(layout.num_layers)
        for expert in range(layout.num_experts)
    ]


@settings(max_examples=200)
@given(layouts(), st.data())
def test_when_workers_leave_just_what_is_missing_moves(
    case: tuple[Layout, int], data: st.DataObject
) -> None:
    layout, overlap = case
    everybody = range(layout.num_workers)
    present = set(data.draw(st.lists(st.sampled_from(everybody), min_size=1, unique=True)))
    done = rehome(layout, present, overlap)
    after = done.layout
    assert done.moved == after.moved_from(layout) == done.lower_bound
    assert done.moved == missing(layout, present, overlap)
    assert done.short == 0
    assert {len(h) for h in all_holders(after)} == {min(overlap, len(present))} or len(present) < (
        overlap
    )
    for worker in everybody:
        for before, now in zip(layout.of_worker(worker), after.of_worker(worker), strict=True):
            # Nobody who stays gives anything up.
            assert set(now) >= set(before) if worker in present else not now
    if len(set(layout.residents)) == 1:
        assert len(set(after.residents)) == 1


@settings(max_examples=200)
@given(layouts(), st.integers(1, 3))
def test_when_workers_join_they_get_their_share_and_nothing_else_moves(
    case: tuple[Layout, int], joining: int
) -> None:
    layout, overlap = case
    before, workers = layout.num_workers, layout.num_workers + joining
    if layout.num_experts * overlap < workers:
        return
    done = rehome(layout, range(workers), overlap)
    after = done.layout
    assert done.moved == done.lower_bound
    assert done.short == 0
    assert {len(h) for h in all_holders(after)} == {overlap}
    share = layout.num_experts * overlap // workers
    joined = [len(held) for w in range(before, workers) for held in after.of_worker(w)]
    assert set(joined) <= {share, share + 1}
    assert done.moved == sum(joined)
    for worker in range(before):
        for held, now in zip(layout.of_worker(worker), after.of_worker(worker), strict=True):
            assert set(now) <= set(held)


@settings(max_examples=200)
@given(layouts(), st.data())
def test_leaving_and_joining_at_once_moves_no_more_than_has_to(
    case: tuple[Layout, int], data: st.DataObject
) -> None:
    layout, overlap = case
    names = range(layout.num_workers + 2)
    present = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    done = rehome(layout, present, overlap)
    assert done.moved == done.lower_bound >= missing(layout, set(present), overlap)
    assert all(len(holders) >= min(overlap, len(present)) for holders in all_holders(done.layout))
    assert {holder for holders in all_holders(done.layout) for holder in holders} <= set(present)
    # Once done, there is nothing left to do; the order of names says nothing.
    again = rehome(done.layout, present[::-1], overlap)
    assert (again.layout, again.moved, again.lower_bound) == (done.layout, 0, 0)
    assert rehome(layout, present[::-1], overlap) == done


@settings(max_examples=200)
@given(layouts(), st.data())
def test_room_is_never_exceeded_and_every_expert_keeps_a_holder(
    case: tuple[Layout, int], data: st.DataObject
) -> None:
    layout, overlap = case
    names = range(layout.num_workers + 1)
    present = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    workers = max(layout.num_workers, max(present) + 1)
    sizes = st.integers(0, layout.num_experts + 3)
    room = data.draw(st.lists(sizes, min_size=workers, max_size=workers))
    fits = sum(min(room[worker], layout.num_experts) for worker in present)
    if fits < layout.num_experts:
        with pytest.raises(ValueError, match=rf"have room for {fits} residents"):
            rehome(layout, present, overlap, room)
        return
    done = rehome(layout, present, overlap, room)
    wanted = min(overlap, len(present))
    for workers_of_layer in done.layout.residents:
        assert all(len(h) <= room[w] for w, h in enumerate(workers_of_layer))
    assert all(h for h in all_holders(done.layout))
    assert done.moved >= done.lower_bound
    if fits >= layout.num_experts * wanted:
        assert all(len(h) >= wanted for h in all_holders(done.layout))


def test_a_worker_that_leaves_and_returns_costs_its_share_twice() -> None:
    layout = draw_layout(LayoutSettings(num_workers=8, overlap=2), 16, 64, 0, 1)
    left = rehome(layout, range(7))
    assert (left.moved, left.lower_bound, left.short) == (256, 256, 0)
    assert left.layout.of_worker(7) == ((),) * 16
    back = rehome(left.layout, range(8))
    assert (back.moved, back.lower_bound) == (256, 256)
    assert {len(held) for workers in back.layout.residents for held in workers} <= {15, 16, 17, 18}


def test_shares_follow_the_room() -> None:
    layout = draw_layout(LayoutSettings(num_workers=3, overlap=1), 1, 12, 0, 1)
    done = rehome(layout, [0, 1], 1, [8, 4, 4])
    assert [len(held) for held in done.layout.residents[0]] == [8, 4, 0]
    assert done.moved == done.lower_bound == 4


def test_explicit_layouts_keep_their_numbers_of_holders() -> None:
    layout = Layout(3, (((0, 1), (0, 2), (0,)),))
    done = rehome(layout, [0, 2])
    assert [len(h) for h in all_holders(done.layout)] == [2, 1, 1]
    assert done.moved == done.lower_bound == 1
    assert done.layout.overlaps == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"present": []}, "at least one worker"),
        ({"present": [-1, 0]}, "at least one worker"),
        ({"present": [0], "room": [4]}, "room has 1 entries, 2 workers"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rehome(Layout(2, (((0,), (1,)),)), **arguments)
