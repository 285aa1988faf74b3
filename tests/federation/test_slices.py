"""Slices: what a task carries, and that its bytes are those that the cost model predicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from watched import (
    WORKERS,
    Federation,
    WatchedGrid,
)

from fomoe_flwr import costs
from fomoe_flwr.config import Settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.task_header import TaskHeader


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize(("up", "down"), [("float32", "float32"), ("bfloat16", "float16")])
@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_predicted_bytes_are_the_bytes_that_travel(
    kind: str,
    overlap: int,
    routing: str,
    up: str,
    down: str,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    settings = make_settings(
        "rounds=1",
        f"layout={kind}",
        f"layout.num_workers={WORKERS}",
        f"layout.overlap={overlap}",
        f"model.routing={routing}",
        f"wire.up={up}",
        f"wire.down={down}",
    )
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    (only,) = federation.run(grid)
    assert only.record.failures == {}
    predicted = costs.predict_bytes(settings, only.record.layout)
    assert only.record.bytes_up == predicted.up
    assert only.record.bytes_down == predicted.down
    for worker in range(WORKERS):
        task = grid.watch.of(1, worker)
        assert task.reply is not None
        assert wire.payload_bytes(task.request.content) == predicted.down_per_worker[worker]
        assert wire.payload_bytes(task.reply.content) == predicted.up_per_worker[worker]


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_a_task_carries_the_shared_part_and_the_residents_and_nothing_else(
    routing: str, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=1", "layout.overlap=2", f"model.routing={routing}")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    before, spec = federation.initial.state, federation.spec
    (only,) = federation.run(grid)
    shared_arrays = []
    for worker in range(WORKERS):
        content = grid.watch.of(1, worker).request.content
        residents = only.record.layout.of_worker(worker)
        assert [len(layer) for layer in residents] == [8, 8]
        record = content.array_records[wire.WEIGHTS]
        shared_arrays.append(record["shared"])
        shared, experts = wire.vectors_in(
            content, wire.WEIGHTS, "float32", (spec.shared_size, spec.experts_size(residents))
        )
        assert torch.equal(shared, spec.pack_shared(before))
        assert torch.equal(experts, spec.pack_experts(before, residents))
        assert sorted(content) == [wire.TASK, wire.WEIGHTS]
        header = TaskHeader.read(content)
        assert header.residents == residents
        assert header.worker == worker
    assert all(array is shared_arrays[0] for array in shared_arrays)


def test_overlap_equal_to_all_workers_sends_everybody_everything(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=1", f"layout.overlap={WORKERS}")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    (only,) = federation.run(grid)
    total = sum(value.numel() for value in federation.state.values())
    assert only.record.bytes_down == only.record.bytes_up == WORKERS * total * 4
