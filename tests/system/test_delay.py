"""Delayed merging (Streaming DiLoCo): sent early, trained beside, merged at its step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import OUTER, Counting, Federate, Federation, Snapshot, assert_identical
from micro import micro

from fomoe_flwr.config import SettingsError
from fomoe_flwr.federation import client
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.parameters.fragments import snapshot_step, sync_step
from fomoe_flwr.worker.delay import take_delayed_steps
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer

pytestmark = pytest.mark.usefixtures("made_up_data")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "overlap.json").read_text("utf-8"))
LAYER = "model.layers.{}.mlp.experts.down_proj"


def constant_steps(
    patch: pytest.MonkeyPatch, change: float, note: Callable[[int, int, list[float]], None]
) -> None:
    """Make every step change every weight alike; note both layers' weights after each."""
    adopt = LocalTrainer.adopt

    def worker_of(trainer: LocalTrainer) -> int:
        assert isinstance(trainer.batches, Counting)
        return trainer.batches.worker

    def values(trainer: LocalTrainer) -> list[float]:
        return [float(trainer.weights[LAYER.format(layer)].flatten()[0]) for layer in (0, 1)]

    def adopted(self: LocalTrainer, weights: Any) -> None:
        adopt(self, weights)
        note(worker_of(self), self.step, values(self))

    def train(self: LocalTrainer, num_steps: int, span: int = 0) -> LocalReport:
        for _ in range(num_steps):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(change)
            self.step += 1
            note(worker_of(self), self.step, values(self))
        layers = len(self.residents)
        nothing = torch.zeros(layers, dtype=torch.long)
        load = torch.zeros(layers, self.settings.model.num_experts, dtype=torch.long)
        counts = RoutingCounts(load, nothing, nothing, 8)
        return LocalReport(1.0, 1.0, 1.0, 1.0, 1e-3, 8 * num_steps, 0.1, counts)

    patch.setattr(LocalTrainer, "adopt", adopted)
    patch.setattr(LocalTrainer, "train", train)


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=["mixed", "delayed"])
def test_torchfts_figures_to_the_last_digit(
    run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = GOLDEN["setting"]
    between = setting["steps_between_syncs_of_successive_fragments"]
    settings = micro(
        *("outer=average", f"outer.lr={setting['outer_lr']}", "rounds=8"),
        *(f"outer.fragments={setting['fragments']}", f"local.steps={between}"),
        *(f"outer.delay_steps={run['delay_steps']}", f"outer.merge_alpha={run['merge_alpha']}"),
        *(f"layout.num_workers={setting['replicas']}", "layout.overlap=2", "local.optimizer=sgd"),
    )
    local: dict[int, dict[int, list[float]]] = {}
    after = {0: [setting["start"]] * 2}

    def note(worker: int, step: int, values: list[float]) -> None:
        local.setdefault(worker, {})[step] = values  # a merge comes after the step

    constant_steps(monkeypatch, setting["change_per_inner_step"], note)
    federation = Federation(settings, tmp_path)
    for value in federation.state.values():
        value.fill_(setting["start"])

    def keep(record: RoundRecord) -> None:
        both = (federation.state[LAYER.format(layer)] for layer in (0, 1))
        after[between * record.server_round] = [float(value.flatten()[0]) for value in both]

    federation.after_round = keep
    federation.run()
    for values in local.values():
        assert [values[step] for step in range(len(run["local"]))] == run["local"]
    assert {str(step): after[step] for step in map(int, run["global_after"])} == run["global_after"]


def test_every_step_is_taken_once_and_the_last_round_has_no_delay(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, taken = LocalTrainer.train, dict[int, list[int]]()

    def train(self: LocalTrainer, num_steps: int, span: int = 0) -> LocalReport:
        assert isinstance(self.batches, Counting)
        steps = range(self.step, self.step + num_steps)
        assert self.batches.position == self.step
        taken.setdefault(self.batches.worker, []).extend(steps)
        return inner(self, num_steps, span or None)

    monkeypatch.setattr(LocalTrainer, "train", train)
    federation = federate("outer=nesterov", "rounds=3", "local.steps=4", "outer.delay_steps=3")
    assert set(map(tuple, taken.values())) == {tuple(range(12))}
    settings = federation.settings
    assert [snapshot_step(settings, r) for r in (1, 2, 3)] == [1, 5, 12]
    assert sync_step(settings, 2) == 8
    tokens = settings.tokens_per_worker_step
    sent = [s.record.replies[0]["tokens"] for s in federation.rounds]
    assert sent == [tokens, 4 * tokens, 7 * tokens]


CASES = {
    "one fragment": ["outer=nesterov"],
    "own share": ["outer=nesterov", "outer.merge_alpha=0.5"],
    "fragments": ["outer=nesterov", "outer.fragments=2", "outer.merge_alpha=0.25"],
    "moments": [*OUTER["des_loc"], "outer.fragments=2"],
    "averaged adam": [*OUTER["local_adamw"], "outer.merge_alpha=0.5"],
    "int4": ["outer=average", "wire.up=int4", "wire.down=int8", "outer.merge_alpha=0.5"],
    "moving": ["outer=nesterov", "layout.kind=random", "layout.reshuffle_every=1"],
    "moving, own share": [
        *("outer=average", "layout.kind=random", "layout.reshuffle_every=1"),
        "outer.merge_alpha=0.5",
    ],
    "moving fragments": [
        *("outer=average", "layout.kind=random", "layout.reshuffle_every=2"),
        "outer.fragments=2",
    ],
    "partitioned": ["outer=nesterov", "model.routing=partitioned"],
    "shares of all": ["outer=nesterov", "balance.form=global"],
}


@pytest.mark.parametrize("case", CASES)
def test_steps_taken_ahead_change_no_bit(
    case: str, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*CASES[case], "rounds=5", "local.steps=4", "outer.delay_steps=2"]
    when_asked = federate(*words)
    inner, ahead = client.run_round, []

    def go_on(task: Any, open_batches: Any) -> Any:
        result = inner(task, open_batches)
        take = take_delayed_steps(task.settings, task.state_dir, task.server_round, open_batches)
        ahead.append(take)
        return result

    monkeypatch.setattr(client, "run_round", go_on)
    at_once = federate(*words)
    assert_identical(at_once.state, when_asked.state)
    assert_identical(at_once.outer.tensors(), when_asked.outer.tensors())
    assert at_once.traffic == when_asked.traffic
    assert sum(report is not None for report in ahead) == 4 * at_once.settings.layout.num_workers
    for one, other in zip(at_once.rounds, when_asked.rounds, strict=True):
        assert_same_metrics(one, other)
    plain = federate(*CASES[case], "rounds=5", "local.steps=4")
    assert any(not torch.equal(plain.state[key], at_once.state[key]) for key in plain.state)


def assert_same_metrics(one: Snapshot, other: Snapshot) -> None:
    for worker, metrics in one.record.replies.items():
        for name, value in metrics.items():
            if "seconds" not in name:
                assert value == other.record.replies[worker][name], name


def test_a_worker_that_lost_its_state_takes_what_it_is_sent(tmp_path: Path) -> None:
    words = ("outer=nesterov", "rounds=4", "local.steps=4", "outer.delay_steps=2")
    federation = Federation(micro(*words, "outer.merge_alpha=0.5"), tmp_path)

    def lose(record: RoundRecord) -> None:
        if record.server_round == 2:
            for file in tmp_path.glob("*/worker-001/*"):
                file.unlink()

    federation.after_round = lose
    federation.run()
    assert not [s.record.failures for s in federation.rounds if s.record.failures]
    fresh = [s.record.replies[1]["fresh_state"] for s in federation.rounds]
    assert fresh == [1, 0, 1, 0]
    tokens = federation.settings.tokens_per_worker_step
    sent = [s.record.replies[1]["tokens"] / tokens for s in federation.rounds]
    assert sent == [2, 4, 2, 6]  # The delayed steps of round 2 were lost with their state.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local.steps=4", "outer.delay_steps=4"], "outer.delay_steps=4 must be < local.steps=4"),
        (["outer.delay_steps=-1"], "outer.delay_steps=-1"),
        (["outer.merge_alpha=1.5"], "outer.merge_alpha=1.5"),
        (["outer.merge_alpha=-0.1"], "outer.merge_alpha=-0.1"),
        (["outer.delay_steps=1", "local.keep_inner_state=false"], "needs local.keep_inner_state"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        micro(*words)
    assert message in str(caught.value)
