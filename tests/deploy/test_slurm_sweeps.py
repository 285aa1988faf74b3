"""`fomoe sweep` on a real SLURM of one node: what people and clusters do to its jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing

from fomoe_flwr.sweep.directory import SweepDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM lacks here: {', '.join(missing())}"),
]

ROOT = Path(__file__).resolve().parents[2]
BRIEF, LONG, LONGEST = 1, 100, 700
"""Rounds that take a quarter of a minute, about half a minute, and more than a minute."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two jobs at a time."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), cpus=2)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Sweep:
    """A `fomoe sweep` that waits beside the test."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str) -> None:
        self.directory = SweepDirectory(folder)
        self.output = folder.with_suffix(".txt")
        environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fomoe_flwr.cli", "sweep", *words],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, ready: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.5)

    def until(self, text: str, seconds: float = 90) -> None:
        self.wait_for(lambda: text in self.said, seconds)

    def end(self, seconds: float = 300) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    @property
    def ids(self) -> list[str]:
        """The jobs' numbers in the queue, in the order of the plan."""
        known = self.directory.queue.read()
        return [known[job.name].id for job in self.directory.plan().jobs if job.name in known]

    def trains(self, number: int) -> bool:
        """Tell whether a job has done a round."""
        if "submitted" not in self.said and "went on" not in self.said:
            return False
        job = self.directory.plan().jobs[number]
        return bool(self.directory.run(job).read_metrics())

    @property
    def statuses(self) -> list[str]:
        return [self.directory.record(job).status for job in self.directory.plan().jobs]


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path, small_text: Path) -> Iterator[Callable[..., Sweep]]:
    """Return a function that starts or resumes a sweep in the test's folder."""
    begun = []

    def run(*words: str, rounds: int = 0) -> Sweep:
        folder = tmp_path / "sweep"
        if rounds:
            words = (
                *("--dir", str(folder), "preset=tiny", f"rounds={rounds}"),
                *(f"data.path={small_text}", "hydra/launcher=submitit_slurm", *words),
            )
        else:
            words = ("--resume", str(folder), *words)
        begun.append(Sweep(cluster, folder, *words))
        return begun[-1]

    yield run
    for sweep in begun:
        sweep.process.kill()
        sweep.process.wait()
    cluster.run("scancel", f"--user={os.getuid()}")


def failures(sweep: Sweep) -> list[str]:
    """Return what the end of the output says of failed jobs, by number."""
    return re.findall(r"^#(\d+ failed: \w+)", sweep.said, re.MULTILINE)


def test_cancelled_and_out_of_time(cluster: Cluster, start: Callable[..., Sweep]) -> None:
    sweep = start("seed=0,1,2", "hydra.launcher.timeout_min=1", rounds=LONGEST)
    sweep.until("submitted 3 SLURM jobs")
    assert "time limit 1 min each (hydra.launcher.timeout_min)" in sweep.said
    sweep.wait_for(lambda: sweep.trains(0) and sweep.trains(1))
    assert sweep.statuses == ["running", "running", "queued"]
    cluster.run("scancel", sweep.ids[2])
    cluster.run("scancel", sweep.ids[1])
    assert sweep.end() == 1, sweep.said
    assert failures(sweep) == ["0 failed: TIMEOUT", "1 failed: CANCELLED", "2 failed: CANCELLED"]
    assert "Traceback" not in sweep.said
    assert "interrupted" not in sweep.said
    resume = f"fomoe sweep --resume {sweep.directory.path} hydra.launcher.timeout_min=MINUTES"
    assert f"go on: {resume}" in sweep.said

    again = start("hydra.launcher.timeout_min=30")
    assert again.end(1200) == 0, again.said
    assert again.statuses == ["completed"] * 3
    assert [again.directory.record(job).attempts for job in again.directory.plan().jobs] == [
        2,
        2,
        1,
    ]
    assert not (again.directory.path / ".submitit").exists()
    assert not again.directory.queue.path.exists()


