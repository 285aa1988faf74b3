"""A whole run whose workers train in two processes, against the same run in one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.worker.multi_gpu import NODE_PROCESSES


@pytest.fixture(autouse=True)
def _no_processes_left() -> Iterator[None]:
    yield
    NODE_PROCESSES.close()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_in_two_processes_has_the_history_of_one(
    parallel: str, small_text: Path, tmp_path: Path
) -> None:
    words = [
        "run",
        "preset=tiny",
        f"data.path={small_text}",
        "rounds=2",
        "local.steps=4",
        "local.accumulate=2",
        "local.device=cpu",
        "layout.kind=random",
        "outer=nesterov",
    ]
    histories = []
    for name, more in (("one", ()), ("two", ("local.processes=2", f"local.parallel={parallel}"))):
        assert main([*words, f"output_dir={tmp_path / name}", *more]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        histories.append([json.loads(line) for line in lines])
    assert len(NODE_PROCESSES.pids) == 2
    one, two = histories
    assert len(one) == len(two)
    for want, got in zip(one, two, strict=True):
        for name in ("train/loss", "eval/loss", "moe/ghost_fraction", "comm/bytes_up"):
            if name in want:
                assert got[name] == pytest.approx(want[name], rel=1e-3)
