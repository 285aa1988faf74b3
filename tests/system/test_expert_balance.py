"""What balances the load of experts: presets, pooled loads and the loss-free bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federated import Federate, Federation, OneRound, assert_identical, failures
from micro import NUM_WORKERS, micro
from torch import Tensor

from fomoe_flwr.config import SettingsError
from fomoe_flwr.federation import client

pytestmark = pytest.mark.usefixtures("made_up_data")


def test_every_balance_preset_runs_and_differs(federate: Federate) -> None:
    ends = {
        name: federate("rounds=3", "local.steps=1", f"balance={name}")
        for name in ("off", "switch", "pooled", "recommended")
    }
    assert all(failures(end) == {} for end in ends.values())
    gates = {
        name: tuple(end.state["model.layers.0.mlp.gate.weight"].flatten().tolist())
        for name, end in ends.items()
    }
    assert len(set(gates.values())) == len(gates)
    # In the first round there is nothing to pool yet.
    first = [ends[name].rounds[0].state for name in ("switch", "pooled")]
    assert_identical(first[0], first[1])


def test_pooled_loads_are_those_of_all_workers_in_the_round_before(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor | None]] = {}
    inner = client.run_round

    def note(task: Any, batches: Any) -> Any:
        seen.setdefault(task.server_round, []).append(task.pooled_share)
        return inner(task, batches)

    monkeypatch.setattr(client, "run_round", note)
    federation = federate("balance=pooled", "rounds=3")
    assert seen[1] == [None] * NUM_WORKERS
    for server_round in (2, 3):
        counts = federation.rounds[server_round - 2].record.counts
        load = sum(counts[w].load for w in range(NUM_WORKERS))
        assert isinstance(load, Tensor)
        expected = load / load.sum(1, keepdim=True)
        for share in seen[server_round]:
            assert share is not None
            torch.testing.assert_close(share, expected)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_pooled_loads_survive_a_round_without_one_of_the_workers(
    routing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one holder of each expert, nobody spoke for the experts of a worker that failed."""
    inner = client.run_round

    def instead(task: Any, batches: Any) -> Any:
        if (task.worker, task.server_round) == (1, 2):
            raise RuntimeError("no power")
        return inner(task, batches)

    monkeypatch.setattr(client, "run_round", instead)
    settings = micro("balance=pooled", "layout.overlap=1", f"model.routing={routing}", "rounds=4")
    assert list(failures(Federation(settings, tmp_path).run())) == [2]


@pytest.mark.parametrize("model", ["fomoe", "deepseek-v3", "glm4-moe"])
def test_the_loss_free_bias_travels_and_moves(model: str, one_round: OneRound) -> None:
    words = [f"model={model}-tiny", "model.num_experts=6", "local.steps=1"]
    still, _ = one_round("balance=off", *words)
    moved, _ = one_round("balance=loss_free", *words)
    for key, value in still.items():
        if key.endswith("e_score_correction_bias"):
            assert value.eq(0).all()
            # A mean over three workers of steps of 0.001.
            steps = (moved[key] * 3000).round()
            assert steps.abs().max() > 0
            torch.testing.assert_close(moved[key], steps / 3000, rtol=0, atol=1e-7)
        else:
            assert torch.equal(moved[key], value), key


def test_a_bias_rate_needs_a_router_with_a_bias() -> None:
    with pytest.raises(SettingsError, match=r"balance\.bias_rate=0\.001 .*model\.family=olmoe"):
        micro("balance=loss_free")
