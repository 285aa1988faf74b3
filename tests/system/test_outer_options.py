"""Options of averaging and of the outer step: what each changes in a round, and what not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from federated import Federate, OneRound, assert_identical
from torch import Tensor

from fomoe_flwr.federation import client


def is_router(key: str) -> bool:
    return ".gate." in key


def is_expert(key: str) -> bool:
    return ".experts." in key


def assert_scaled(got: Tensor, by: Tensor | float, base: Tensor) -> None:
    """Compare moves; they are differences of weights, so rounding is relative to those."""
    torch.testing.assert_close(got, by * base, rtol=1e-4, atol=5e-7)


def test_an_expert_rate_scales_the_moves_of_experts_only(one_round: OneRound) -> None:
    base, _ = one_round()
    moved, _ = one_round("outer.expert_lr=0.5")
    for key, value in base.items():
        assert_scaled(moved[key], 0.5 if is_expert(key) else 1.0, value)


def test_the_root_of_holders_scales_every_key_by_its_own_replies(one_round: OneRound) -> None:
    base, _ = one_round()
    moved, _ = one_round("outer.sqrt_holders=true")
    for key, value in base.items():
        # Three workers share, two hold an expert.
        assert_scaled(moved[key], (2.0 if is_expert(key) else 3.0) ** 0.5, value)


def test_router_rows_over_holders_change_router_rows_only(
    one_round: OneRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[int, Tensor] = {}
    inner = client.run_round

    def note(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        replies[task.worker] = result.shared
        return result

    monkeypatch.setattr(client, "run_round", note)
    base, _ = one_round()
    moved, federation = one_round("outer.router_rows=holders")
    layout = federation.rounds[0].record.layout
    for key, value in base.items():
        if not is_router(key):
            assert torch.equal(moved[key], value)
            continue
        for expert in range(federation.spec.num_experts):
            rows = [
                federation.spec.split_shared(replies[w])[key][expert]
                for w in layout.holders(int(key.split(".")[2]), expert)
            ]
            assert len(rows) == 2
            assert_scaled(moved[key][expert], -1.0, torch.stack(rows).mean(0))
            assert not torch.equal(moved[key][expert], value[expert])


def test_routed_weights_change_experts_only_and_by_the_loads(
    one_round: OneRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[int, Any] = {}
    inner = client.run_round

    def note(task: Any, batches: Any) -> Any:
        replies[task.worker] = inner(task, batches)
        return replies[task.worker]

    monkeypatch.setattr(client, "run_round", note)
    base, _ = one_round()
    moved, federation = one_round("outer.weighting=routed")
    layout, changed = federation.rounds[0].record.layout, 0
    for key, value in base.items():
        if not is_expert(key):
            assert torch.equal(moved[key], value)
            continue
        layer = int(key.split(".")[2])
        for expert in range(federation.spec.num_experts):
            total, mean = 0, torch.zeros(value.shape[1:])
            for w in layout.holders(layer, expert):
                residents = layout.of_worker(w)
                pieces = federation.spec.split_experts(replies[w].experts, residents)
                load = int(replies[w].report.routing.load[layer, expert])
                total += load
                mean += load * pieces[key][residents[layer].index(expert)]
            if total:
                assert_scaled(moved[key][expert], -1.0 / total, mean)
                changed += not torch.equal(moved[key][expert], value[expert])
            else:
                assert moved[key][expert].eq(0).all()
    assert changed > 10


def test_uniform_weights_equal_token_weights_where_all_have_as_many(federate: Federate) -> None:
    assert_identical(
        federate("rounds=2", "outer.weighting=uniform").state, federate("rounds=2").state
    )
