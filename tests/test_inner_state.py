"""The inner optimizer's state: every expert's Adam is its own, whatever its neighbours' age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fomoe_flwr.config import LocalSettings
from fomoe_flwr.inner_state import InnerState
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.routing import RoutingMode
from fomoe_flwr.training import make_optimizer

NUM_EXPERTS, NUM_LAYERS, ROW = 6, 2, (3, 4)
LOCAL = LocalSettings(lr=1e-2, fresh_expert_warmup_steps=0, weight_decay=0.0)
FIRST, SECOND = ((0, 1, 3), (2, 4)), ((1, 3, 5), (0, 4))


class TinyExperts(nn.Module):
    """Two layers of one expert tensor each and a shared matrix, under a real model's names."""

    def __init__(self, residents: Residents) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.shared = nn.Linear(4, 3, bias=False)
        layers = []
        for held in residents:
            layer, layer.mlp, layer.mlp.experts = nn.Module(), nn.Module(), nn.Module()
            layer.mlp.experts.down_proj = nn.Parameter(torch.zeros(len(held), *ROW))
            layers.append(layer)
        self.model.layers = nn.ModuleList(layers)

    def expert(self, layer: int) -> nn.Parameter:
        return self.model.layers[layer].mlp.experts.down_proj


Weights = dict[tuple[int, int], Tensor]


def gradient(layer: int, expert: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * expert + layer)
    return torch.randn(ROW, generator=generator)


def starting_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        (layer, expert): torch.randn(ROW, generator=generator)
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
    }


