"""Moments that the server averaged: which optimizer states they reach, and which not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_worker import (
    FIRST,
    LOCAL,
    NUM_EXPERTS,
    NUM_LAYERS,
    ROW,
    SECOND,
    TinyExperts,
    Weights,
    Worker,
    gradient,
    starting_weights,
)
from torch import Tensor

from fomoe_flwr.config import LocalSettings
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.parameters.fragments import MOMENTS

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
    first.inner.save(path)
    again = Worker(residents, weights, first.export(weights), local)
    again.inner.restore(path)
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
    worker.inner.adopt(moments, SPEC, 12)

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
        for key, value in worker.inner.moments(name).items():
            found = adam.state[stock.get_parameter(key)][name]
            torch.testing.assert_close(value, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_single_moment_goes_to_old_rows_only(name: str, tmp_path: Path) -> None:
    worker = old_worker(tmp_path / "0.safetensors", SECOND)
    other = next(moment for moment in MOMENTS if moment != name)
    kept = {k: v.clone() for k, v in worker.inner.moments(other).items()}
    values = averaged(SECOND, 0)
    worker.inner.adopt({name: values}, SPEC, 4)
    found = worker.inner.moments(name)
    # Of SECOND, expert 5 of layer 0 and expert 0 of layer 1 are new.
    for layer, fresh in enumerate(([False, False, True], [True, False])):
        for row, is_fresh in enumerate(fresh):
            expected = torch.zeros(ROW) if is_fresh else values[KEYS[layer]][row]
            assert torch.equal(found[KEYS[layer]][row], expected)
    assert torch.equal(found[SHARED_KEY], values[SHARED_KEY])
    for key, value in worker.inner.moments(other).items():
        assert torch.equal(value, kept[key])
    # The new ones go on as any new expert does.
    assert [ages.tolist() for ages in worker.inner._ages] == [[4, 4, 0], [0, 4]]


@pytest.mark.parametrize("name", MOMENTS)
def test_a_worker_without_any_state_takes_no_single_moment(name: str) -> None:
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    worker.inner.adopt({name: averaged(FIRST, 0)}, SPEC, 4)
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
        name: {k: v.clone() for k, v in worker.inner.moments(name).items()} for name in MOMENTS
    }
    part = SPEC.fragment(fragment, 2)
    # Of three rows, the first fragment has one and the second two.
    rows = slice(0, 1) if fragment == 0 else slice(1, 3)
    assert [(e.key, e.start, e.shape[0]) for e in part.shared] == [
        (SHARED_KEY, rows.start, rows.stop - rows.start)
    ]
    moments = {name: averaged(FIRST, i, part) for i, name in enumerate(names)}
    worker.inner.adopt(moments, part, 4)
    for name in MOMENTS:
        expected = {key: value.clone() for key, value in before[name].items()}
        if name in names:
            expected[SHARED_KEY][rows] = moments[name][SHARED_KEY]
            expected[KEYS[fragment]] = moments[name][KEYS[fragment]]
        for key, value in worker.inner.moments(name).items():
            assert torch.equal(value, expected[key]), (name, key)
    # The same steps are behind everything, so the next one is plain.
    assert worker.inner._corrections() == []


def test_adopted_moments_are_stored_with_their_age(tmp_path: Path) -> None:
    worker = old_worker(tmp_path / "0.safetensors", SECOND)
    moments = {name: averaged(SECOND, seed) for seed, name in enumerate(MOMENTS)}
    worker.inner.adopt(moments, SPEC, 12)
    worker.inner.save(tmp_path / "1.safetensors")
    weights: Weights = starting_weights()
    shared = worker.export(weights)
    again = Worker(SECOND, weights, shared)
    again.inner.restore(tmp_path / "1.safetensors")
    for each in (worker, again):
        each.train(range(4, 8))
    for mine, theirs in zip(worker.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
