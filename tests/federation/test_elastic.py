"""Workers that leave, come back and join in the middle of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from federated import CountingGrid, Federation, assert_identical, use_made_up_data
from flwr.app import Error, Message
from micro import micro

from fomoe_flwr.config import SettingsError
from fomoe_flwr.costs import memory_bytes, parameter_counts
from fomoe_flwr.federation.attendance import Attendance
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.strategy import FederationError

FIRST_NODE = 2


@pytest.fixture(autouse=True)
def _made_up_data(monkeypatch: pytest.MonkeyPatch) -> None:
    use_made_up_data(monkeypatch)


class Elastic(CountingGrid):
    """A grid from which nodes are absent by round, or answer with errors."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        super().__init__(folder, num_nodes)
        self.gone: Mapping[int, set[int]] = {}
        """Round -> workers without a node."""
        self.broken: Mapping[int, set[int]] = {}
        """Round -> workers whose tasks end in an error."""
        self.server_round = 1

    def get_node_ids(self) -> Iterable[int]:
        away = self.gone.get(self.server_round, set())
        return [node for node in super().get_node_ids() if node - FIRST_NODE not in away]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived = []
        for message_id in message_ids:
            place = self._places.get(message_id)
            if place and place[1] in self.broken.get(place[0], set()):
                arrived.append(Message(Error(2, "broken"), reply_to=self._sent(message_id)))
            else:
                arrived += list(super().pull_messages([message_id]))
        return arrived

    def _sent(self, message_id: str) -> Message:
        return self._waiting[message_id]


def federation(folder: Path, *overrides: str) -> tuple[Federation, Elastic]:
    run = Federation(micro(*overrides), folder)
    run.grid = grid = Elastic(folder, run.settings.layout.num_workers)

    def next_round(record: RoundRecord) -> None:
        grid.server_round = record.server_round + 1

    run.after_round = next_round
    return run, grid


def sizes(run: Federation) -> list[list[int]]:
    """Return how many experts of the first layer every worker held, by round."""
    return [[len(held) for held in s.record.layout.residents[0]] for s in run.rounds]


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("overlap", [1, 2])
def test_a_worker_that_leaves_is_replaced_and_takes_its_share_when_it_is_back(
    overlap: int, routing: str, tmp_path: Path
) -> None:
    run, grid = federation(
        tmp_path, "rounds=7", f"layout.overlap={overlap}", f"model.routing={routing}"
    )
    grid.gone = {r: {1} for r in (2, 3, 4, 5)}
    run.run()
    even = [2 * overlap] * 3
    shared = [3 * overlap, 0, 3 * overlap]
    assert sizes(run) == [even, even, even, shared, shared, even, even]
    records = [snapshot.record for snapshot in run.rounds]
    assert [record.absent for record in records] == [(), (), (), (1,), (1,), (), ()]
    # Its experts wait for two rounds, then nobody is missing any more.
    lost = 2 * 2 if overlap == 1 else 0
    assert [record.missing_experts for record in records] == [0, lost, lost, 0, 0, 0, 0]
    assert [record.moved_experts for record in records] == [0, 0, 0, 4 * overlap, 0, 4 * overlap, 0]
    row = records[3].metrics_row()
    assert row["layout/absent_workers"] == [1]
    assert row["layout/rehomed_experts"] == row["layout/rehomed_lower_bound"] == 4 * overlap
    for record in records:
        assert record.rehomed is not None
        assert record.rehomed.moved == record.rehomed.lower_bound == record.moved_experts
    assert sorted(records[-1].replies) == [0, 1, 2]
    # All experts are trained on after the leave.
    for entry in run.spec.expert:
        moved = run.rounds[3].state[entry.key] != run.rounds[2].state[entry.key]
        assert bool(moved.flatten(1).any(1).all()), entry.key


def test_nobody_moves_with_rehome_after_zero(tmp_path: Path) -> None:
    run, grid = federation(tmp_path, "rounds=5", "layout.rehome_after=0")
    grid.gone = {r: {1} for r in (2, 3, 4, 5)}
    run.run()
    assert sizes(run) == [[4, 4, 4]] * 5


