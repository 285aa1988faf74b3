"""The layout's invariants, its randomness, and the errors that refuse what cannot be drawn."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.config import LayoutSettings, SettingsError
from fomoe_flwr.layout import Layout, check_layout, draw_layout


@st.composite
def cases(draw: st.DrawFn, uneven: bool = False) -> dict[str, Any]:
    """Arguments of draw_layout from which a layout can be drawn."""
    workers = draw(st.integers(1, 9))
    overlap = draw(st.integers(1, workers))
    step = workers // math.gcd(overlap, workers)
    fewest = -(-workers // overlap)
    experts = draw(st.integers(fewest, 24)) if uneven else step * draw(st.integers(1, 5))
    return {
        "settings": LayoutSettings(
            kind=draw(st.sampled_from(["fixed", "random", "rolling", "balanced"])),
            num_workers=workers,
            overlap=overlap,
            draw=draw(st.sampled_from(["per_layer", "same"])),
            reshuffle_every=draw(st.integers(1, 3)),
            allow_uneven=uneven,
        ),
        "num_layers": draw(st.integers(1, 5)),
        "num_experts": experts,
        "seed": draw(st.integers(0, 2**31 - 1)),
        "server_round": draw(st.integers(1, 50)),
    }


def layout_of(num_layers: int = 4, num_experts: int = 16, **options: Any) -> Layout:
    """Draw a layout of 4 workers x 16 experts with overlap 2, unless told otherwise."""
    seed, server_round = options.pop("seed", 0), options.pop("server_round", 1)
    return draw_layout(LayoutSettings(**options), num_layers, num_experts, seed, server_round)


@given(cases())
def test_every_expert_has_overlap_holders_and_every_worker_the_same_load(
    case: dict[str, Any],
) -> None:
    layout, chosen = draw_layout(**case), case["settings"]
    assert layout.num_layers == case["num_layers"]
    assert layout.num_workers == chosen.num_workers
    load = case["num_experts"] * chosen.overlap // chosen.num_workers
    for layer in range(layout.num_layers):
        for worker, experts in enumerate(layout.residents[layer]):
            assert list(experts) == sorted(set(experts))
            assert len(experts) == load
            assert experts == layout.of_worker(worker)[layer]
        for expert in range(layout.num_experts):
            holders = layout.holders(layer, expert)
            assert len(set(holders)) == chosen.overlap
            assert all(expert in layout.residents[layer][worker] for worker in holders)


@given(cases(uneven=True))
def test_uneven_loads_differ_by_at_most_one(case: dict[str, Any]) -> None:
    layout, chosen = draw_layout(**case), case["settings"]
    low = case["num_experts"] * chosen.overlap // chosen.num_workers
    for layer, workers in enumerate(layout.residents):
        assert {len(experts) for experts in workers} <= {low, low + 1}
        assert all(
            len(layout.holders(layer, expert)) == chosen.overlap
            for expert in range(layout.num_experts)
        )
    if chosen.draw == "per_layer":
        totals = [sum(map(len, layout.of_worker(worker))) for worker in range(chosen.num_workers)]
        assert max(totals) - min(totals) <= 1


@given(cases())
def test_the_same_arguments_give_the_same_layout(case: dict[str, Any]) -> None:
    first, second = draw_layout(**case), draw_layout(**case)
    assert first == second
    assert first.digest() == second.digest()
    assert second.moved_from(first) == 0


@given(cases(uneven=True))
def test_json_round_trip(case: dict[str, Any]) -> None:
    layout = draw_layout(**case)
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.digest() == layout.digest()


@pytest.mark.parametrize("kind", ["fixed", "random", "rolling", "balanced"])
def test_full_overlap_gives_everything_to_everybody(kind: str) -> None:
    layout = layout_of(kind=kind, overlap=4, num_experts=7)
    assert layout.residents == ((tuple(range(7)),) * 4,) * 4


def test_a_layout_stays_the_same_across_versions() -> None:
    # Workers of different Python versions must draw the same one, and old runs must resume.
    assert layout_of(kind="fixed").digest() == "1b178c8d3a01c593"
    assert layout_of(kind="random").digest() == "51edd2b742cabc19"


@pytest.mark.parametrize("kind", ["fixed", "random", "rolling", "balanced"])
def test_draw_says_whether_layers_differ(kind: str) -> None:
    assert len(set(layout_of(kind=kind, draw="same").residents)) == 1
    assert len(set(layout_of(kind=kind, draw="per_layer").residents)) > 1


def test_a_fixed_layout_never_changes_but_depends_on_the_seed() -> None:
    assert len({layout_of(kind="fixed", server_round=r).digest() for r in range(1, 20)}) == 1
    assert layout_of(kind="fixed", seed=1) != layout_of(kind="fixed", seed=2)


def test_a_random_layout_changes_between_epochs_only() -> None:
    drawn = [
        layout_of(kind="random", reshuffle_every=3, server_round=r).digest() for r in range(1, 13)
    ]
    assert [drawn[i : i + 3] for i in range(0, 12, 3)] == [[d] * 3 for d in drawn[::3]]
    assert len(set(drawn)) == 4
    assert layout_of(kind="random", seed=1) != layout_of(kind="random", seed=2)


def test_a_fixed_layout_is_a_ring_not_islands() -> None:
    layout = layout_of(kind="fixed", num_workers=6, overlap=2, num_experts=24, num_layers=8)
    met: set[tuple[int, int]] = set()
    for workers in layout.residents:
        common = {
            pair: len(set(workers[pair[0]]) & set(workers[pair[1]]))
            for pair in combinations(range(6), 2)
        }
        assert sorted(common.values()) == [0] * 9 + [4] * 6
        assert Counter(w for pair, n in common.items() if n for w in pair) == dict.fromkeys(
            range(6), 2
        )
        met |= {pair for pair, n in common.items() if n}
    assert met == set(combinations(range(6), 2))


def test_random_residencies_are_uniform() -> None:
    rounds, workers, experts, overlap = 400, 4, 8, 2
    held: Counter[tuple[int, int]] = Counter()
    together: Counter[tuple[int, int]] = Counter()
    for server_round in range(1, rounds + 1):
        layout = layout_of(
            1, experts, kind="random", num_workers=workers, overlap=overlap,
            server_round=server_round,
        )  # fmt: skip
        for worker, residents in enumerate(layout.residents[0]):
            held.update((worker, expert) for expert in residents)
            together.update(combinations(residents, 2))
    # Binomial spread: five standard deviations leave no room for a flaky seed, and catch a bias.
    share = overlap / workers
    spread = 5 * math.sqrt(rounds * share * (1 - share))
    assert len(held) == workers * experts
    assert all(abs(n - rounds * share) < spread for n in held.values())
    load = experts * overlap // workers
    expected = rounds * workers * math.comb(load, 2) / math.comb(experts, 2)
    assert len(together) == math.comb(experts, 2)
    assert all(abs(n - expected) < 5 * math.sqrt(expected) for n in together.values())


def test_random_layers_keep_nothing_of_the_ring() -> None:
    neighbours = [
        sum(e + 1 in set(residents) for residents in layer for e in residents)
        for layer in layout_of(50, 64, kind="random", num_workers=8, overlap=2).residents
    ]
    # 63 pairs of neighbours, each on one of 8 workers with odds 16/64 * 15/63: 30 on average.
    assert abs(statistics.mean(neighbours) - 30) < 3


def test_moved_from_counts_new_residencies() -> None:
    before = Layout(4, (((0, 1), (2, 3)), ((0, 1), (2, 3))))
    after = Layout(4, (((0, 1), (2, 3)), ((0, 2), (1, 3))))
    assert after.moved_from(before) == 2
    assert before.moved_from(before) == 0
    with pytest.raises(ValueError, match="num_experts: 2 and 4"):
        Layout(2, (((0,), (1,)),) * 2).moved_from(before)


def test_about_the_ghost_share_moves_at_every_redraw() -> None:
    moved = [
        layout_of(8, 32, kind="random", server_round=r + 1).moved_from(
            layout_of(8, 32, kind="random", server_round=r)
        )
        for r in range(1, 11)
    ]
    assert statistics.mean(moved) == pytest.approx(8 * 32 * 2 * (1 - 2 / 4), rel=0.1)


def test_digests_tell_layouts_apart() -> None:
    digests = {
        layout_of(kind="random", seed=seed, draw=draw).digest()
        for seed in range(20)
        for draw in ("same", "per_layer")
    }
    assert len(digests) == 40
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)


@pytest.mark.parametrize(
    ("options", "num_experts", "words"),
    [
        (
            {"num_workers": 2, "overlap": 3},
            8,
            ["layout.overlap=3 needs layout.num_workers >= 3 (got 2)"],
        ),
        (
            {"num_workers": 4, "overlap": 3},
            6,
            [
                "model.num_experts=6, layout.overlap=3 and layout.num_workers=4 cannot",
                "layout.overlap=2 or 4",
                "model.num_experts=4 or 8",
                "layout.num_workers=3 or 6",
                "layout.allow_uneven=true (4 or 5 experts a worker)",
            ],
        ),
        (
            {"num_workers": 8, "overlap": 1},
            3,
            ["without an expert", "layout.overlap >= 3", "model.num_experts >= 8", "<= 3"],
        ),
        ({"num_workers": 8, "overlap": 1, "allow_uneven": True}, 7, ["without an expert"]),
        ({"num_workers": 4, "overlap": 0}, 8, ["layout.overlap=0", ">= 1"]),
        ({"num_workers": 0, "overlap": 1}, 8, ["layout.num_workers=0", ">= 1"]),
    ],
)
def test_impossible_settings_are_refused_with_what_would_work(
    options: dict[str, Any], num_experts: int, words: list[str]
) -> None:
    with pytest.raises(SettingsError) as refused:
        check_layout(LayoutSettings(**options), 2, num_experts)
    message = str(refused.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
    with pytest.raises(SettingsError):
        layout_of(2, num_experts, **options)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30))
def test_check_refuses_exactly_what_has_no_even_layout(
    workers: int, overlap: int, experts: int
) -> None:
    chosen = LayoutSettings(num_workers=workers, overlap=overlap)
    if overlap <= workers and experts * overlap % workers == 0:
        check_layout(chosen, 1, experts)
    else:
        with pytest.raises(SettingsError):
            check_layout(chosen, 1, experts)


def test_rounds_count_from_one() -> None:
    with pytest.raises(ValueError, match="rounds count from 1"):
        layout_of(server_round=0)


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [],
        [[]],
        [[[]]],
        [[0, 1]],
        [[[0], [0, 2]]],
        [[[1, 0]]],
        [[[0, 0]]],
        [[[0.0, 1.0]]],
        [[[False, True]]],
        [[["0"]]],
        [[[0], [1]], [[0, 1]]],
        [[[0, 1]], [[0]]],
        [[[-1, 0]]],
    ],
)
def test_what_is_no_layout_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"layer|layout"):
        Layout.from_json(data)