class Worker:
    """One worker's round: experts in, optimizer steps on made-up gradients, experts out."""

    def __init__(
        self, residents: Residents, weights: Weights, shared: Tensor, local: LocalSettings = LOCAL
    ) -> None:
        self.residents, self.local = residents, local
        self.model = TinyExperts(residents)
        with torch.no_grad():
            self.model.model.shared.weight.copy_(shared)
            for layer, held in enumerate(residents):
                for row, expert in enumerate(held):
                    self.model.expert(layer)[row] = weights[layer, expert]
        self.optimizer = make_optimizer(self.model, local)
        self.inner = InnerState(self.model, local, RoutingMode.SKIP_TOKEN, residents)

    def train(self, steps: Sequence[int], rates: Mapping[int, float] | None = None) -> None:
        for step in steps:
            rate = (rates or {}).get(step, self.local.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.model.model.shared.weight.grad = gradient(9, 0, step)[:, :4].clone()
            for layer, held in enumerate(self.residents):
                grads = [gradient(layer, expert, step) for expert in held]
                self.model.expert(layer).grad = torch.stack(grads)
            self.inner.step(self.optimizer, rate)

    def export(self, weights: Weights) -> Tensor:
        for layer, held in enumerate(self.residents):
            for row, expert in enumerate(held):
                weights[layer, expert] = self.model.expert(layer).detach()[row].clone()
        return self.model.model.shared.weight.detach().clone()

    def moments(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state[self.model.expert(layer)]
        row = list(self.residents[layer]).index(expert)
        return state["exp_avg"][row].clone(), state["exp_avg_sq"][row].clone()


def federated(
    rounds: Sequence[tuple[Residents, Sequence[int]]],
    folder: Path,
    local: LocalSettings = LOCAL,
    rates: Mapping[int, float] | None = None,
) -> tuple[Weights, Tensor]:
    """Play rounds with a stop, a file and a new process between any two of them."""
    weights, shared = starting_weights(), torch.ones(3, 4)
    for number, (residents, steps) in enumerate(rounds):
        worker = Worker(residents, weights, shared, local)
        worker.inner.restore(worker.optimizer, folder / f"{number - 1}.safetensors")
        worker.train(steps, rates)
        worker.inner.save(worker.optimizer, folder / f"{number}.safetensors")
        shared = worker.export(weights)
    return weights, shared


def separate_adams(
    rounds: Sequence[tuple[Residents, Sequence[int]]],
    local: LocalSettings = LOCAL,
    rates: Mapping[int, float] | None = None,
) -> Weights:
    """Give every (layer, expert) a torch AdamW of its own, new whenever the expert comes anew."""
    weights = starting_weights()
    adams: dict[tuple[int, int], tuple[nn.Parameter, torch.optim.AdamW]] = {}
    ages: dict[tuple[int, int], int] = {}
    for number, (residents, steps) in enumerate(rounds):
        held = {(layer, e) for layer, row in enumerate(residents) for e in row}
        adams = {place: adam for place, adam in adams.items() if place in held}
        for place in held - adams.keys():
            leaf = nn.Parameter(weights[place].clone())
            adams[place] = (
                leaf,
                torch.optim.AdamW(
                    [leaf],
                    betas=(local.beta1, local.beta2),
                    eps=local.eps,
                    weight_decay=local.weight_decay,
                ),
            )
            ages[place] = 0 if number else 10**9
        for step in steps:
            for place, (leaf, adam) in adams.items():
                warmup = local.fresh_expert_warmup_steps
                share = (ages[place] + 1) / warmup if ages[place] < warmup else 1.0
                adam.param_groups[0]["lr"] = (rates or {}).get(step, local.lr) * share
                leaf.grad = gradient(*place, step)
                adam.step()
                ages[place] += 1
        for place, (leaf, _) in adams.items():
            weights[place] = leaf.detach().clone()
    return weights


def assert_close(got: Weights, want: Weights) -> None:
    assert got.keys() == want.keys()
    for place, value in want.items():
        torch.testing.assert_close(got[place], value, rtol=1e-6, atol=1e-6, msg=str(place))


def test_stopping_between_rounds_changes_no_bit(tmp_path: Path) -> None:
    parts = [(FIRST, range(5)), (FIRST, range(5, 10)), (FIRST, range(10, 15))]
    weights, shared = federated(parts, tmp_path)
    whole = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    whole.train(range(15))
    expected = starting_weights()
    assert torch.equal(whole.export(expected), shared)
    assert all(torch.equal(weights[place], value) for place, value in expected.items())


def test_a_worker_that_never_moved_is_plain_adamw(tmp_path: Path) -> None:
    local = replace(LOCAL, fresh_expert_warmup_steps=8, weight_decay=0.1)
    rounds = [(FIRST, range(4)), (FIRST, range(4, 8))]
    assert_close(federated(rounds, tmp_path, local)[0], separate_adams(rounds, local))


def test_kept_experts_keep_their_moments_and_new_ones_start_at_zero(tmp_path: Path) -> None:
    weights, shared, path = starting_weights(), torch.ones(3, 4), tmp_path / "0.safetensors"
    old = Worker(FIRST, weights, shared)
    old.train(range(5))
    old.inner.save(old.optimizer, path)
    new = Worker(SECOND, weights, shared)
    new.inner.restore(new.optimizer, path)
    for layer, expert in ((0, 1), (0, 3), (1, 4)):
        assert all(map(torch.equal, new.moments(layer, expert), old.moments(layer, expert)))
        assert all(moment.any() for moment in new.moments(layer, expert))
    for layer, expert in ((0, 5), (1, 0)):
        assert not any(moment.any() for moment in new.moments(layer, expert))
    assert new.inner.num_fresh_experts == 2
    assert not new.inner.is_fresh


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("warmup", [0, 3, 8])
@pytest.mark.parametrize(
    "rounds",
    [
        [(FIRST, range(1)), (SECOND, range(1, 6))],
        [(FIRST, range(20)), (SECOND, range(20, 25))],
        [(FIRST, range(4)), (((2, 4, 5), (0, 1)), range(4, 8))],
        [(FIRST, range(6)), (SECOND, range(6, 8)), (((0, 1, 5), (2, 4)), range(8, 14))],
        [(FIRST, range(3)), (SECOND, range(3, 6)), (SECOND, range(6, 12))],
    ],
    ids=["young", "old", "all-new", "three-ages", "stays"],
)
def test_every_expert_is_updated_as_by_its_own_adamw(
    rounds: list[tuple[Residents, Sequence[int]]],
    warmup: int,
    weight_decay: float,
    tmp_path: Path,
) -> None:
    local = replace(LOCAL, fresh_expert_warmup_steps=warmup, weight_decay=weight_decay)
    rates = {step: 1e-2 * (1 + step % 3) for step in range(30)}
    expected = separate_adams(rounds, local, rates)
    assert_close(federated(rounds, tmp_path, local, rates)[0], expected)


@pytest.mark.parametrize("age", range(4))
def test_warm_up_scales_a_new_experts_rate_by_its_age_plus_one(age: int, tmp_path: Path) -> None:
    """At zero moments and constant gradients Adam's step is the rate itself."""
    local, path = replace(LOCAL, fresh_expert_warmup_steps=3), tmp_path / "0.safetensors"
    weights, shared = starting_weights(), torch.ones(3, 4)
    old = Worker(FIRST, weights, shared, local)
    old.train(range(7))
    old.inner.save(old.optimizer, path)
    new = Worker(SECOND, weights, shared, local)
    new.inner.restore(new.optimizer, path)
    for _ in range(age + 1):
        before = new.model.expert(0)[2].detach().clone()
        new.train([7])
    moved = (new.model.expert(0)[2].detach() - before).abs()
    expected = torch.full(ROW, local.lr * min(1.0, (age + 1) / 3))
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)


def test_shared_weights_never_notice_a_reshuffle(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "stayed").mkdir()
    moved = federated([(FIRST, range(4)), (SECOND, range(4, 8))], tmp_path / "moved")[1]
    stayed = federated([(FIRST, range(4)), (FIRST, range(4, 8))], tmp_path / "stayed")[1]
    assert torch.equal(moved, stayed)


def test_the_cursor_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    worker.train(range(1))
    worker.inner.cursor = {"position": 7, "buffer": [1, 2], "stream": {"shard": None}}
    worker.inner.save(worker.optimizer, path)
    again = Worker(SECOND, starting_weights(), torch.ones(3, 4))
    again.inner.restore(again.optimizer, path)
    assert again.inner.cursor == worker.inner.cursor


def test_without_keep_inner_state_only_the_cursor_survives(tmp_path: Path) -> None:
    local, path = replace(LOCAL, keep_inner_state=False), tmp_path / "0.safetensors"
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4), local)
    worker.train(range(3))
    worker.inner.cursor = {"position": 3}
    worker.inner.save(worker.optimizer, path)
    with safe_open(path, framework="pt") as stored:
        assert not [name for name in stored.keys() if name.startswith("exp_avg")]  # noqa: SIM118
    again = Worker(SECOND, starting_weights(), torch.ones(3, 4), local)
    again.inner.restore(again.optimizer, path)
    assert again.inner.cursor == {"position": 3}
    assert again.inner.is_fresh
    assert again.inner.num_fresh_experts == 0
    assert not again.optimizer.state
    fresh = Worker(SECOND, starting_weights(), torch.ones(3, 4), local)
    again.train(range(4))
    fresh.train(range(4))
    assert torch.equal(again.model.expert(0), fresh.model.expert(0))


