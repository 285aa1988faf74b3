"""Fragments over rounds: what is synchronised when, and what a worker that missed one gets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import (
    OUTER,
    Federate,
    Federation,
    Weights,
    assert_identical,
    failures,
    fragment_part,
)
from micro import micro
from safetensors.torch import load_file

from fomoe_flwr import costs
from fomoe_flwr.federation import client
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.worker import round as worker_round
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer

pytestmark = pytest.mark.usefixtures("made_up_data")


def test_one_fragment_is_no_fragments(federate: Federate) -> None:
    for outer in ("nesterov", "local_adamw"):
        one = federate(*OUTER[outer], "outer.fragments=1", "rounds=3")
        none = federate(*OUTER[outer], "rounds=3")
        assert_identical(one.state, none.state)
        assert_identical(one.outer.tensors(), none.outer.tensors())
        assert one.traffic == none.traffic
        (last, *_) = sorted(one.folder.rglob("round-000003.safetensors"))
        # Nothing is kept on a worker's disk that only fragments need.
        assert not [name for name in load_file(last) if name.startswith("weights/")]


@pytest.mark.parametrize("fragments", [1, 2])
def test_every_key_is_synchronised_once_in_as_many_rounds_as_fragments(
    fragments: int, federate: Federate
) -> None:
    federation = federate("outer=nesterov", f"outer.fragments={fragments}", "rounds=4")
    before = federation.initial
    for snapshot in federation.rounds:
        fragment = (snapshot.record.server_round - 1) % fragments
        for key, value in snapshot.state.items():
            part = fragment_part(key, value, fragment, fragments)
            if len(part):
                old = fragment_part(key, before[key], fragment, fragments)
                assert not torch.equal(part, old), key
            # All else stays, to the last bit.
            for other in set(range(fragments)) - {fragment}:
                rest, old = (
                    fragment_part(key, each[key], other, fragments)
                    for each in (snapshot.state, before)
                )
                assert torch.equal(rest, old), key
        before = snapshot.state


def test_a_worker_that_lost_its_disk_gets_its_whole_slice_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    settings = micro("outer=local_adamw", "outer.fragments=2", "rounds=6")
    federation = Federation(settings, tmp_path)

    def lose(record: RoundRecord) -> None:
        if record.server_round == 3:
            (folder,) = tmp_path.glob("*/worker-001")
            shutil.rmtree(folder)

    federation.after_round = lose
    federation.run()
    assert failures(federation) == {4: {1: "worker 1 has no weights of round 3 (Flower error 2)"}}
    layout = federation.rounds[0].record.layout
    plain = costs.predict_bytes(micro("outer=average"), layout).down_per_worker[1]
    down = [federation.traffic.down[r, 1] for r in range(1, 7)]
    half = costs.predict_round(settings, layout, 4).down_per_worker[1]
    # Round 5: weights and both moments of everything.
    assert down == [plain, half, half, half, 3 * plain, half]
    assert half == 3 * plain // 2
    fresh = [
        s.record.replies[1]["fresh_state"] for s in federation.rounds if s.record.server_round != 4
    ]
    assert fresh == [1, 0, 0, 1, 0]
    # The others never notice.
    assert [federation.traffic.down[r, 0] for r in range(1, 7)] == [plain] + [half] * 5


@pytest.mark.parametrize("outer", ["average", "local_adamw"])
def test_a_worker_whose_reply_did_not_count_gets_everything_next_time(
    outer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = client.run_round

    def instead(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        if (task.worker, task.server_round) == (1, 3):
            # Too late: its state of this round is on its disk already.
            raise RuntimeError("the network is down")
        return result

    monkeypatch.setattr(client, "run_round", instead)
    settings = micro(*OUTER[outer], "outer.fragments=2", "rounds=5")
    federation = Federation(settings, tmp_path)
    seen: dict[int, Weights] = {}
    start = worker_round.starting_weights

    def note(task: Any) -> Any:
        received, current = start(task)
        if task.worker == 1:
            seen[task.server_round] = {key: value.clone() for key, value in current.items()}
        return received, current

    monkeypatch.setattr(worker_round, "starting_weights", note)
    federation.run()
    assert list(failures(federation)) == [3]
    layout = federation.rounds[0].record.layout
    plain = costs.predict_bytes(micro("outer=average"), layout).down_per_worker[1]
    times = 3 if outer == "local_adamw" else 1
    down = [federation.traffic.down[r, 1] for r in range(1, 6)]
    assert down == [plain, *[times * plain // 2] * 2, times * plain, times * plain // 2]
    # It starts from the global weights, without a trace of what it trained in vain ...
    spec, residents = federation.spec, layout.of_worker(1)
    globally = federation.rounds[2].state
    assert torch.equal(spec.pack_shared(seen[4]), spec.pack_shared(globally))
    assert torch.equal(spec.pack_experts(seen[4]), spec.pack_experts(globally, residents))
    # ... whereas in other rounds a part is its own.
    assert not torch.equal(spec.pack_shared(seen[3]), spec.pack_shared(federation.rounds[1].state))


def test_with_fragments_a_worker_goes_on_from_its_own_weights_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], Weights] = {}
    start, train = worker_round.starting_weights, LocalTrainer.train
    now = [0]

    def note_start(task: Any) -> Any:
        received, current = start(task)
        if task.worker == 0:
            now[0] = task.server_round
            for name, state in (("received", received), ("start", current)):
                seen[name, now[0]] = {key: value.clone() for key, value in state.items()}
        else:
            now[0] = 0
        return received, current

    def note_end(trainer: LocalTrainer, steps: int) -> LocalReport:
        report = train(trainer, steps)
        if now[0]:
            parameters = trainer.model.named_parameters()
            seen["end", now[0]] = {key: value.detach().clone() for key, value in parameters}
        return report

    monkeypatch.setattr(worker_round, "starting_weights", note_start)
    monkeypatch.setattr(LocalTrainer, "train", note_end)
    federation = Federation(micro("outer.fragments=2", "rounds=4"), tmp_path).run()
    spec, layout = federation.spec, federation.rounds[0].record.layout
    for server_round in (2, 3, 4):
        globally = federation.rounds[server_round - 2].state
        synced, own = (spec.fragment((server_round + i) % 2, 2) for i in (0, 1))
        start_state, end = seen["start", server_round], seen["end", server_round - 1]
        assert torch.equal(synced.pack_shared(start_state), synced.pack_shared(globally))
        assert torch.equal(own.pack_shared(start_state), own.pack_shared(end))
        assert torch.equal(own.pack_experts(start_state), own.pack_experts(end))
        # What its next pseudo-gradient starts from is always the server's.
        received = seen["received", server_round]
        held = layout.of_worker(0)
        assert torch.equal(spec.pack_shared(received), spec.pack_shared(globally))
        assert torch.equal(spec.pack_experts(received), spec.pack_experts(globally, held))
