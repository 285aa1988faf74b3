"""Runs in which training diverges, a worker fails, or a reply lacks something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    Start,
)

from fomoe_flwr.cli.main import main
from fomoe_flwr.run.directory import RunDirectory


def test_a_run_that_diverges_fails_with_the_reason(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    diverging = ["local.optimizer=sgd", "local.lr=1e30", "local.steps=6"]
    assert main([*words, f"output_dir={out}", *diverging]) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "training loss is nan at step" in line
    assert "lower local.lr=1e+30" in line
    summary = RunDirectory(out).read_summary()
    assert (summary["status"], summary["rounds_done"]) == ("failed", 0)
    assert "training loss is nan" in summary["error"]
    assert not RunDirectory(out).export.exists()


def test_one_worker_that_fails_does_not_end_the_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fomoe_flwr.federation import client

    inner = client.run_round

    def instead(task: Any, batches: Any) -> Any:
        if (task.worker, task.server_round) == (1, 2):
            raise RuntimeError("the GPU fell\nout")
        return inner(task, batches)

    monkeypatch.setattr(client, "run_round", instead)
    rows = start("run", "rounds=3").read_metrics()
    assert [row["round/workers_ok"] for row in rows] == [2, 1, 2]
    assert [row["round/workers_failed"] for row in rows] == [0, 1, 0]
    assert [row["moe/missing_experts"] for row in rows] == [0, 12, 0]
    assert rows[1]["round/failures"] == {"1": "the GPU fell out (Flower error 2)"}
    # It takes up its inner state of round 1, the last it finished.
    assert [row["round/fresh_inner_states"] for row in rows] == [2, 0, 0]


def test_a_worker_that_does_not_say_how_it_chooses_is_left_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fomoe_flwr.federation import client

    inner = client.run_round

    def instead(task: Any, batches: Any) -> Any:
        assert task.probe.shape == (16, 32)
        result = inner(task, batches)
        return replace(result, choices=None) if task.worker == 1 else result

    monkeypatch.setattr(client, "run_round", instead)
    run = start("run", "rounds=1")
    (row,), (line,) = run.read_metrics(), run.read_routing()
    assert list(row["round/failures"]) == ["1"]
    assert row["round/failures"]["1"].startswith("choices must be 2 lists (layers) of 512 * 2 ")
    assert [worker["worker"] for worker in line["workers"]] == [0]
    assert "moe/worker_agreement" not in row
