"""Nothing outlives its starter: it is killed with kill -9, and soon no descendant is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from fomoe_flwr.federation.deployment.loopback import Loopback
from fomoe_flwr.federation.deployment.process_family import family

ROOT = Path(__file__).parents[2]
VARIABLE = "FOMOE_TEST_STARTER"
LONGEST_SECONDS = 30.0
"""Two politely ended generations, one after the other, and a margin for a busy machine."""


@dataclass
class Started:
    """A starter and, by a mark that they inherit, its descendants."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid4().hex)
    process: subprocess.Popen[bytes] | None = None

    def begin(self, *command: str) -> None:
        """Start a program of Python's."""
        with (self.folder / "starter.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, VARIABLE: self.mark, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )

    def wait(self, is_ready: Callable[[], object], seconds: float) -> None:
        """Wait for something that the starter brings about."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not is_ready():
            text = (self.folder / "starter.log").read_text(encoding="utf-8", errors="replace")
            assert self.process.poll() in (None, 0), text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        """List what is left of the starter's kin."""
        own = self.process.pid if self.process is not None else 0
        return [each for each in family(self.mark, VARIABLE) if each.pid != own]

    def kill(self, pid: int = 0) -> float:
        """Kill the starter, or another process that is one; return when all others were gone."""
        assert self.process is not None
        assert self.descendants()
        os.kill(pid or self.process.pid, signal.SIGKILL)
        began = time.monotonic()
        if not pid:
            self.process.wait()
        while left := self.descendants():
            lasted = time.monotonic() - began
            assert lasted < LONGEST_SECONDS, [each.cmdline() for each in left]
            time.sleep(0.05)
        return time.monotonic() - began


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """Give a starter; whatever is left of it ends with the test."""
    each = Started(tmp_path)
    yield each
    for process in family(each.mark, VARIABLE):
        process.kill()


WARDS = """
import os, subprocess, sys, time
from fomoe_flwr.federation.deployment.guardian import guarded_children
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {deaf!r}]); "
with guarded_children():
    subprocess.Popen([sys.executable, "-c", child + "time.sleep(600)"], start_new_session=True)
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    os.kill(stopped.pid, 19)
    time.sleep(600)
"""

DRAWING = """
import time
from fomoe_flwr.parallel.processes import Processes
drawing = Processes("fomoe_flwr.report.drawing", 1)
time.sleep(600)
"""


@pytest.mark.parametrize(("code", "least"), [(WARDS, 4), (DRAWING, 1)], ids=["guardian", "pipe"])
def test_each_way_to_end_what_a_killed_process_started(
    code: str, least: int, started: Started
) -> None:
    started.begin("-c", code)
    started.wait(lambda: len(started.descendants()) >= least, 60)
    time.sleep(1)  # The last of them sets its signals.
    started.kill()


TINY = (
    *("preset=tiny", "rounds=500", "local.threads=1", "local.steps=1", "local.batch_size=2"),
    *("eval.max_tokens=512", "eval.sample_tokens=0"),
)


def has_round(folder: Path) -> Callable[[], object]:
    return lambda: [path for path in folder.rglob("metrics.jsonl") if path.stat().st_size]


RUNS = {
    "run engine=flower": ("run", "engine=flower"),
    "run of two ranks": ("run", "local.parallel=ddp", "local.processes=2", "local.device=cpu"),
    "federation run": ("federation", "run", "FOLDER/f", "--nodes", "2"),
    "sweep": ("sweep", "seed=0,1"),
    "sweep of Flower's runs": ("sweep", "seed=0,1", "engine=flower"),
    "sweep with joblib": ("sweep", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "sweep with submitit": ("sweep", "seed=0,1", "hydra/launcher=submitit_local"),
}


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_no_run_outlives_its_starter(words: tuple[str, ...], started: Started) -> None:
    place = [word.replace("FOLDER", str(started.folder)) for word in words]
    out = started.folder / "out"
    where = ["--dir", str(out)] if place[0] == "sweep" else [f"output_dir={out}"]
    started.begin("-m", "fomoe_flwr.cli", *place, *TINY, *where)
    started.wait(has_round(started.folder), 180)
    print(f"all gone after {started.kill():.1f} s")


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.parametrize("more", [(), ("--detach",)], ids=["up", "up --detach"])
def test_no_federation_outlives_its_keeper(more: tuple[str, ...], started: Started) -> None:
    folder = started.folder / "f"
    started.begin("-m", "fomoe_flwr.cli", "federation", "up", str(folder), "--nodes", "1", *more)
    log = started.folder / "starter.log"
    started.wait(lambda: b"up at" in log.read_bytes(), 180)
    assert len(started.descendants()) >= 3
    keeper = Loopback(folder).pids()["keeper"]
    print(f"all gone after {started.kill(keeper if more else 0):.1f} s")
