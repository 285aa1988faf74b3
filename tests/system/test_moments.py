"""Adam's moments over rounds: who averages them, and who keeps its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federated import OUTER, Federate, assert_identical
from micro import NUM_WORKERS
from torch import Tensor

from fomoe_flwr.federation import client
from fomoe_flwr.layout import Layout
from fomoe_flwr.parameters.fragments import MOMENTS
from fomoe_flwr.worker.round import run_round
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer

Moments = dict[str, dict[str, Tensor]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int, int], Moments]:
    """Note every worker's moments at the start and at the end of every round's training."""
    found: dict[tuple[str, int, int], Moments] = {}
    place = [0, 0]

    def copied(trainer: LocalTrainer) -> Moments:
        if not trainer.optimizer.state:
            return {}
        return {name: {k: v.clone() for k, v in trainer.moments(name).items()} for name in MOMENTS}

    train = LocalTrainer.train

    def note_place(task: Any, batches: Any) -> Any:
        place[:] = [task.server_round, task.worker]
        return run_round(task, batches)

    def note(trainer: LocalTrainer, steps: int) -> LocalReport:
        found["start", place[0], place[1]] = copied(trainer)
        report = train(trainer, steps)
        found["end", place[0], place[1]] = copied(trainer)
        return report

    monkeypatch.setattr(client, "run_round", note_place)
    monkeypatch.setattr(LocalTrainer, "train", note)
    return found


def assert_is_mean(got: Tensor, copies: list[Tensor]) -> None:
    """Compare with the mean; where copies cancel, rounding is relative to them."""
    stacked = torch.stack(copies)
    atol = 1e-6 * float(stacked.abs().max())
    torch.testing.assert_close(got, stacked.mean(0), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_local_adamw_starts_all_workers_from_the_mean_of_their_moments(
    kind: str, routing: str, federate: Federate, noted: dict[tuple[str, int, int], Moments]
) -> None:
    """K = 1: holders agree on every moment, whether they held the expert before or not."""
    federation = federate(
        "outer=local_adamw",
        "local.steps=1",
        "rounds=4",
        f"layout.kind={kind}",
        f"model.routing={routing}",
    )
    layouts = {s.record.server_round: s.record.layout for s in federation.rounds}
    if kind == "random":
        assert layouts[1] != layouts[2]
    for server_round in (2, 3, 4):
        before, now = layouts[server_round - 1], layouts[server_round]
        for name in MOMENTS:
            for entry in federation.spec.shared:
                ends = [
                    noted["end", server_round - 1, w][name][entry.key] for w in range(NUM_WORKERS)
                ]
                assert not torch.equal(ends[0], ends[1])
                for w in range(NUM_WORKERS):
                    start = noted["start", server_round, w][name][entry.key]
                    assert_is_mean(start, ends)
                    assert torch.equal(start, noted["start", server_round, 0][name][entry.key])
            for entry in federation.spec.expert:
                layer = entry.layer or 0
                for expert in range(federation.spec.num_experts):

                    def row(when: str, r: int, w: int, layout: Layout) -> Tensor:
                        held = layout.of_worker(w)[layer]  # noqa: B023
                        moments = noted[when, r, w][name][entry.key]  # noqa: B023
                        return moments[held.index(expert)]  # noqa: B023

                    ends = [
                        row("end", server_round - 1, w, before)
                        for w in before.holders(layer, expert)
                    ]
                    for w in now.holders(layer, expert):
                        assert_is_mean(row("start", server_round, w, now), ends)
    assert all(s.record.replies[0]["fresh_state"] == 0 for s in federation.rounds[1:])


def test_des_loc_keeps_workers_own_moments_between_its_periods(
    federate: Federate, noted: dict[tuple[str, int, int], Moments]
) -> None:
    federate(*OUTER["des_loc"], "layout.overlap=3", "rounds=7")
    averaged = {"exp_avg": {3, 5, 7}, "exp_avg_sq": {4, 7}}
    key = "model.norm.weight"
    for server_round in range(2, 8):
        for name in MOMENTS:
            starts = [noted["start", server_round, w][name][key] for w in range(NUM_WORKERS)]
            is_common = all(torch.equal(start, starts[0]) for start in starts)
            assert is_common == (server_round in averaged[name])
            if not is_common:
                own = [noted["end", server_round - 1, w][name][key] for w in range(NUM_WORKERS)]
                assert all(map(torch.equal, starts, own))


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_des_loc_with_both_periods_one_is_local_adamw(
    kind: str, fragments: int, federate: Federate
) -> None:
    common = [f"layout.kind={kind}", f"outer.fragments={fragments}", "rounds=5"]
    periods = ["outer.first_moment_every=1", "outer.second_moment_every=1"]
    des_loc = federate("outer=des_loc", *periods, *common)
    local_adamw = federate("outer=local_adamw", *common)
    assert_identical(des_loc.state, local_adamw.state)
    assert_identical(des_loc.outer.tensors(), local_adamw.outer.tensors())
    assert des_loc.traffic == local_adamw.traffic
