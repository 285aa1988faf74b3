"""Rolling and weighted layouts, and what decides when a layout moves."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr import costs
from fomoe_flwr.config import LayoutSettings, Settings, SettingsError, load_settings
from fomoe_flwr.layout import Layout, LayoutContext, check_layout, draw_layout
from fomoe_flwr.run.preflight import preflight


def drawn(
    num_layers: int = 2,
    num_experts: int = 16,
    seed: int = 0,
    server_round: int = 1,
    context: LayoutContext = LayoutContext(),  # noqa: B008 - frozen
    **options: Any,
) -> Layout:
    return draw_layout(
        LayoutSettings(**options), num_layers, num_experts, seed, server_round, context
    )


def refusal(num_experts: int = 16, context: LayoutContext | None = None, **options: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        check_layout(LayoutSettings(**options), 2, num_experts, context or LayoutContext())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@st.composite
def shares(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Experts, overlap, and unequal numbers of residents that add up."""
    workers, experts = draw(st.integers(1, 7)), draw(st.integers(1, 16))
    overlap = draw(st.integers(math.ceil(workers / experts), workers))
    residents = [1] * workers
    for _ in range(experts * overlap - workers):
        below = [i for i, count in enumerate(residents) if count < experts]
        residents[draw(st.sampled_from(below))] += 1
    return experts, overlap, residents


@given(
    shares(),
    st.sampled_from(["weighted", "random", "rolling", "balanced"]),
    st.sampled_from(["per_layer", "same"]),
    st.integers(1, 20),
)
def test_every_worker_holds_the_residents_that_it_is_given(
    case: tuple[int, int, list[int]], kind: str, draw: str, server_round: int
) -> None:
    experts, overlap, residents = case
    layout = drawn(
        3, experts, 7, server_round, kind=kind, draw=draw, num_workers=len(residents),
        overlap=overlap, residents=residents,
    )  # fmt: skip
    for layer in range(3):
        assert [len(held) for held in layout.residents[layer]] == residents
        assert all(len(layout.holders(layer, e)) == overlap for e in range(experts))


@pytest.mark.parametrize(
    ("workers", "overlap", "experts", "roll_by"),
    [(4, 2, 16, 1), (4, 2, 16, 4), (6, 4, 12, 1), (6, 4, 12, 2), (3, 1, 9, 3), (5, 3, 10, 7)],
)
def test_after_a_full_turn_every_worker_held_every_expert_equally_often(
    workers: int, overlap: int, experts: int, roll_by: int
) -> None:
    turn = experts // math.gcd(experts, roll_by)
    held: Counter[tuple[int, int, int]] = Counter()
    for server_round in range(1, 2 * turn + 1):
        layout = drawn(
            2, experts, 3, server_round, kind="rolling", num_workers=workers, overlap=overlap,
            roll_by=roll_by, reshuffle_every=2,
        )  # fmt: skip
        for layer, of_workers in enumerate(layout.residents):
            held.update((layer, w, e) for w, residents in enumerate(of_workers) for e in residents)
    assert len(held) == 2 * workers * experts
    assert set(held.values()) == {2 * turn * overlap // workers}


@pytest.mark.parametrize("allow_uneven", [False, True])
def test_a_rolling_layout_moves_one_expert_of_each_worker_and_layer(allow_uneven: bool) -> None:
    options = {"kind": "rolling", "num_workers": 5 if allow_uneven else 4, "overlap": 2,
               "reshuffle_every": 3, "allow_uneven": allow_uneven}  # fmt: skip
    rounds = [drawn(4, server_round=r, **options) for r in range(1, 8)]
    moved = [after.moved_from(before) for before, after in pairwise(rounds)]
    one_each = 4 * options["num_workers"]
    assert moved == [0, 0, one_each, 0, 0, one_each]
    # It does not depend on the rounds before: a resumed run needs no memory.
    assert (
        drawn(4, server_round=4, context=LayoutContext(previous=rounds[2]), **options)
        == (rounds[3])
    )


def test_a_roll_that_never_shows_all_experts_is_refused() -> None:
    text = refusal(kind="rolling", num_workers=4, overlap=1, roll_by=8)
    assert text == (
        "layout.roll_by=8 would never show a worker all of the model.num_experts=16 experts "
        "equally often: use layout.roll_by=7"
    )


@pytest.mark.parametrize(
    ("residents", "experts"),
    [([8, 8, 8, 8], 16), ([12, 4, 12, 4], 16), ([12, 8, 8, 4], 16), ([6, 6, 4, 4, 2, 2], 12)],
)
def test_a_weighted_layout_is_one_ring_not_islands(residents: list[int], experts: int) -> None:
    workers = len(residents)
    for seed in range(20):
        layout = drawn(
            1, experts, seed, kind="weighted", num_workers=workers, overlap=2, residents=residents
        )
        together = {0}
        for _ in residents:
            together |= {
                b
                for pair in combinations(range(workers), 2)
                for a, b in (pair, pair[::-1])
                if a in together and set(layout.residents[0][a]) & set(layout.residents[0][b])
            }
        assert together == set(range(workers))
        # Nobody is the twin of another.
        assert len(set(layout.residents[0])) == workers


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"residents": [8, 8, 4, 4]},
            "layout.residents=[8,8,4,4] adds up to 24, model.num_experts=16 * layout.overlap=2 = "
            "32 is needed; the nearest list that works is [10,10,6,6]",
        ),
        (
            {"residents": [16, 16, 8, 8]},
            "layout.residents=[16,16,8,8] adds up to 48, model.num_experts=16 * layout.overlap=2 = "
            "32 is needed; the nearest list that works is [12,12,4,4], or use layout.overlap=3",
        ),
        (
            {"residents": [20, 8, 4, 0]},
            "layout.residents=[20,8,4,0] is out of range: a worker holds 1 to model.num_experts=16 "
            "experts of a layer; the nearest list that works is [16,9,5,2]",
        ),
        (
            {"residents": [8, 8]},
            "layout.residents=[8,8] has 2 entries, layout.num_workers=4 needs 4, e.g. [8,8,8,8]",
        ),
        (
            {},
            "layout.kind=weighted needs layout.residents, the experts of a layer for each worker "
            "(e.g. [8,8,8,8]), or layout.capacity_gib, the memory of each worker, or "
            "layout.capacity_reported=true",
        ),
        (
            {"residents": [8, 8, 8, 8], "capacity_gib": [1.0] * 4},
            "layout.residents and layout.capacity_gib contradict each other: give one of them",
        ),
        (
            {"kind": "fixed", "residents": [8, 8, 8, 8]},
            "layout.residents has no meaning for layout.kind=fixed: use layout.kind=weighted (or "
            "random, rolling, balanced)",
        ),
        (
            {"kind": "random", "path": "/a.json"},
            "layout.path=/a.json has no meaning for layout.kind=random: use layout.kind=explicit",
        ),
    ],
)
def test_wrong_shares_are_refused_with_a_list_that_works(
    options: dict[str, Any], text: str
) -> None:
    assert refusal(**{"kind": "weighted", **options}) == text


