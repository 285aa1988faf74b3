"""Whole runs through the command line: how to compare their ends, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fomoe_flwr.cli.main import main
from fomoe_flwr.run.checkpoint import load_latest
from fomoe_flwr.run.directory import RunDirectory

Start = Callable[..., RunDirectory]


def lasting(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the metrics that a repetition must repeat: no times, memory, or text of paths."""
    return [
        {
            k: v
            for k, v in row.items()
            if "seconds" not in k
            and k not in ("train/tokens_per_second", "round/utilisation")
            and "overhead" not in k
            and not k.startswith("server/")
        }
        for row in run.read_metrics()
    ]


def stored(run: RunDirectory) -> dict[str, dict[str, Tensor]]:
    """Return every file of tensors of the last checkpoint, by the file's name."""
    name = (run.checkpoints / "latest").read_text(encoding="utf-8").strip()
    if (run.checkpoints / name / "slabs").is_dir():
        found = load_latest(run.checkpoints)
        return {"weights": dict(found.weights), "outer": dict(found.outer)}
    files = sorted((run.checkpoints / name).glob("*.safetensors"))
    return {path.stem: load_file(path) for path in files}


def assert_same_end(one: RunDirectory, other: RunDirectory) -> None:
    """Expect the same metrics, checkpoint, layouts and routing, to the last digit."""
    assert lasting(one) == lasting(other)
    assert_same_tensors(stored(one), stored(other))
    assert one.read_layouts() == other.read_layouts()
    assert one.routing.read_text("utf-8") == other.routing.read_text("utf-8")
    assert [line["round"] for line in one.read_routing()] == [row["round"] for row in lasting(one)]


def assert_same_tensors(
    mine: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]
) -> None:
    """Compare two checkpoints bit by bit."""
    assert mine.keys() == theirs.keys()
    for name, tensors in mine.items():
        assert tensors.keys() == theirs[name].keys()
        for key, value in tensors.items():
            assert torch.equal(value, theirs[name][key]), f"{name}/{key}"


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the single line of an error; nothing else may have been printed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def refuse(capsys: pytest.CaptureFixture[str], words: list[str], out: Path, *overrides: str) -> str:
    """Expect that a run is refused and writes nothing; return its error."""
    assert main([*words, f"output_dir={out}", *overrides]) == 2
    assert not out.exists()
    return only_error(capsys)
