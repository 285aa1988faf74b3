"""Routing metrics against plain loops, hand numbers and, sampled, the closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from fake_block import OneBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import micro_model
from torch import Tensor, nn

from fomoe_flwr.model import routing_metrics as measure
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe, RoutingCounts, chosen_experts

LOADS = st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any)


def counts_of(load: list[list[int]], ghosts: list[int], all_ghost: list[int], tokens: int):
    return RoutingCounts(torch.tensor(load), torch.tensor(ghosts), torch.tensor(all_ghost), tokens)


def test_ghost_shares_by_hand() -> None:
    counts = counts_of([[3, 1, 4], [0, 8, 0]], [2, 8], [1, 4], 4)
    assert measure.ghost_share(counts).tolist() == [2 / 8, 1.0]
    assert measure.all_ghost_share(counts).tolist() == [1 / 4, 1.0]


def test_pooled_counts_are_sums() -> None:
    one = counts_of([[3, 1]], [2], [1], 2)
    other = counts_of([[0, 8]], [5], [2], 4)
    both = measure.pool([one, other])
    assert both.load.tolist() == [[3, 9]]
    assert (both.ghosts.tolist(), both.all_ghost.tolist(), both.tokens) == ([7], [3], 6)


def test_nothing_routed_has_no_shares() -> None:
    counts = counts_of([[0, 0]], [0], [0], 0)
    for value in (
        measure.ghost_share(counts),
        measure.all_ghost_share(counts),
        measure.load_entropy(counts.load),
        measure.load_kl(counts.load),
        measure.max_violation(counts.load),
        measure.load_variation(counts.load),
        measure.dead_share(counts.load),
    ):
        assert value.isnan().all()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "percent"),
    # Section 2.4 of the dossier, for overlap over workers of 1/2, 1/4 and 1/8.
    [(8, 2, (21.4, 53.6, 75.0)), (16, 4, (3.8, 27.2, 55.0)), (32, 8, (0.12, 7.0, 29.5))],
)
def test_the_closed_form_gives_the_numbers_of_the_dossier(
    num_experts: int, top_k: int, percent: tuple[float, ...]
) -> None:
    for part, expected in zip((2, 4, 8), percent, strict=True):
        found = measure.uniform_all_ghost_share(num_experts, num_experts // part, top_k)
        assert 100 * found == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("num_experts", "residents", "top_k"), [(6, 2, 2), (7, 3, 3), (5, 4, 2)])
def test_the_closed_forms_equal_an_enumeration(
    num_experts: int, residents: int, top_k: int
) -> None:
    choices = list(combinations(range(num_experts), top_k))
    ghosts = [sum(expert >= residents for expert in choice) for choice in choices]
    assert measure.uniform_ghost_share(num_experts, residents) == pytest.approx(
        sum(ghosts) / (len(choices) * top_k)
    )
    assert measure.uniform_all_ghost_share(num_experts, residents, top_k) == pytest.approx(
        sum(number == top_k for number in ghosts) / len(choices)
    )


def test_the_closed_forms_at_their_ends() -> None:
    assert measure.uniform_all_ghost_share(8, 8, 2) == measure.uniform_ghost_share(8, 8) == 0
    assert measure.uniform_all_ghost_share(8, 0, 2) == measure.uniform_ghost_share(8, 0) == 1
    assert measure.uniform_all_ghost_share(8, 7, 2) == 0


@pytest.mark.parametrize(
    ("num_experts", "residents", "top_k"),
    [(8, 4, 2), (8, 1, 2), (16, 8, 4), (12, 6, 2), (32, 4, 8)],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_routing_meets_the_closed_forms_within_four_sigma(
    num_experts: int, residents: int, top_k: int, seed: int
) -> None:
    tokens = 20_000
    model = OneBlock(num_experts, residents, top_k)
    probe = RouterProbe(model, num_experts)
    generator = torch.Generator().manual_seed(seed)
    model(torch.rand(tokens, num_experts, generator=generator))

    share = measure.uniform_ghost_share(num_experts, residents)
    # A token's number of ghosts is hypergeometric: its choices are distinct.
    spread = top_k * share * (1 - share) * (num_experts - top_k) / (num_experts - 1)
    sigma = math.sqrt(spread / tokens) / top_k
    assert abs(float(measure.ghost_share(probe.counts)) - share) < 4 * sigma

    rate = measure.uniform_all_ghost_share(num_experts, residents, top_k)
    sigma = math.sqrt(rate * (1 - rate) / tokens)
    assert abs(float(measure.all_ghost_share(probe.counts)) - rate) < 4 * sigma

    # Even routing has an even load: MaxVio is the largest of E deviations.
    assert float(measure.load_entropy(probe.counts.load)) > 0.999
    assert float(measure.max_violation(probe.counts.load)) < 5 * math.sqrt(num_experts / tokens)


def test_balance_by_hand() -> None:
    load = torch.tensor([6, 2, 0, 0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(measure.load_entropy(load)) == pytest.approx(entropy / math.log(4))
    assert float(measure.load_kl(load)) == pytest.approx(math.log(4) - entropy)
    assert float(measure.max_violation(load)) == pytest.approx(2.0)
    assert float(measure.load_variation(load)) == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert float(measure.dead_share(load)) == 0.5


def test_an_expert_is_dead_below_a_tenth_of_an_even_share() -> None:
    # Of 1000 assignments to four experts an even share is 250.
    assert float(measure.dead_share(torch.tensor([25, 325, 325, 325]))) == 0
    assert float(measure.dead_share(torch.tensor([24, 326, 325, 325]))) == 0.25


@pytest.mark.parametrize("num_experts", [1, 2, 5, 64])
def test_even_loads_and_collapse_are_the_ends_of_every_range(num_experts: int) -> None:
    even = torch.full((num_experts,), 7)
    assert float(measure.load_entropy(even)) == pytest.approx(1)
    assert float(measure.load_kl(even)) == pytest.approx(0, abs=1e-12)
    assert float(measure.max_violation(even)) == pytest.approx(0, abs=1e-12)
    assert float(measure.load_variation(even)) == pytest.approx(0, abs=1e-12)
    assert float(measure.dead_share(even)) == 0
    if num_experts > 1:
        collapsed = torch.zeros(num_experts, dtype=torch.long)
        collapsed[-1] = 9
        assert float(measure.load_entropy(collapsed)) == pytest.approx(0, abs=1e-12)
        assert float(measure.load_kl(collapsed)) == pytest.approx(math.log(num_experts))
        assert float(measure.max_violation(collapsed)) == pytest.approx(num_experts - 1)
        assert float(measure.load_variation(collapsed)) == pytest.approx(math.sqrt(num_experts - 1))
        assert float(measure.dead_share(collapsed)) == pytest.approx(1 - 1 / num_experts)


@settings(max_examples=200)
@given(LOADS)
def test_balance_equals_plain_loops_and_keeps_its_range(load: list[int]) -> None:
    tensor, count, total = torch.tensor(load), len(load), sum(load)
    share = [n / total for n in load]
    entropy = -sum(f * math.log(f) for f in share if f)
    mean = total / count
    deviation = math.sqrt(sum((n - mean) ** 2 for n in load) / count)
    expected = {
        measure.load_entropy: (entropy / math.log(count), 1),
        measure.load_kl: (math.log(count) - entropy, math.log(count)),
        measure.max_violation: (max(load) / mean - 1, count - 1),
        measure.load_variation: (deviation / mean, math.sqrt(count - 1)),
        measure.dead_share: (sum(10 * n * count < total for n in load) / count, 1),
    }
    for function, (value, most) in expected.items():
        found = float(function(tensor))
        assert found == pytest.approx(value, abs=1e-9), function.__name__
        assert -1e-9 <= found <= most + 1e-9, function.__name__


def test_layers_are_measured_each_on_its_own() -> None:
    loads = torch.tensor([[4, 4], [8, 0], [0, 0]])
    assert measure.max_violation(loads).tolist()[:2] == [0, 1]
    assert measure.load_entropy(loads).tolist()[:2] == [1, 0]
    assert measure.dead_share(loads).tolist()[:2] == [0, 0.5]
    assert measure.dead_share(loads)[2].isnan()


def test_router_cosine_by_hand() -> None:
    assert measure.router_cosine(torch.eye(3)) == 0
    assert measure.router_cosine(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(1)
    assert measure.router_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-1)
    # Three rows at 120 degrees: the least there is, -1 / (E - 1).
    rows = torch.tensor([[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]])
    assert measure.router_cosine(rows) == pytest.approx(-0.5)
    assert measure.router_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 0
    assert math.isnan(measure.router_cosine(torch.ones(1, 4)))


def test_router_cosine_equals_a_loop_over_pairs() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    pairs = [
        float(nn.functional.cosine_similarity(weight[i], weight[j], dim=0))
        for i, j in combinations(range(7), 2)
    ]
    assert measure.router_cosine(weight) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def some_choices(*shape: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, num_experts, generator=generator).topk(top_k).indices


def overlap_by_loop(one: Tensor, other: Tensor, top_k: int) -> float:
    pairs = list(zip(one.tolist(), other.tolist(), strict=True))
    return sum(len(set(a) & set(b)) for a, b in pairs) / (top_k * len(pairs))


def test_churn_equals_a_loop_over_tokens() -> None:
    before, after = (some_choices(3, 40, num_experts=8, top_k=3, seed=s) for s in (0, 1))
    expected = [1 - overlap_by_loop(a, b, 3) for a, b in zip(before, after, strict=True)]
    assert measure.churn(before, after, 8).tolist() == pytest.approx(expected)


def test_churn_by_hand_and_without_regard_to_order() -> None:
    before = torch.tensor([[[0, 1], [2, 3]]])
    assert measure.churn(before, before.flip(-1), 4).tolist() == [0]
    assert measure.churn(before, torch.tensor([[[2, 3], [0, 1]]]), 4).tolist() == [1]
    assert measure.churn(before, torch.tensor([[[0, 3], [3, 2]]]), 4).tolist() == [0.25]


def test_uniform_choices_churn_as_chance_does() -> None:
    """Two independent uniform sets share K^2 / E experts on average; four sigma."""
    before, after = (some_choices(1, 20_000, num_experts=16, top_k=4, seed=s) for s in (0, 1))
    p = 4 / 16
    sigma = math.sqrt(4 * p * (1 - p) * (16 - 4) / (16 - 1) / 20_000) / 4
    assert abs(float(measure.churn(before, after, 16)) - (1 - p)) < 4 * sigma


def test_agreement_equals_a_loop_over_pairs() -> None:
    choices = some_choices(4, 2, 30, num_experts=6, top_k=2)
    found = measure.agreement(choices, 6)
    assert found.shape == (4, 2)
    for layer in range(2):
        pairs = {
            (m, n): overlap_by_loop(choices[m, layer], choices[n, layer], 2)
            for m, n in combinations(range(4), 2)
        }
        assert float(found[:, layer].mean()) == pytest.approx(sum(pairs.values()) / len(pairs))
        for m in range(4):
            own = [value for pair, value in pairs.items() if m in pair]
            assert float(found[m, layer]) == pytest.approx(sum(own) / 3)


def test_agreement_of_equal_disjoint_and_single_workers() -> None:
    one = torch.tensor([[[0, 1]], [[2, 3]]])
    other = torch.tensor([[[3, 2]], [[2, 1]]])
    assert measure.agreement(torch.stack([one, one]), 4).tolist() == [[1, 1], [1, 1]]
    assert measure.agreement(torch.stack([one, other]), 4).tolist() == [[0, 0.5], [0, 0.5]]
    assert measure.agreement(one[None], 4).isnan().all()


def test_no_choice_agrees_with_nothing() -> None:
    one, other = torch.tensor([[[1, 4]]]), torch.tensor([[[1, 4]]])
    assert measure.agreement(torch.stack([one, other]), 4).tolist() == [[0.5], [0.5]]


def test_expert_drift_by_hand() -> None:
    distance = torch.tensor([[1.0, 3.0, 9.0], [0.0, 5.0, 5.0]])
    norm = torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 1.0]])
    copies = torch.tensor([[2, 3, 1], [1, 0, 1]])
    drift = measure.expert_drift(distance, norm, copies)
    assert float(drift[0]) == pytest.approx((0.5 + 1.5) / 2)
    assert drift[1].isnan()


def test_defined_mean_leaves_out_what_is_undefined() -> None:
    assert measure.defined_mean([1.0, math.nan, 2.0]) == 1.5
    assert math.isnan(measure.defined_mean([math.nan]))
    assert math.isnan(measure.defined_mean([]))


SHAPE = micro_model()
RESIDENTS = ((0, 2, 5), (1, 3, 4))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "glm4_moe", "fomoe"])
@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("residents", [None, RESIDENTS], ids=["full", "partial"])
def test_choices_are_those_of_the_routers_under_global_ids(
    family: str, routing: str, residents, of_family
) -> None:
    shape = replace(of_family(SHAPE, family), routing=routing)
    model = build_model(shape, transformers_config(shape, 8), residents, seed=5).train()
    windows = torch.randint(0, 260, (5, 7), generator=torch.Generator().manual_seed(0))
    probe = RouterProbe(model, shape.num_experts, residents)
    found = chosen_experts(model, windows, shape.num_experts, 2, residents, batch_size=2)
    assert model.training
    assert probe.counts.tokens == int(probe.counts.load.sum()) == 0
    probe.close()

    seen = {}
    for layer, block in enumerate(moe_blocks(model)):
        block.router.register_forward_hook(
            lambda _m, _i, out, layer=layer: seen.update({layer: out[-1].tolist()})
        )
    model.eval()(input_ids=windows, use_cache=False)
    assert found.shape == (2, 35, 2)
    for layer in range(2):
        slots = routing == "partitioned" and residents is not None
        expected = [
            sorted(residents[layer][s] if slots else s for s in token) for token in seen[layer]
        ]
        assert found[layer].tolist() == expected


def test_a_router_with_fewer_experts_than_choices_is_filled_up() -> None:
    shape = replace(SHAPE, routing="partitioned")
    model = build_model(shape, transformers_config(shape, 8), ((4,), (1, 3)), seed=5)
    found = chosen_experts(model, torch.ones(1, 4, dtype=torch.long), 6, 2, ((4,), (1, 3)))
    assert found.tolist() == [[[4, 6]] * 4, [[1, 3]] * 4]
