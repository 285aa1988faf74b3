"""Seats: which node plays which worker, when nodes are missing, refuse, leave and return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from watched import (
    BAD,
    FIRST_NODE,
    Federation,
    WatchedGrid,
)

from fomoe_flwr import __version__
from fomoe_flwr.config import Settings
from fomoe_flwr.federation import seats as seats_module
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.strategy import FederationError


def test_a_federation_with_too_few_nodes_does_not_begin(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    federation, grid = Federation(make_settings()), WatchedGrid(tmp_path, num_nodes=2)
    with pytest.raises(FederationError) as caught:
        federation.run(grid)
    text = str(caught.value)
    assert text.startswith("layout.num_workers=3 but the federation has 2 usable nodes")
    assert '--federation-config "num-supernodes=3"' in text
    assert "federation.node_wait_seconds=0" in text
    assert grid.watch.tasks == {}


def test_two_nodes_cannot_play_one_worker(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    grid = WatchedGrid(tmp_path)
    grid.node_config(FIRST_NODE + 2)["partition-id"] = 1
    with pytest.raises(FederationError) as caught:
        Federation(make_settings()).run(grid)
    assert str(caught.value) == (
        "1 of 3 workers cannot start: asks for worker 1, which is taken or outside "
        "layout.num_workers=3"
    )


def test_a_node_too_many_for_a_worker_is_left_out_and_takes_over_when_the_first_leaves(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=2", "layout.overlap=2")
    federation, grid = Federation(settings), WatchedGrid(tmp_path, num_nodes=4)
    spare = FIRST_NODE + 3
    grid.node_config(spare)["partition-id"] = 1

    def lose_the_first(record: RoundRecord) -> None:
        assert federation.strategy.seats.worker_of_node == {2: 0, 3: 1, 4: 2}
        if record.server_round == 1:
            grid.absent = {FIRST_NODE + 1}
            federation.after_round = lambda record: None

    federation.after_round = lose_the_first
    _, second = federation.run(grid)
    assert second.record.failures == {}
    assert federation.strategy.seats.worker_of_node == {2: 0, 4: 2, spare: 1}


def test_a_node_without_a_number_takes_the_first_free_worker(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    federation, grid = Federation(make_settings("rounds=1")), WatchedGrid(tmp_path)
    for node in (FIRST_NODE, FIRST_NODE + 2):
        del grid.node_config(node)["partition-id"]
    (only,) = federation.run(grid)
    assert sorted(federation.strategy.seats.worker_of_node.values()) == [0, 1, 2]
    assert sorted(only.record.replies) == [0, 1, 2]


def test_nodes_of_another_version_refuse_and_the_error_says_so(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats_module, "__version__", "99.0")
    grid = WatchedGrid(tmp_path)
    with pytest.raises(FederationError) as caught:
        Federation(make_settings()).run(grid)
    text = str(caught.value)
    assert text.startswith("3 of 3 workers cannot start: ")
    assert f"the server runs fomoe-flwr 99.0, this node {__version__}: install the same" in text
    assert grid.watch.tasks == {}


def test_a_node_whose_text_is_missing_refuses_before_training(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    grid = WatchedGrid(tmp_path)
    grid.node_config(FIRST_NODE)["data-path"] = str(tmp_path / "nowhere")
    with pytest.raises(FederationError, match=r"1 of 3 workers cannot start: .*does not exist"):
        Federation(make_settings()).run(grid)


def test_a_node_that_refused_is_asked_again_when_it_comes_back(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=4", "layout.overlap=2")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    node = FIRST_NODE + BAD
    bad_path = str(tmp_path / "nowhere")

    def change(record: RoundRecord) -> None:
        if record.server_round == 1:  # it restarts with a wrong path ...
            grid.absent = {node}
        elif record.server_round == 2:
            grid.absent = set()
            grid.node_config(node)["data-path"] = bad_path
        elif record.server_round == 3:  # ... its operator mends it; the grid saw it leave
            grid.absent = {node}
            federation.strategy.seats.meet(grid)
            grid.absent = set()
            del grid.node_config(node)["data-path"]

    federation.after_round = change
    failures = [snapshot.record.failures for snapshot in federation.run(grid)]
    gone = {BAD: "no node plays this worker"}
    assert failures == [{}, gone, gone, {}]


def test_nodes_that_vanish_are_missed_and_those_that_return_take_their_place_again(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=3", "outer=nesterov")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)

    def change(record: RoundRecord) -> None:
        grid.absent = {FIRST_NODE + BAD} if record.server_round == 1 else set()

    federation.after_round = change
    first, second, third = federation.run(grid)
    assert first.record.failures == {}
    assert second.record.failures == {BAD: "no node plays this worker"}
    assert second.record.missing_experts == 2 * 4
    assert second.record.bytes_down < first.record.bytes_down
    assert third.record.failures == {}
    assert sorted(third.record.replies) == [0, 1, 2]
    # It takes up the inner state of round 1, the last it was there for.
    assert [reply["fresh_state"] for reply in first.record.replies.values()] == [1, 1, 1]
    assert [reply["fresh_state"] for reply in third.record.replies.values()] == [0, 0, 0]