@given(shares(), st.lists(st.integers(-3, 20), min_size=1, max_size=8))
def test_the_list_that_is_suggested_works(
    case: tuple[int, int, list[int]], residents: list[int]
) -> None:
    experts, overlap, works = case
    options = {"kind": "weighted", "num_workers": len(works), "overlap": overlap}
    if residents == works or (
        len(residents) == len(works)
        and sum(residents) == experts * overlap
        and all(1 <= count <= experts for count in residents)
    ):
        return
    text = refusal(experts, residents=residents, **options)
    suggested = [word for word in text.replace(", or", "").split() if word.startswith("[")][-1]
    check_layout(LayoutSettings(residents=json.loads(suggested), **options), 2, experts)


def capacity_of(settings: Settings, experts: float) -> float:
    """Return the GiB that the shared parameters and so many experts of each layer take."""
    counts = costs.parameter_counts(settings.model)
    held = counts.shared + experts * counts.per_expert_per_layer * settings.model.num_layers
    return 16 * held / 2**30


def test_residents_follow_from_memory() -> None:
    settings = Settings(layout=LayoutSettings(kind="weighted"))
    rooms = [12.5, 8.5, 8.5, 4.5]
    settings.layout.capacity_gib = [capacity_of(settings, room) for room in rooms]
    context = costs.layout_context(settings)
    assert context.room == (12, 8, 8, 4)
    layout = draw_layout(settings.layout, 4, 16, 0, 1, context)
    assert [len(held) for held in layout.residents[0]] == [12, 8, 8, 4]
    held = costs.resident_counts(settings.model, layout)
    assert all(
        costs.memory_bytes(count, "adamw") <= gib * 2**30
        for count, gib in zip(held, settings.layout.capacity_gib, strict=True)
    )
    assert costs.summary(settings)["params/resident"] == max(held)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 16), st.data())
def test_memory_is_shared_out_in_proportion_and_never_exceeded(
    room: list[int], experts: int, data: st.DataObject
) -> None:
    fits = sum(min(r, experts) for r in room) // experts
    if not fits or len(room) > experts * fits:
        return
    overlap = data.draw(st.integers(math.ceil(len(room) / experts), fits))
    layout = drawn(
        1, experts, kind="weighted", num_workers=len(room), overlap=overlap,
        context=LayoutContext(room=tuple(room)),
    )  # fmt: skip
    counts = [len(held) for held in layout.residents[0]]
    assert all(1 <= count <= most for count, most in zip(counts, room, strict=True))
    # Nobody with more room holds less.
    assert all(
        counts[a] >= counts[b]
        for a in range(len(room))
        for b in range(len(room))
        if room[a] > room[b]
    )


