"""The holder mean: by hand, against a brute-force mean, and at its edges."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec

EXPERTS, LAYERS = 4, 2
SPEC = StateSpec(
    shared=(Entry("embed", (3, 2), None), Entry("norm", (2,), None)),
    expert=(
        Entry("model.layers.0.mlp.experts.up", (EXPERTS, 2, 3), 0),
        Entry("model.layers.0.mlp.experts.down", (EXPERTS, 2), 0),
        Entry("model.layers.1.mlp.experts.up", (EXPERTS, 2, 3), 1),
    ),
    num_layers=LAYERS,
    num_experts=EXPERTS,
)
ALL = (tuple(range(EXPERTS)),) * LAYERS


@dataclass(frozen=True)
class Reply:
    shared: Tensor
    experts: Tensor
    residents: Residents
    weight: float


def reply(residents: Residents, weight: float, seed: int) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    return Reply(
        torch.randn(SPEC.shared_size, generator=generator),
        torch.randn(SPEC.experts_size(residents), generator=generator),
        residents,
        weight,
    )


def folded(replies: list[Reply]) -> HolderMean:
    mean = HolderMean(SPEC)
    for r in replies:
        mean.fold(r.shared, r.experts, r.residents, r.weight)
    return mean


def brute_force(replies: list[Reply]) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Average in float64: the shared vector over all replies, (key, expert) over its holders."""
    total = sum(r.weight for r in replies)
    shared = sum(r.shared.double() * r.weight for r in replies) / total
    experts = {}
    for entry in SPEC.expert:
        for expert in range(EXPERTS):
            rows, weights = [], []
            for r in replies:
                held = list(r.residents[entry.layer or 0])
                if expert in held:
                    piece = SPEC.split_experts(r.experts, r.residents)[entry.key]
                    rows.append(piece[held.index(expert)].double())
                    weights.append(r.weight)
            if rows:
                weighted = sum(row * w for row, w in zip(rows, weights, strict=True))
                experts[entry.key, expert] = weighted / sum(weights)
    return shared, experts


def assert_is_brute_force(replies: list[Reply]) -> None:
    mean = folded(replies)
    shared, experts = brute_force(replies)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(mean.shared.double(), shared, **close)
    for entry in SPEC.expert:
        returned = mean.returned(entry.layer or 0).tolist()
        assert returned == [e for e in range(EXPERTS) if (entry.key, e) in experts]
        for expert in returned:
            found = mean.rows[entry.key][expert].double()
            torch.testing.assert_close(found, experts[entry.key, expert].double(), **close)


def test_numbers_by_hand() -> None:
    expert = Entry("model.layers.0.mlp.experts.w", (3, 1), 0)
    spec = StateSpec((Entry("w", (1,), None),), (expert,), num_layers=1, num_experts=3)
    mean = HolderMean(spec)
    mean.fold(torch.tensor([1.0]), torch.tensor([10.0, 20.0]), [[0, 1]], 1.0)
    mean.fold(torch.tensor([5.0]), torch.tensor([40.0, 60.0]), [[1, 2]], 3.0)
    assert mean.shared_means()["w"].tolist() == [4.0]
    assert mean.rows["model.layers.0.mlp.experts.w"].flatten().tolist() == [10.0, 35.0, 60.0]
    assert mean.shared_weight == 4.0
    assert mean.expert_weight.tolist() == [[1.0, 4.0, 3.0]]
    assert mean.missing_experts() == []


