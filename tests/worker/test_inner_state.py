"""The inner optimizer's state: every expert's Adam is its own, whatever its neighbours' age."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_worker import (
    FIRST,
    LOCAL,
    ROW,
    SECOND,
    Worker,
    assert_close,
    federated,
    gradient,
    separate_adams,
    starting_weights,
)

from fomoe_flwr.model.residency import Residents


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
    old.inner.save(path)
    new = Worker(SECOND, weights, shared)
    new.inner.restore(path)
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
    old.inner.save(path)
    new = Worker(SECOND, weights, shared, local)
    new.inner.restore(path)
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
    worker.inner.save(path)
    again = Worker(SECOND, starting_weights(), torch.ones(3, 4))
    again.inner.restore(path)
    assert again.inner.cursor == worker.inner.cursor


def test_without_keep_inner_state_only_the_cursor_survives(tmp_path: Path) -> None:
    local, path = replace(LOCAL, keep_inner_state=False), tmp_path / "0.safetensors"
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4), local)
    worker.train(range(3))
    worker.inner.cursor = {"position": 3}
    worker.inner.save(path)
    with safe_open(path, framework="pt") as stored:
        assert not [name for name in stored.keys() if name.startswith("exp_avg")]  # noqa: SIM118
    again = Worker(SECOND, starting_weights(), torch.ones(3, 4), local)
    again.inner.restore(path)
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
    worker.inner.save(path)
    again = Worker(SECOND, starting_weights(), torch.ones(3, 4), local)
    again.inner.restore(path)
    assert again.inner.cursor == {"position": 3}
    assert again.inner.num_fresh_experts == 2
    again.train([0])
    expected = starting_weights()[0, 5] - local.lr * gradient(0, 5, 0)
    torch.testing.assert_close(again.model.expert(0)[2].detach(), expected, rtol=0, atol=1e-7)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[:-5],
    "garbage": lambda whole: b"x" * len(whole),
    "another key": lambda whole: whole.replace(b'"cursor"', b'"cursos"'),
    "no JSON inside": lambda whole: whole.replace(b'{\\"position', b'[\\"position'),
    "another number": lambda whole: whole.replace(b'"steps":"3"', b'"steps":"s"'),
    "another moment": lambda whole: whole.replace(b'"exp_avg_sq/', b'"exp_avg_sp/'),
}


@pytest.mark.parametrize("damage", ["missing", "a folder", *DAMAGES])
def test_a_file_that_cannot_be_read_means_a_fresh_start(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "0.safetensors"
    worker = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    worker.train(range(3))
    worker.inner.cursor = {"position": 3}
    worker.inner.save(path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(DAMAGES[damage](whole))
        assert path.read_bytes() != whole
    again = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    again.inner.restore(path)
    assert again.inner.is_fresh
    assert again.inner.cursor == {}
    assert not again.optimizer.state
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"warning: {path} cannot be read (") for line in told] == (
        [] if damage == "missing" else [True]
    )
    again.train(range(2))
    fresh = Worker(FIRST, starting_weights(), torch.ones(3, 4))
    fresh.train(range(2))
    assert torch.equal(again.model.expert(0), fresh.model.expert(0))