@pytest.mark.parametrize("kind", ["random", "rolling", "balanced"])
def test_layouts_that_move_go_on_moving_without_a_worker(kind: str, tmp_path: Path) -> None:
    run, grid = federation(tmp_path, "rounds=7", f"layout={kind}", "layout.overlap=2")
    grid.gone = {r: {2} for r in (2, 3, 4, 5)}
    run.run()
    assert sizes(run) == [[4, 4, 4]] * 3 + [[6, 6, 0]] * 2 + [[4, 4, 4]] * 2
    assert all(s.record.layout.overlaps == (2, 2) for s in run.rounds)


def test_a_worker_that_fails_rests_as_long_as_it_failed_and_is_tried_again(tmp_path: Path) -> None:
    run, grid = federation(tmp_path, "rounds=7")
    grid.broken = {r: {0} for r in (1, 2)}
    run.run()
    # Fails in 1 and 2, rests in 3 and 4.
    assert [s.record.absent for s in run.rounds] == [(), (), (0,), (0,), (), (), ()]
    assert [0 in s.record.replies for s in run.rounds] == [False] * 4 + [True] * 3
    assert (3, 0) not in grid.traffic.down


def test_a_worker_that_goes_on_failing_rests_longer_and_longer() -> None:
    attendance = Attendance(num_workers=2, patience=2)
    tried = []
    for server_round in range(1, 20):
        present = attendance.present(server_round, [0, 1])
        if 1 in present:
            tried.append(server_round)
        attendance.note(server_round, [0, 1], present, [0])
    assert tried == [1, 2, 5, 9, 14]


@pytest.mark.parametrize("outer", ["average", "local_adamw"])
def test_new_holders_start_with_fresh_moments_or_with_those_of_the_server(
    outer: str, tmp_path: Path
) -> None:
    run, grid = federation(tmp_path, "rounds=4", "layout.overlap=1", f"outer={outer}")
    grid.gone = {r: {1} for r in (2, 3, 4)}
    run.run()
    fresh = [sum(r["fresh_experts"] for r in s.record.replies.values()) for s in run.rounds]
    assert fresh[3] == run.rounds[3].record.moved_experts == 4
    changes = []
    for entry in run.spec.expert:
        assert entry.layer is not None
        lost = list(run.rounds[2].record.layout.residents[entry.layer][1])
        after, before = (run.rounds[i].state[entry.key][lost] for i in (3, 2))
        changes.append((after - before).abs().mean())
    # What the warm-up of fresh experts (8 steps) holds back, the server's moments do not.
    assert all(bool(change > 0) for change in changes)
    if outer == "local_adamw":
        kept = run.rounds[2].outer
        assert any(name.startswith("exp_avg/") and bool(v.any()) for name, v in kept.items())
        plain, other = federation(tmp_path / "plain", "rounds=4", "layout.overlap=1")
        other.gone = grid.gone
        plain.run()
        slow = [
            (plain.rounds[3].state[e.key][held] - plain.rounds[2].state[e.key][held]).abs().mean()
            for e in plain.spec.expert
            for held in [list(plain.rounds[2].record.layout.residents[e.layer or 0][1])]
        ]
        assert torch.stack(changes).mean() > torch.stack(slow).mean()


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_a_run_resumed_in_the_middle_of_an_absence_is_the_run(
    kind: str, fragments: int, tmp_path: Path
) -> None:
    words = (
        "rounds=7",
        f"layout={kind}",
        "layout.overlap=2",
        "outer=local_adamw",
        f"outer.fragments={fragments}",
    )
    gone = {r: {1} for r in (2, 3, 4, 5)}
    whole, grid = federation(tmp_path / "whole", *words)
    grid.gone = gone
    whole.run()

    first, grid = federation(tmp_path / "parts", *words)
    grid.gone = gone
    first.strategy.start(grid, num_rounds=4)
    state = json.loads(json.dumps(first.strategy.state_dict()))
    second, grid = federation(tmp_path / "parts", *words)
    grid.gone, grid.server_round = gone, 5
    for key, value in first.state.items():
        second.state[key].copy_(value)
    second.outer.restore({k: v.clone() for k, v in first.outer.tensors().items()})
    second.strategy.load_state_dict(state)
    second.strategy.first_round = 5
    second.run()
    for got, want in zip(second.rounds, whole.rounds[4:], strict=True):
        assert got.record.layout == want.record.layout
        assert got.record.absent == want.record.absent
        assert_identical(got.state, want.state)
        assert_identical(got.outer, want.outer)