def test_with_everything_held_it_is_the_plain_weighted_mean() -> None:
    replies = [reply(ALL, weight, seed) for seed, weight in enumerate((1.0, 2.5, 0.25, 7.0))]
    mean = folded(replies)
    weights = torch.tensor([r.weight for r in replies], dtype=torch.float64)
    weights /= weights.sum()
    shared = torch.einsum("w,wn->n", weights, torch.stack([r.shared for r in replies]).double())
    experts = torch.einsum("w,wn->n", weights, torch.stack([r.experts for r in replies]).double())
    torch.testing.assert_close(mean.shared.double(), shared, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(SPEC.pack_experts(mean.rows).double(), experts, rtol=1e-5, atol=1e-6)


def test_the_order_of_replies_does_not_matter() -> None:
    holders = [((0, 1), (2, 3)), ((1, 2), (0, 1)), ((2, 3), (0, 3)), ((0, 3), (1, 2))]
    replies = [reply(residents, 1.0 + i, i) for i, residents in enumerate(holders)]
    forward, backward = folded(replies), folded(replies[::-1])
    torch.testing.assert_close(forward.shared, backward.shared, rtol=0, atol=1e-6)
    for key, value in forward.rows.items():
        torch.testing.assert_close(value, backward.rows[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.3, 12345.0])
def test_a_single_reply_comes_through_bit_for_bit(weight: float) -> None:
    residents = ((1, 3), (0,))
    only = reply(residents, weight, 0)
    mean = folded([only])
    assert torch.equal(SPEC.pack_shared(mean.shared_means()), only.shared)
    assert torch.equal(SPEC.pack_experts(mean.rows, residents), only.experts)


def test_equal_replies_give_themselves_bit_for_bit() -> None:
    one = reply(ALL, 3.0, 0)
    mean = folded([one, Reply(one.shared, one.experts, ALL, 0.7), one])
    assert torch.equal(mean.shared, one.shared)
    assert torch.equal(SPEC.pack_experts(mean.rows), one.experts)


def test_an_expert_of_one_holder_comes_through_bit_for_bit_among_others() -> None:
    lone = reply(((0, 2), (1,)), 2.0, 0)
    mean = folded([reply(((0, 1), (0,)), 5.0, 1), lone, reply(((0, 3), (2, 3)), 1.0, 2)])
    pieces = SPEC.split_experts(lone.experts, lone.residents)
    assert torch.equal(mean.rows[SPEC.expert[0].key][2], pieces[SPEC.expert[0].key][1])
    assert torch.equal(mean.rows[SPEC.expert[2].key][1], pieces[SPEC.expert[2].key][0])


def test_experts_that_nobody_returned_are_listed() -> None:
    mean = folded([reply(((0, 3), (1,)), 1.0, 0), reply(((0,), (1, 2)), 1.0, 1)])
    assert mean.missing_experts() == [(0, 1), (0, 2), (1, 0), (1, 3)]
    assert mean.returned(0).tolist() == [0, 3]
    assert mean.returned(1).tolist() == [1, 2]


def test_nobody_replied() -> None:
    mean = HolderMean(SPEC)
    assert mean.shared_means() == {}
    assert len(mean.missing_experts()) == LAYERS * EXPERTS
    assert mean.returned(0).tolist() == []


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused_before_anything_changes(weight: float) -> None:
    first = reply(ALL, 1.0, 0)
    mean = folded([first])
    with pytest.raises(ValueError, match="weight must be > 0"):
        mean.fold(first.shared, first.experts, ALL, weight)
    assert mean.shared_weight == 1.0
    assert torch.equal(mean.shared, first.shared)


@pytest.mark.parametrize("short", ["shared", "experts"])
def test_a_reply_of_the_wrong_size_is_refused_before_anything_changes(short: str) -> None:
    first = reply(ALL, 1.0, 0)
    mean = folded([first])
    vectors = {"shared": first.shared, "experts": first.experts}
    vectors[short] = vectors[short][:1]
    with pytest.raises(ValueError, match="shape"):
        mean.fold(**vectors, residents=ALL, weight=1.0)
    assert mean.shared_weight == 1.0
    assert mean.expert_weight.unique().tolist() == [1.0]
    assert torch.equal(mean.shared, first.shared)


def test_folding_leaves_the_reply_as_it_was() -> None:
    first, second = reply(ALL, 1.0, 0), reply(ALL, 1.0, 1)
    copies = [t.clone() for t in (first.shared, first.experts, second.shared, second.experts)]
    folded([first, second])
    after = [first.shared, first.experts, second.shared, second.experts]
    assert all(map(torch.equal, after, copies))


@settings(max_examples=40, deadline=None)
@given(
    layouts=st.lists(
        st.tuples(*[st.sets(st.integers(0, EXPERTS - 1)).map(lambda s: tuple(sorted(s)))] * LAYERS),
        min_size=1,
        max_size=6,
    ),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_layout_equals_the_brute_force_mean(
    layouts: list[Residents], weights: list[float], seed: int
) -> None:
    assert_is_brute_force(
        [reply(r, w, seed + i) for i, (r, w) in enumerate(zip(layouts, weights, strict=False))]
    )


GATE, WEIGHT = "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.w"
ROUTED = StateSpec(
    shared=(Entry("embed", (1,), None), Entry(GATE, (3, 2), None), Entry("norm", (1,), None)),
    expert=(Entry(WEIGHT, (3, 1), 0),),
    num_layers=1,
    num_experts=3,
)
TWO = (
    (torch.tensor([8.0, 1, 2, 3, 4, 5, 6, 1]), torch.tensor([10.0, 20]), [[0, 1]], 1.0),
    (torch.tensor([4.0, 9, 8, 7, 6, 5, 4, 3]), torch.tensor([40.0, 60]), [[1, 2]], 3.0),
)
"""Experts 0, 1, 2 have the holders first, both, second; weights 1 and 3."""


def two(rows: str, weights: tuple[Tensor, Tensor] | None = None) -> HolderMean:
    mean = HolderMean(ROUTED, rows)
    for i, (shared, experts, held, weight) in enumerate(TWO):
        mean.fold(shared, experts, held, weight, None if weights is None else [weights[i]])
    return mean


def test_router_rows_over_all_or_over_holders_by_hand() -> None:
    over_all, over_holders = two("all"), two("holders")
    assert over_all.shared_means()[GATE].tolist() == [[7.0, 6.5], [6.0, 5.5], [5.0, 4.5]]
    assert over_holders.rows[GATE].tolist() == [[1.0, 2.0], [6.0, 5.5], [5.0, 4.0]]
    # Only the router changes sides.
    assert [entry.key for entry in over_all.row_entries] == [WEIGHT]
    assert [entry.key for entry in over_holders.row_entries] == [WEIGHT, GATE]
    assert sorted(over_holders.shared_means()) == ["embed", "norm"]
    assert torch.equal(over_all.rows[WEIGHT], over_holders.rows[WEIGHT])
    for key in ("embed", "norm"):
        assert torch.equal(over_all.shared_means()[key], over_holders.shared_means()[key])


def test_a_router_row_that_no_holder_returned_is_nobodys() -> None:
    mean = HolderMean(ROUTED, "holders")
    shared, experts, held, weight = TWO[0]
    mean.fold(shared, experts, held, weight)
    assert mean.returned(0).tolist() == [0, 1]


def test_in_partitioned_routing_router_rows_are_holders_rows_anyway() -> None:
    gate = Entry(GATE, (3, 2), 0)
    spec = StateSpec(ROUTED.shared[:1], (gate, *ROUTED.expert), num_layers=1, num_experts=3)
    assert HolderMean(spec, "all").row_entries == HolderMean(spec, "holders").row_entries


@pytest.mark.parametrize("rows", ["all", "holders"])
def test_expert_weights_by_hand(rows: str) -> None:
    mean = two(rows, (torch.tensor([5, 1]), torch.tensor([4, 2])))
    # Shared keys keep the reply's own weight.
    assert mean.shared_means()["embed"].tolist() == [(8 * 1 + 4 * 3) / 4]
    assert mean.rows[WEIGHT].flatten().tolist() == [10.0, (20 * 1 + 40 * 4) / 5, 60.0]
    assert mean.expert_weight.tolist() == [[5.0, 5.0, 2.0]]
    if rows == "holders":
        torch.testing.assert_close(mean.rows[GATE][1], torch.tensor([(3 + 28) / 5, (4 + 24) / 5]))
    else:
        assert mean.shared_means()[GATE][1].tolist() == [6.0, 5.5]


def test_an_expert_weight_of_zero_has_no_say() -> None:
    mean = two("holders", (torch.tensor([0, 3]), torch.tensor([0, 0])))
    assert mean.rows[WEIGHT][1].tolist() == [20.0]
    assert mean.rows[GATE][1].tolist() == [3.0, 4.0]
    assert mean.returned(0).tolist() == [1]
    assert mean.missing_experts() == [(0, 0), (0, 2)]
    assert mean.expert_count.tolist() == [[0, 1, 0]]
    # Both replies count for what is shared.
    assert mean.shared_count == 2
    assert mean.shared_means()["embed"].tolist() == [5.0]


@pytest.mark.parametrize("bad", [[1.0, -1.0], [1.0, float("nan")], [1.0]], ids=str)
def test_other_expert_weights_are_refused_before_anything_changes(bad: list[float]) -> None:
    mean = two("all")
    before = mean.shared.clone()
    shared, experts, held, weight = TWO[0]
    with pytest.raises(ValueError, match="expert weights must be >= 0, one for each resident"):
        mean.fold(shared, experts, held, weight, [torch.tensor(bad)])
    assert torch.equal(mean.shared, before)
    assert (mean.shared_count, mean.shared_weight) == (2, 4.0)


def test_counts_are_those_of_replies_not_of_weights() -> None:
    mean = two("all")
    assert mean.shared_count == 2
    assert mean.expert_count.tolist() == [[1, 2, 1]]
    assert mean.expert_weight.tolist() == [[1.0, 4.0, 3.0]]


@settings(max_examples=40, deadline=None)
@given(
    layouts=st.lists(
        st.tuples(*[st.sets(st.integers(0, EXPERTS - 1)).map(lambda s: tuple(sorted(s)))] * LAYERS),
        min_size=1,
        max_size=5,
    ),
    weights=st.lists(st.sampled_from([0, 1, 3, 100]), min_size=40, max_size=40),
    seed=st.integers(0, 1000),
)
def test_expert_weights_and_disagreement_equal_brute_force(
    layouts: list[Residents], weights: list[int], seed: int
) -> None:
    replies = [reply(residents, 2.0, seed + i) for i, residents in enumerate(layouts)]
    mean, drawn = HolderMean(SPEC), iter(weights)
    copies: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
    for r in replies:
        given_weights = [torch.tensor([next(drawn) for _ in held]) for held in r.residents]
        mean.fold(r.shared, r.experts, r.residents, r.weight, given_weights)
        pieces = SPEC.split_experts(r.experts, r.residents)
        for layer, held in enumerate(r.residents):
            for row, expert in enumerate(held):
                keys = [e.key for e in SPEC.expert if e.layer == layer]
                copy = torch.cat([pieces[key][row].flatten() for key in keys]).double()
                copies.setdefault((layer, expert), []).append(
                    (copy, int(given_weights[layer][row]))
                )
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            heard = [(c, w) for c, w in copies.get((layer, expert), []) if w]
            assert mean.expert_count[layer, expert] == len(heard)
            total = sum(w for _, w in heard)
            assert mean.expert_weight[layer, expert] == total
            apart = 0.0
            if heard:
                centre = torch.stack([c * w for c, w in heard]).sum(0) / total
                keys = [e.key for e in SPEC.expert if e.layer == layer]
                row = torch.cat([mean.rows[key][expert].flatten() for key in keys])
                torch.testing.assert_close(row.double(), centre, rtol=1e-5, atol=1e-6)
                squares = [float((c - centre).square().sum()) * w for c, w in heard]
                apart = (sum(squares) / total) ** 0.5
            assert float(mean.disagreement()[layer, expert]) == pytest.approx(apart, rel=1e-5)


def test_disagreement_of_equal_and_of_nearly_equal_copies() -> None:
    one = reply(ALL, 3.0, 0)
    assert folded([one, one, Reply(one.shared, one.experts, ALL, 0.7)]).disagreement().eq(0).all()
    # Far below what a difference of two large mean squares could still see.
    near = Reply(one.shared, one.experts * 1000, ALL, 1.0)
    nearer = Reply(one.shared, one.experts * 1000 + 1e-2, ALL, 1.0)
    apart = folded([near, nearer]).disagreement()
    sizes = torch.tensor([8.0, 6.0]).sqrt()[:, None].expand(-1, EXPERTS)
    torch.testing.assert_close(apart.float(), sizes * 0.5e-2, rtol=2e-2, atol=0)


def test_one_number_for_each_expert_is_averaged_over_holders_too() -> None:
    bias = Entry("model.layers.0.mlp.gate.e_score_correction_bias", (3,), 0, is_parameter=False)
    spec = StateSpec((), (bias, *ROUTED.expert), num_layers=1, num_experts=3)
    mean = HolderMean(spec)
    mean.fold(torch.empty(0), torch.tensor([1.0, 2, 10, 20]), [[0, 1]], 1.0)
    mean.fold(torch.empty(0), torch.empty(0), [[]], 1.0)
    mean.fold(torch.empty(0), torch.tensor([6.0, 8, 40, 60]), [[1, 2]], 1.0)
    assert mean.rows[bias.key].tolist() == [1.0, 4.0, 8.0]
    torch.testing.assert_close(mean.disagreement(), torch.tensor([[0.0, 104**0.5, 0.0]]).double())
