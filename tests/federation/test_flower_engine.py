"""The same run on Flower's simulation engine: real processes, the same numbers, nothing left."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.run.directory import RunDirectory


def words(small_text: Path) -> list[str]:
    return ["run", "preset=tiny", "seed=3", f"data.path={small_text}", "local.threads=1"]


DIVERGING = ["local.lr=1e30", "local.optimizer=sgd", "local.steps=6"]


def start(small_text: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fomoe_flwr.cli", *words(small_text)]
    return subprocess.Popen(
        [*command, "engine=flower", f"output_dir={out}", *overrides],
        cwd=out.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass
class Ended:
    """What a run left: its exit status, its output, and its folder."""

    status: int
    stdout: str
    stderr: str
    folder: Path


@pytest.fixture(scope="module")
def runs(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Run both at the same time: most of it is waiting for processes to start and to end."""
    folder = tmp_path_factory.mktemp("flower")
    started = {
        name: start(small_text, folder / name, *overrides)
        for name, overrides in {"sound": [], "diverging": DIVERGING}.items()
    }
    return {
        name: Ended(stdout=out, stderr=err, status=process.returncode, folder=folder / name)
        for name, process in started.items()
        for out, err in [process.communicate(timeout=400)]
    }


def left_behind(home: Path) -> list[str]:
    """List processes that have to do with the run's Flower home, by command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            line, variables = process.cmdline(), process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(home) in word for word in [*line, *variables.values()]):
            found.append(" ".join(line))
    return found


@pytest.mark.flower
def test_flower_gives_the_run_that_one_process_gives(
    runs: dict[str, Ended], small_text: Path, tmp_path: Path
) -> None:
    done = runs["sound"]
    assert left_behind(done.folder) == []
    assert done.status == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert main([*words(small_text), f"output_dir={tmp_path / 'here'}"]) == 0

    run, here = RunDirectory(done.folder), RunDirectory(tmp_path / "here")
    assert run.read_summary()["status"] == "completed"
    assert (run.export / "model.safetensors").is_file()
    rows, wanted = run.read_metrics(), here.read_metrics()
    assert len(rows) == len(wanted) == 2
    for row, want in zip(rows, wanted, strict=True):
        for key in ("eval/loss", "train/loss", "train/grad_norm", "moe/ghost_fraction"):
            assert row[key] == pytest.approx(want[key], abs=1e-5), key
        for key in ("comm/bytes_up", "comm/bytes_down", "train/tokens", "round/workers_ok"):
            assert row[key] == want[key], key
    assert run.read_layouts() == here.read_layouts()


@pytest.mark.flower
def test_a_run_that_fails_inside_flower_fails_outside(runs: dict[str, Ended]) -> None:
    done = runs["diverging"]
    assert left_behind(done.folder) == []
    assert done.status == 1, done.stdout[-4000:] + done.stderr[-4000:]
    assert "training loss is nan" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    summary = RunDirectory(done.folder).read_summary()
    assert (summary["status"], summary["rounds_done"]) == ("failed", 0)
    assert "training loss is nan" in summary["error"]