@pytest.mark.parametrize("requeue", [True, False])
def test_the_node_fails(cluster: Cluster, start: Callable[..., Sweep], requeue: bool) -> None:
    words = [] if requeue else ["+hydra.launcher.additional_parameters.no-requeue=true"]
    sweep = start("seed=0,1", *words, rounds=LONG)
    sweep.wait_for(lambda: sweep.trains(0) and sweep.trains(1))
    cluster.fail_node()
    if requeue:
        sweep.until("requeued  seed=0: SLURM put job")
        sweep.until("requeued  seed=1: SLURM put job")
        assert sweep.statuses == ["queued", "queued"]
        assert "failed" not in sweep.said
    else:
        assert sweep.end() == 1, sweep.said
        assert failures(sweep) == ["0 failed: NODE_FAIL", "1 failed: NODE_FAIL"]
    # The node still ends the jobs; SLURM holds a job that comes upon itself there.
    time.sleep(15)
    cluster.resume_node()
    if requeue:
        # SLURM lets jobs that were put back wait for two minutes.
        for number in sweep.ids:
            cluster.run("scontrol", "update", f"jobid={number}", "starttime=now")
    else:
        sweep = start()
    assert sweep.end() == 0, sweep.said
    assert sweep.statuses == ["completed"] * 2


def test_the_controller_is_down_for_a_while(cluster: Cluster, start: Callable[..., Sweep]) -> None:
    sweep = start("seed=0,1", rounds=LONG)
    sweep.wait_for(lambda: sweep.trains(0) and sweep.trains(1))
    cluster.end("slurmctld", signal.SIGKILL)
    try:
        sweep.until("SLURM does not answer, asking on: ")
    finally:
        cluster.start_controller()
    sweep.until("SLURM answers again")
    assert sweep.end() == 0, sweep.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_jobs_outlive_the_sweep_that_waits(
    cluster: Cluster, start: Callable[..., Sweep], number: signal.Signals
) -> None:
    sweep = start("seed=0,1,2", rounds=LONG)
    sweep.wait_for(lambda: sweep.trains(0) and sweep.trains(1))
    ids = sweep.ids
    sweep.process.send_signal(number)
    assert sweep.end() == {2: 130, 15: 143, 9: -9}[number], sweep.said
    if number != signal.SIGKILL:
        assert f"3 SLURM jobs ({', '.join(ids)}) stay in SLURM's queue" in sweep.said
        assert f"--resume {sweep.directory.path}; end them: scancel {ids[0][:-2]}" in sweep.said
    assert sweep.statuses == ["running", "running", "queued"]

    here = start("hydra/launcher=basic")
    assert here.end() == 2, here.said
    assert "of this sweep are in the queue: scancel them first, or resume with" in here.said

    again = start()
    again.until(f"3 SLURM jobs ({', '.join(ids)}) went on without this sweep: waiting for them")
    cluster.run("scancel", ids[2])
    assert again.end() == 1, again.said
    assert "submitted" not in again.said
    assert again.statuses == ["completed", "completed", "failed"]
    assert failures(again) == ["2 failed: CANCELLED"]


def test_what_sbatch_refuses_takes_one_line(start: Callable[..., Sweep]) -> None:
    sweep = start("seed=0,1", "hydra.launcher.partition=nope", rounds=BRIEF)
    assert sweep.end() == 2
    assert sweep.said.count("\n") == 3, sweep.said
    assert "error: sbatch refused the jobs, nothing was submitted: " in sweep.said
    again = start("hydra.launcher.partition=debug")
    assert again.end() == 0, again.said


def test_a_job_that_never_began_shows_its_log(start: Callable[..., Sweep]) -> None:
    sweep = start("seed=0,1", "hydra.launcher.setup=[exit 3]", rounds=BRIEF)
    assert sweep.end() == 1, sweep.said
    assert failures(sweep) == ["0 failed: FAILED", "1 failed: FAILED"]


def test_nothing_runs_that_completed_before(start: Callable[..., Sweep]) -> None:
    assert start("seed=0,1", rounds=BRIEF).end() == 0
    again = start()
    assert again.end() == 0
    assert "submitted" not in again.said
    assert json.loads(again.directory.plan_file.read_text())["launcher"]