def test_sgd_keeps_cursor_and_ages_and_steps_plainly(tmp_path: Path) -> None:
    local, path = replace(LOCAL, optimizer="sgd"), tmp_path / "0.safetensors"
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4), local)
    worker.train(range(3))
    worker.inner.cursor = {"position": 3}
    worker.inner.save(worker.optimizer, path)
    again = Worker(SECOND, starting_weights(), torch.ones(3, 4), local)
    again.inner.restore(again.optimizer, path)
    assert again.inner.cursor == {"position": 3}
    assert again.inner.num_fresh_experts == 2
    again.train([0])
    expected = starting_weights()[0, 5] - local.lr * gradient(0, 5, 0)
    torch.testing.assert_close(again.model.expert(0)[2].detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "a folder"])
def test_a_file_that_cannot_be_read_means_a_fresh_start(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    worker.train(range(3))
    worker.inner.cursor = {"position": 3}
    worker.inner.save(worker.optimizer, path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        content = {"empty": b"", "truncated": whole[:-5], "garbage": b"x" * len(whole)}
        path.write_bytes(content[damage])
    again = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    again.inner.restore(again.optimizer, path)
    assert again.inner.is_fresh
    assert again.inner.cursor == {}
    assert not again.optimizer.state
    again.train(range(2))
    fresh = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    fresh.train(range(2))
    assert torch.equal(again.model.expert(0), fresh.model.expert(0))
