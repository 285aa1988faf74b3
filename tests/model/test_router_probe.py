"""The probe's counts and balance loss against plain loops over what the routers returned."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_block import OneBlock
from micro import micro_model
from torch import nn
from transformers import PreTrainedModel

from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.worker.training_model import token_loss

SHAPE = micro_model()
RESIDENTS = ((0, 2, 5), (1,))
TOKENS = 2 * 7


class Routers:
    """Writes down (logits, chosen) of every router call, by layer."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[int, list[list[float]], list[list[int]]]] = []
        for layer, block in enumerate(moe_blocks(model)):
            block.router.register_forward_hook(
                lambda _m, _i, out, layer=layer: self.calls.append(
                    (layer, out[0].tolist(), out[2].tolist())
                )
            )


def model_of(routing: str = "skip_token", residents: Residents | None = None) -> PreTrainedModel:
    shape = replace(SHAPE, routing=routing)
    return build_model(shape, transformers_config(shape, 8), residents, seed=5)


def run(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(input_ids=torch.randint(0, 260, (2, 7), generator=generator), use_cache=False)


def brute_force(routers: Routers, residents: Residents, partitioned: bool) -> SimpleNamespace:
    load = [[0] * SHAPE.num_experts for _ in range(SHAPE.num_layers)]
    ghosts, all_ghost = [0, 0], [0, 0]
    for layer, _, chosen in routers.calls:
        for token in chosen:
            ids = [residents[layer][slot] for slot in token] if partitioned else token
            missing = [expert for expert in ids if expert not in residents[layer]]
            for expert in ids:
                load[layer][expert] += 1
            ghosts[layer] += len(missing)
            all_ghost[layer] += len(missing) == len(ids)
    return SimpleNamespace(load=load, ghosts=ghosts, all_ghost=all_ghost)


def balance_by_hand(routers: Routers) -> float:
    losses = []
    for _, logits, chosen in routers.calls:
        num_scored = len(logits[0])
        probability = [
            sum(torch.tensor(row).softmax(0)[e].item() for row in logits) / len(logits)
            for e in range(num_scored)
        ]
        flat = [expert for token in chosen for expert in token]
        share = [flat.count(e) / len(flat) for e in range(num_scored)]
        losses.append(num_scored * sum(f * p for f, p in zip(share, probability, strict=True)))
    return sum(losses) / len(losses)


def test_passes_count_however_their_loss_calls_the_model() -> None:
    """A loss that never holds all logits calls the base of the model, not the model."""
    model = model_of(residents=RESIDENTS)
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    for passes in (1, 2, 3):
        token_loss(model, torch.randint(0, 256, (2, 8)), chunked=True)
        assert float(probe.losses().balance) > 0
        assert probe.counts.tokens == passes * TOKENS


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_counts_equal_a_brute_force_count(routing: str) -> None:
    model = model_of(routing, RESIDENTS).train()
    routers = Routers(model)
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    run(model, 0)
    run(model, 1)
    expected = brute_force(routers, RESIDENTS, routing == "partitioned")
    counts = probe.counts
    assert counts.load.tolist() == expected.load
    assert counts.ghosts.tolist() == expected.ghosts
    assert counts.all_ghost.tolist() == expected.all_ghost
    assert counts.tokens == 2 * TOKENS
    assignments = sum(map(sum, expected.load))
    assert counts.ghost_fraction == sum(expected.ghosts) / assignments
    assert counts.all_ghost_fraction == sum(expected.all_ghost) / (2 * TOKENS * 2)
    if routing == "skip_token":
        assert assignments == 2 * TOKENS * 2 * SHAPE.top_k
        assert 0 < counts.all_ghost_fraction < counts.ghost_fraction < 1
    else:
        assert assignments == 2 * TOKENS * (2 + 1)
        assert counts.ghost_fraction == counts.all_ghost_fraction == 0


def test_partitioned_counts_stand_under_global_ids() -> None:
    model = model_of("partitioned", RESIDENTS).train()
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    run(model, 0)
    held = [set(row.nonzero().flatten().tolist()) for row in probe.counts.load]
    assert held[0] <= {0, 2, 5}
    assert held[1] == {1}
    assert probe.counts.load[1, 1] == TOKENS


def test_a_full_model_has_no_ghosts() -> None:
    model = model_of().train()
    probe = RouterProbe(model, SHAPE.num_experts)
    run(model, 0)
    assert int(probe.counts.load.sum()) == TOKENS * SHAPE.num_layers * SHAPE.top_k
    assert probe.counts.ghost_fraction == probe.counts.all_ghost_fraction == 0


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("residents", [None, RESIDENTS], ids=["full", "partial"])
def test_balance_loss_equals_its_formula(routing: str, residents: Residents | None) -> None:
    model = model_of(routing, residents).train()
    routers = Routers(model)
    probe = RouterProbe(model, SHAPE.num_experts, residents)
    run(model, 0)
    assert probe.losses().balance.item() == pytest.approx(balance_by_hand(routers), rel=1e-5)


def test_balance_loss_is_that_of_the_latest_forward_pass_only() -> None:
    model = model_of().train()
    probe = RouterProbe(model, SHAPE.num_experts)
    run(model, 0)
    first = probe.losses().balance.item()
    assert probe.losses().balance.item() == 0.0
    run(model, 1)
    probe.losses()
    run(model, 0)
    assert probe.losses().balance.item() == first


def test_balance_loss_moves_every_router_row_also_those_of_ghosts() -> None:
    model = model_of("skip_token", RESIDENTS).train()
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    run(model, 0)
    probe.losses().balance.backward()
    for block in moe_blocks(model):
        assert (block.router.weight.grad.abs().sum(-1) > 0).all()


def test_perfect_balance_with_uniform_probability_costs_one() -> None:
    model = OneBlock(4, 4, top_k=1)
    probe = RouterProbe(model, 4)
    model(1e-4 * torch.eye(4))
    assert probe.counts.load.tolist() == [[1, 1, 1, 1]]
    assert probe.losses().balance.item() == pytest.approx(1.0, abs=1e-6)


def test_a_collapsed_router_costs_the_number_of_experts() -> None:
    model = OneBlock(4, 4, top_k=1)
    probe = RouterProbe(model, 4)
    model(torch.tensor([[0.0, 100.0, 0.0, 0.0]] * 8))
    assert probe.losses().balance.item() == pytest.approx(4.0, rel=1e-6)


def test_balance_loss_by_hand() -> None:
    model = OneBlock(3, 3, top_k=2)
    probe = RouterProbe(model, 3)
    model(torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]).log())
    share, probability = [2 / 4, 1 / 4, 1 / 4], [0.55, 0.2, 0.25]
    expected = 3 * sum(f * p for f, p in zip(share, probability, strict=True))
    assert probe.losses().balance.item() == pytest.approx(expected, rel=1e-6)


def test_eval_mode_counts_nothing() -> None:
    model = model_of("skip_token", RESIDENTS).eval()
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    run(model, 0)
    assert int(probe.counts.load.sum()) == 0
    assert probe.counts.tokens == 0
    assert probe.counts.ghost_fraction == probe.counts.all_ghost_fraction == 0.0
    assert probe.losses().balance.item() == 0.0


def test_no_grad_counts_without_a_pending_loss() -> None:
    model = model_of().train()
    probe = RouterProbe(model, SHAPE.num_experts)
    with torch.no_grad():
        run(model, 0)
    assert probe.counts.tokens == TOKENS
    assert probe.losses().balance.item() == 0.0


def test_a_closed_probe_hears_nothing() -> None:
    model = model_of().train()
    probe = RouterProbe(model, SHAPE.num_experts)
    probe.close()
    run(model, 0)
    assert probe.counts.tokens == 0
