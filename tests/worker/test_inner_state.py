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
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.parameters.fragments import MOMENTS
from fomoe_flwr.parameters.keys import RoutingMode
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.training import make_optimizer

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


SHARED_KEY = "model.shared.weight"
KEYS = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(NUM_LAYERS)]
SPEC = StateSpec(
    shared=(Entry(SHARED_KEY, (3, 4), None),),
    expert=tuple(Entry(key, (NUM_EXPERTS, *ROW), layer) for layer, key in enumerate(KEYS)),
    num_layers=NUM_LAYERS,
    num_experts=NUM_EXPERTS,
)


def averaged(residents: Residents, seed: int, spec: StateSpec = SPEC) -> dict[str, Tensor]:
    """Make up what a server sends of one moment: positive, so that it serves for both."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.rand(spec.shared_size, generator=generator) + 0.1
    experts = torch.rand(spec.experts_size(residents), generator=generator) + 0.1
    return spec.split_shared(shared) | spec.split_experts(experts, residents)


def old_worker(path: Path, residents: Residents, local: LocalSettings = LOCAL) -> Worker:
    """Train under `FIRST` for four steps, stop, and come back with other residents."""
    weights, shared = starting_weights(), torch.ones(3, 4)
    first = Worker(FIRST, weights, shared, local)
    first.train(range(4))
    first.inner.save(first.optimizer, path)
    again = Worker(residents, weights, first.export(weights), local)
    again.inner.restore(again.optimizer, path)
    return again


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("state", ["no state", "own state", "moved"])
def test_both_averaged_moments_make_an_adamw_that_always_had_them(
    state: str, weight_decay: float, tmp_path: Path
) -> None:
    """Old and new experts alike: bias correction of the run's step, and no warm-up."""
    local = replace(LOCAL, fresh_expert_warmup_steps=8, weight_decay=weight_decay)
    residents = SECOND if state == "moved" else FIRST
    if state == "no state":
        worker = Worker(residents, starting_weights(), torch.ones(3, 4), local)
    else:
        worker = old_worker(tmp_path / "0.safetensors", residents, local)
    moments = {name: averaged(residents, seed) for seed, name in enumerate(MOMENTS)}
    worker.inner.adopt(worker.optimizer, moments, SPEC, 12)

    stock = TinyExperts(residents)
    with torch.no_grad():
        for mine, theirs in zip(stock.parameters(), worker.model.parameters(), strict=True):
            mine.copy_(theirs)
    # Decay is per group in `make_optimizer`: the made-up names are experts' and a plain matrix's.
    adam = torch.optim.AdamW(
        stock.parameters(),
        lr=local.lr,
        betas=(local.beta1, local.beta2),
        eps=local.eps,
        weight_decay=weight_decay,
    )
    for name, parameter in stock.named_parameters():
        adam.state[parameter] = {
            "step": torch.tensor(12.0),
            **{moment: moments[moment][name].clone() for moment in MOMENTS},
        }
    for step in range(12, 17):
        worker.train([step])
        stock.model.shared.weight.grad = gradient(9, 0, step)[:, :4].clone()
        for layer, held in enumerate(residents):
            grads = [gradient(layer, expert, step) for expert in held]
            stock.expert(layer).grad = torch.stack(grads)
        adam.step()
    for mine, theirs in zip(worker.model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for name in MOMENTS:
        for key, value in worker.inner.moments(worker.optimizer, name).items():
            found = adam.state[stock.get_parameter(key)][name]
            torch.testing.assert_close(value, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_single_moment_goes_to_old_rows_only(name: str, tmp_path: Path) -> None:
    worker = old_worker(tmp_path / "0.safetensors", SECOND)
    other = next(moment for moment in MOMENTS if moment != name)
    kept = {k: v.clone() for k, v in worker.inner.moments(worker.optimizer, other).items()}
    values = averaged(SECOND, 0)
    worker.inner.adopt(worker.optimizer, {name: values}, SPEC, 4)
    found = worker.inner.moments(worker.optimizer, name)
    # Of SECOND, expert 5 of layer 0 and expert 0 of layer 1 are new.
    for layer, fresh in enumerate(([False, False, True], [True, False])):
        for row, is_fresh in enumerate(fresh):
            expected = torch.zeros(ROW) if is_fresh else values[KEYS[layer]][row]
            assert torch.equal(found[KEYS[layer]][row], expected)
    assert torch.equal(found[SHARED_KEY], values[SHARED_KEY])
    for key, value in worker.inner.moments(worker.optimizer, other).items():
        assert torch.equal(value, kept[key])
    # The new ones go on as any new expert does.
    assert [ages.tolist() for ages in worker.inner._ages] == [[4, 4, 0], [0, 4]]


@pytest.mark.parametrize("name", MOMENTS)
def test_a_worker_without_any_state_takes_no_single_moment(name: str) -> None:
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    worker.inner.adopt(worker.optimizer, {name: averaged(FIRST, 0)}, SPEC, 4)
    plain = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    for each in (worker, plain):
        each.train(range(3))
    for mine, theirs in zip(worker.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("fragment", [0, 1])
def test_a_fragment_brings_its_slices_only(fragment: int, both: bool, tmp_path: Path) -> None:
    worker = old_worker(tmp_path / "0.safetensors", FIRST)
    names = MOMENTS if both else MOMENTS[:1]
    before = {
        name: {k: v.clone() for k, v in worker.inner.moments(worker.optimizer, name).items()}
        for name in MOMENTS
    }
    part = SPEC.fragment(fragment, 2)
    # Of three rows, the first fragment has one and the second two.
    rows = slice(0, 1) if fragment == 0 else slice(1, 3)
    assert [(e.key, e.start, e.shape[0]) for e in part.shared] == [
        (SHARED_KEY, rows.start, rows.stop - rows.start)
    ]
    moments = {name: averaged(FIRST, i, part) for i, name in enumerate(names)}
    worker.inner.adopt(worker.optimizer, moments, part, 4)
    for name in MOMENTS:
        expected = {key: value.clone() for key, value in before[name].items()}
        if name in names:
            expected[SHARED_KEY][rows] = moments[name][SHARED_KEY]
            expected[KEYS[fragment]] = moments[name][KEYS[fragment]]
        for key, value in worker.inner.moments(worker.optimizer, name).items():
            assert torch.equal(value, expected[key]), (name, key)
    # The same steps are behind everything, so the next one is plain.
    assert worker.inner._corrections() == []


def test_adopted_moments_are_stored_with_their_age(tmp_path: Path) -> None:
    worker = old_worker(tmp_path / "0.safetensors", SECOND)
    moments = {name: averaged(SECOND, seed) for seed, name in enumerate(MOMENTS)}
    worker.inner.adopt(worker.optimizer, moments, SPEC, 12)
    worker.inner.save(worker.optimizer, tmp_path / "1.safetensors")
    weights: Weights = starting_weights()
    shared = worker.export(weights)
    again = Worker(SECOND, weights, shared)
    again.inner.restore(again.optimizer, tmp_path / "1.safetensors")
    for each in (worker, again):
        each.train(range(4, 8))
    for mine, theirs in zip(worker.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
