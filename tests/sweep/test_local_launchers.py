"""Launchers on one machine: what is killed or interrupted is told alike; nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import read_record

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
SLOW_RUN = """
import sys, time
if "fomoe_flwr.cli" in sys.orig_argv and "run" in sys.orig_argv:
    time.sleep(100)
    sys.exit(1)
"""
"""A run that does nothing for long, whatever process it is started from."""


class Waiting:
    """A sweep whose runs wait, in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path, launcher: str, *words: str) -> None:
        (folder / "sitecustomize.py").write_text(SLOW_RUN)
        self.sweep = SweepDirectory(folder / "s")
        self.output = folder / "output.txt"
        command = [sys.executable, "-m", "fomoe_flwr.sweep", "--dir", str(self.sweep.path)]
        command += ["preset=tiny", "seed=0,1", *LAUNCHERS[launcher], *words]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def runs(self, count: int) -> list[psutil.Process]:
        """Wait until so many runs are there."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            if self.sweep.is_sweep:
                folders = [self.sweep.folder(job) for job in self.sweep.plan().jobs]
                pids = [read_record(folder).pid for folder in folders]
                if len(found := [pid for pid in pids if pid]) == count:
                    return [psutil.Process(pid) for pid in found]
            time.sleep(0.2)
        raise AssertionError(self.output.read_text())

    def end(self) -> str:
        self.process.wait(60)
        return self.output.read_text()

    @property
    def errors(self) -> list[str]:
        return [self.sweep.record(job).error for job in self.sweep.plan().jobs]


@pytest.fixture
def begun() -> Iterator[list[Waiting]]:
    """What a test began ends with it."""
    all_begun: list[Waiting] = []
    yield all_begun
    for each in all_begun:
        with_children = [each.process.pid, *(p.pid for p in _children(each.process.pid))]
        for pid in with_children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        each.process.wait()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("whom", "number"),
    [("group", signal.SIGINT), pytest.param("sweep", signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_interrupted(
    launcher: str, whom: str, number: signal.Signals, tmp_path: Path, begun: list[Waiting]
) -> None:
    waiting = Waiting(tmp_path, launcher)
    begun.append(waiting)
    runs = waiting.runs(1 if launcher == "basic" else 2)
    others = _children(waiting.process.pid)
    if whom == "group":
        os.killpg(waiting.process.pid, number)
    else:
        waiting.process.send_signal(number)
    said = waiting.end()
    assert waiting.process.returncode == {2: 130, 15: 143}[number], said
    assert "Traceback" not in said
    assert all(error.startswith("interrupted") for error in waiting.errors[: len(runs)])
    assert not psutil.wait_procs([*runs, *others], timeout=10)[1]
    assert "stay in SLURM's queue" not in said


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_run_is_told_and_stops_nobody(
    launcher: str, tmp_path: Path, begun: list[Waiting]
) -> None:
    waiting = Waiting(tmp_path, launcher)
    begun.append(waiting)
    for count in (1, 1) if launcher == "basic" else (2,):
        for run in waiting.runs(count):
            run.kill()
        time.sleep(1)
    said = waiting.end()
    assert waiting.process.returncode == 1
    assert waiting.errors == ["killed by SIGKILL"] * 2
    assert "Traceback" not in said
    assert f"go on: fomoe sweep --resume {waiting.sweep.path}\n" in said
    assert not (waiting.sweep.path / ".submitit").exists() or launcher == "submitit_local"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_killed_process_of_the_launcher(
    launcher: str, tmp_path: Path, begun: list[Waiting]
) -> None:
    waiting = Waiting(tmp_path, launcher)
    begun.append(waiting)
    runs = waiting.runs(2)
    runs[0].parent().kill()
    time.sleep(1)
    for run in runs[1:]:
        if run.is_running():
            run.kill()
    said = waiting.end()
    assert waiting.process.returncode == 1, said
    assert "Traceback" not in said
    assert not psutil.wait_procs(runs, timeout=10)[1]
    assert ("error: a process of the launcher was killed: " in said) == (launcher == "joblib")
    assert f"go on: fomoe sweep --resume {waiting.sweep.path}\n" in said


@pytest.mark.slow
def test_out_of_time(tmp_path: Path, begun: list[Waiting]) -> None:
    waiting = Waiting(tmp_path, "submitit_local", "hydra.launcher.timeout_min=1")
    begun.append(waiting)
    said = waiting.end()
    assert waiting.process.returncode == 1, said
    assert "time limit 1 min each (hydra.launcher.timeout_min)" in said
    assert waiting.errors == ["TIMEOUT: it met its time limit"] * 2
    assert f"--resume {waiting.sweep.path} hydra.launcher.timeout_min=MINUTES\n" in said