def test_too_little_memory_is_refused_with_the_overlap_that_fits() -> None:
    settings = Settings(layout=LayoutSettings(kind="weighted"))
    settings.layout.capacity_gib = [capacity_of(settings, room) for room in (8.5, 8.5, 4.5, 4.5)]
    with pytest.raises(SettingsError) as caught:
        preflight(settings)
    assert str(caught.value) == (
        "the workers have room for [8,8,4,4] experts of a layer, 24 together; model.num_experts=16 "
        "* layout.overlap=2 = 32 are needed: use layout.overlap=1 or raise layout.capacity_gib"
    )
    settings.layout.capacity_gib[3] = 1e-6
    with pytest.raises(
        SettingsError, match=r"worker 3 has no room .* raise layout.capacity_gib\[3\]"
    ):
        preflight(settings)
    settings.layout.capacity_gib[3] = math.nan
    with pytest.raises(SettingsError, match=r"layout.capacity_gib\[3\]=nan is out of range"):
        preflight(settings)
    settings.layout.capacity_gib = [1.0]
    with pytest.raises(SettingsError, match=r"capacity_gib=\[1\] has 1 entries, .* needs 4"):
        preflight(settings)


@pytest.mark.parametrize("kind", ["fixed", "random", "rolling", "balanced", "weighted"])
def test_every_kind_is_a_preset_that_can_be_drawn(kind: str) -> None:
    settings = load_settings([f"layout={kind}"])
    assert settings.layout.kind == kind
    summary = costs.summary(settings)
    assert (summary["layout/overlap_min"], summary["layout/overlap_max"]) == (2, 2)


def test_layouts_stay_the_same_across_versions() -> None:
    # Old runs must resume.
    assert drawn(4, kind="rolling", server_round=3).digest() == "8d575b3f7940257e"
    assert drawn(4, kind="weighted", residents=[12, 8, 8, 4]).digest() == "2fe10be08e269c4d"
    assert drawn(4, kind="balanced").digest() == "9d12d375ba8eb933"


@pytest.mark.parametrize("kind", ["fixed", "random", "rolling", "balanced", "weighted"])
def test_between_moves_the_previous_layout_stays(kind: str) -> None:
    options: dict[str, Any] = {"kind": kind, "reshuffle_every": 3}
    if kind == "weighted":
        options["residents"] = [12, 8, 8, 4]
    other = drawn(seed=99)
    context = LayoutContext(previous=other)
    for server_round in (2, 3, 5, 6):
        assert drawn(server_round=server_round, context=context, **options) == other
    assert drawn(server_round=1, context=context, **options) == drawn(**options)
    moves = kind in ("random", "rolling")
    assert (drawn(server_round=4, context=context, **options) != other) == moves


def test_a_context_adds_loads_up_over_a_period_and_survives_json() -> None:
    chosen = LayoutSettings(kind="balanced", reshuffle_every=2)
    layout = drawn(1, 2, num_workers=2, overlap=1)
    context = LayoutContext(room=(3, 4))
    loads = []
    for server_round in range(1, 6):
        context = context.after(chosen, server_round, layout, [[server_round, 10]])
        loads.append(context.load)
    assert loads == [((1, 10),), ((3, 20),), ((3, 10),), ((7, 20),), ((5, 10),)]
    assert context.after(chosen, 6, layout).load == ((5, 10),)
    again = LayoutContext.from_json(json.loads(json.dumps(context.to_json())))
    assert again == context == LayoutContext(((5, 10),), layout, (3, 4))
    assert LayoutContext.from_json(json.loads(json.dumps(LayoutContext().to_json()))) == (
        LayoutContext()
    )


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"load": [], "previous": None, "room": [1.5]},
        {"load": [[1], [1, 2]], "previous": None, "room": []},
        {"load": [[-1]], "previous": None, "room": []},
        {"load": [["1"]], "previous": None, "room": []},
        {"load": [[math.nan]], "previous": None, "room": []},
        {"load": [3], "previous": None, "room": []},
        {"load": [], "previous": [[[1]]], "room": []},
    ],
)
def test_what_is_no_context_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"load|room|layer"):
        LayoutContext.from_json(data)


def test_a_context_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        drawn(kind="balanced", server_round=2, context=LayoutContext(previous=drawn(3)))
    with pytest.raises(ValueError, match="2 layers of 16 experts"):
        drawn(kind="balanced", server_round=2, context=LayoutContext(load=((1.0,),)))