def test_workers_may_join_after_the_first_round(tmp_path: Path) -> None:
    run, grid = federation(tmp_path, "rounds=4", "federation.start_workers=2")
    grid.gone = {1: {2}, 2: {2}}
    run.run()
    assert sizes(run) == [[6, 6, 0], [6, 6, 0], [4, 4, 4], [4, 4, 4]]
    late, grid = federation(tmp_path / "late", "federation.start_workers=2")
    grid.gone = {1: {1, 2}}
    with pytest.raises(FederationError, match="has 1 usable"):
        late.run()


def test_a_start_without_all_workers_needs_rehoming() -> None:
    with pytest.raises(SettingsError, match=r"layout.rehome_after=0 must be >= 1"):
        micro("federation.start_workers=2", "layout.rehome_after=0")
    with pytest.raises(SettingsError, match=r"needs layout.num_workers >= 9"):
        micro("federation.start_workers=9")


def test_without_room_for_its_experts_they_wait_for_the_worker(tmp_path: Path) -> None:
    run, grid = reporting(tmp_path, [2.5, 2.5, 2.5], "rounds=5", "layout.overlap=1")
    grid.gone = {r: {1} for r in (2, 3, 4)}
    run.run()
    assert sizes(run) == [[2, 2, 2]] * 5
    assert [s.record.missing_experts for s in run.rounds] == [0, 4, 4, 4, 0]


def reporting(folder: Path, experts: list[float], *overrides: str) -> tuple[Federation, Elastic]:
    """Make a run whose nodes report memory for so many experts of each layer."""
    run, grid = federation(
        folder, "layout.kind=weighted", "layout.capacity_reported=true", *overrides
    )
    counts = parameter_counts(run.settings.model)
    for worker, most in enumerate(experts):
        held = counts.shared + most * counts.per_expert_per_layer * run.settings.model.num_layers
        grid._contexts[FIRST_NODE + worker].node_config["capacity-gib"] = (
            memory_bytes(1, "adamw") * held / 2**30
        )
    return run, grid


def test_residents_follow_from_the_memory_that_nodes_report(tmp_path: Path) -> None:
    run, grid = reporting(tmp_path, [6.5, 4.5, 2.5], "rounds=6")
    grid.gone = {r: {1} for r in (2, 3, 4)}
    run.run()
    # Away from round 4 on; the others have room for 6 and 2 experts, not for all copies.
    assert sizes(run) == [[6, 4, 2]] * 3 + [[6, 0, 2]] + [[6, 4, 2]] * 2
    assert run.strategy.state_dict()["layout_context"]["room"] == [6, 4, 2]


@pytest.mark.parametrize(
    ("experts", "error"),
    [
        ([3.5, 2.5, 1.5], "use layout.overlap=1 or raise capacity-gib of nodes"),
        ([2.5, 1.5, 1.5], "are needed: raise capacity-gib of nodes"),
        ([6.5, 6.5, 0.5], "worker 2 has no room .* raise the capacity-gib of its node"),
    ],
)
def test_too_little_memory_is_refused_before_the_first_round(
    experts: list[float], error: str, tmp_path: Path
) -> None:
    run, _ = reporting(tmp_path, experts)
    with pytest.raises(SettingsError, match=error):
        run.run()
    assert run.rounds == []


def test_a_node_that_grants_nonsense_cannot_take_part(tmp_path: Path) -> None:
    run, grid = reporting(tmp_path, [6.5, 4.5, 2.5])
    grid._contexts[FIRST_NODE].node_config["capacity-gib"] = -1.0
    with pytest.raises(FederationError, match=r"capacity-gib=-1.0 of this node must be"):
        run.run()
