"""Jobs in SLURM's queue: every way in which one can end, told by SLURM's own word."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.errors import RunError
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.sweep import command, slurm
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import JobRecord, read_record, write_record
from fomoe_flwr.sweep.plan import plan_sweep
from fomoe_flwr.sweep.progress import Progress
from fomoe_flwr.sweep.queue import Submission, advice, told

launchers = pytest.importorskip("fomoe_flwr.sweep.launchers")

DOWN, FORGOTTEN = "no answer", "forgotten"
KILLED = JobRecord("failed", "exit status 143: terminated", attempts=1)
OWN = JobRecord("failed", "this seed is unlucky", attempts=1)
WHOLE = JobRecord("completed", attempts=1)
RUNS = JobRecord("running", attempts=1, host="another")

KINDS: dict[str, tuple[Sequence[Any], str, str]] = {
    # name: (what SLURM says, with what the job writes meanwhile; status; the error's beginning)
    "cancelled while pending": (["PENDING", "CANCELLED"], "failed", "CANCELLED: somebody"),
    "cancelled while running": ([RUNS, "RUNNING", KILLED, "CANCELLED"], "failed", "CANCELLED: "),
    "out of time": (
        [RUNS, "RUNNING", KILLED, "TIMEOUT"],
        "failed",
        "TIMEOUT: it met its time limit",
    ),
    "out of time, killed": (
        [RUNS, "RUNNING", "TIMEOUT"],
        "failed",
        "TIMEOUT: it met its time limit",
    ),
    "node fails": ([RUNS, "RUNNING", "NODE_FAIL"], "failed", "NODE_FAIL: its node n1 failed"),
    "node does not boot": (["CONFIGURING", "BOOT_FAIL"], "failed", "BOOT_FAIL: its node"),
    "out of memory": ([RUNS, "RUNNING", KILLED, "OUT_OF_MEMORY"], "failed", "OUT_OF_MEMORY: it"),
    "preempted": ([RUNS, "RUNNING", KILLED, "PREEMPTED"], "failed", "PREEMPTED: another job"),
    "too late": (["PENDING", "DEADLINE"], "failed", "DEADLINE: it met its deadline"),
    "the run fails": ([RUNS, "RUNNING", OWN, "COMPLETED"], "failed", "this seed is unlucky"),
    "never begins": (["PENDING", "FAILED"], "failed", "FAILED: its process ended before"),
    "forgotten": (["PENDING", FORGOTTEN], "failed", "UNKNOWN: SLURM no longer knows it"),
    "forgotten after a failure": ([OWN, "RUNNING", FORGOTTEN], "failed", "this seed is unlucky"),
    "done": ([RUNS, "RUNNING", WHOLE, "COMPLETED"], "completed", ""),
    "done and forgotten": ([RUNS, "RUNNING", WHOLE, FORGOTTEN], "completed", ""),
    "done, then cancelled": ([WHOLE, "RUNNING", "CANCELLED"], "completed", ""),
    "requeued": ([KILLED, "RUNNING", "PENDING", "RUNNING", WHOLE, "COMPLETED"], "completed", ""),
    "ended for a moment": (
        ["RUNNING", ("NODE_FAIL",), "PENDING", WHOLE, "COMPLETED"],
        "completed",
        "",
    ),
    "controller down": (["RUNNING", DOWN, DOWN, "RUNNING", WHOLE, "COMPLETED"], "completed", ""),
    "down for ever, run whole": (["RUNNING", DOWN, WHOLE, DOWN], "completed", ""),
}


class FakeSlurm:
    """Answers with one state after the other; the last two looks at an end agree."""

    def __init__(self, folder: Path, script: Sequence[Any]) -> None:
        self.folder, self.script, self.state = folder, list(script), "PENDING"

    def ask(self, words: list[str]) -> str:
        if words[0] == "sacct":
            raise slurm.NoAnswerError("Slurm accounting storage is disabled")
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, JobRecord):
                self.write(step)
                continue
            self.state = step[0] if isinstance(step, tuple) else step
            break
        if self.state == DOWN:
            raise slurm.NoAnswerError("Unable to contact slurm controller")
        if self.state == FORGOTTEN:
            return "8|RUNNING|None|5:00|n2\n"
        return f"7_0|{self.state}|Resources|1:00:00|n1\n"

    def write(self, record: JobRecord) -> None:
        write_record(self.folder, record)
        if record.status == "completed":
            summary = {"status": "completed", "rounds": 1, "rounds_done": 1}
            RunDirectory(self.folder).write_summary({**summary, "eval/loss": {"last": 5.0}})


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDirectory:
    """A sweep of one job that was just submitted."""
    directory = SweepDirectory(tmp_path / "s")
    plan = plan_sweep(["preset=tiny", "seed=0"])
    directory.path.mkdir()
    plan.save(directory.plan_file)
    log = directory.path / ".submitit" / "7_0" / "7_0_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("srun: error\n")
    (log.parent / "7_0_submitted.pkl").write_text("")
    name = plan.jobs[0].name
    directory.queue.put({name: Submission("7_0", time.time(), 0, str(log), since=time.time())})
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_ends(
    kind: str,
    sweep: SweepDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, status, error = KINDS[kind]
    job = sweep.plan().jobs[0]
    fake = FakeSlurm(sweep.folder(job), script)
    monkeypatch.setattr(slurm, "_ask", fake.ask)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        assert len(pauses) < 20, "waits for ever"

    launchers.watch(sweep, [job], pause)
    record = sweep.record(job)
    assert record.status == status
    assert record.error.startswith(error)
    said = capsys.readouterr().out
    assert (f"requeued  {job.label}: SLURM put job 7_0" in said) == (
        kind in ("requeued", "ended for a moment")
    )
    assert ("SLURM does not answer" in said) == (DOWN in script)
    assert math.isnan(sweep.loss(job)) == (status == "failed")

    launchers.tidy(sweep, {job.name: sweep.path / ".submitit" / "7_0"})
    left = [path.name for path in sweep.path.rglob("*") if "7_0" in path.name]
    if status == "failed":
        assert left == ["7_0", "7_0_0_log.err"]
        assert sweep.log(job) is not None
    elif kind != "down for ever, run whole":
        assert left == []
        assert not sweep.queue.path.exists()

    # The next sweep starts from the jobs' own records.
    fake.state, fake.script = "COMPLETED", []
    command._settle(sweep, on_slurm=True)
    assert not sweep.queue.path.exists()
    assert (read_record(sweep.folder(job)).status, sweep.record(job).error) == (
        status,
        record.error,
    )


@pytest.mark.parametrize(
    ("state", "record", "shown"),
    [
        ("PENDING", JobRecord(), "queued"),
        ("CONFIGURING", JobRecord(), "queued"),
        ("RUNNING", JobRecord(), "running"),
        ("COMPLETING", OWN, "running"),
        ("REQUEUED", KILLED, "queued"),
        ("SUSPENDED", RUNS, "running"),
        ("PENDING", WHOLE, "completed"),
    ],
)
def test_while_slurm_has_a_job_its_word_counts(state: str, record: JobRecord, shown: str) -> None:
    now = told(record, Submission("7_0", 0.0, state=state))
    assert (now.status, now.error) == (shown, "")


@pytest.mark.parametrize(
    ("errors", "more"),
    [
        (["TIMEOUT: it met its time limit"], " hydra.launcher.timeout_min=MINUTES"),
        (["OUT_OF_MEMORY: it needed more", "killed by SIGKILL"], " hydra.launcher.mem_gb=GB"),
        (["CANCELLED: somebody", "loss: is not finite"], ""),
    ],
)
def test_the_end_says_how_to_go_on(errors: list[str], more: str) -> None:
    assert advice(Path("/s"), errors) == f"fomoe sweep --resume /s{more}"


def test_what_waits_and_what_runs_is_told(
    sweep: SweepDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    job = sweep.plan().jobs[0]
    progress = Progress(sweep, sweep.plan(), lambda: None)
    sweep.queue.put({job.name: Submission("7_0", 0.0, since=time.time(), reason="Resources")})
    progress._say_running()
    assert "    queued    1 SLURM job (7_0) since " in (said := capsys.readouterr().out)
    assert said.endswith("(Resources)\n")
    sweep.queue.put({job.name: Submission("7_0", 0.0, reason="launch failed requeued held")})
    progress._say_running()
    assert "held until somebody says: scontrol release 7_0\n" in capsys.readouterr().out
    write_record(sweep.folder(job), JobRecord("running", started=time.time()))
    sweep.queue.put({job.name: Submission("7_0", 0.0, state="RUNNING")})
    progress._say_running()
    assert f"    running   {job.label} | round 0 of ? | since " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "state"),
    [
        ("7_0|CANCELLED by 1000|n1|01:00:00", "CANCELLED"),
        ("7_[0-3%2]|CANCELLED by 0|None assigned|01:00:00", "CANCELLED"),
        ("7_0|TIMEOUT|n1|01:00:00", "TIMEOUT"),
        ("9|FAILED|n1|01:00:00", "UNKNOWN"),
    ],
)
def test_accounting_is_asked_for_what_left_the_queue(
    row: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"squeue": "", "sacct": f"JobID|State|NodeList|Timelimit\n{row}\n"}
    monkeypatch.setattr(slurm, "_ask", lambda words: answers[words[0]])
    assert slurm.look({"7_0"})["7_0"].state == state


class FakeJobs:
    """A cluster for whole sweeps: what is submitted gets a number, and runs when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.states: dict[str, str] = {}
        self.submissions = 0
        self.interrupt = False
        self.then = "COMPLETED"
        self.logs = tmp_path / "logs"
        self.sweep = SweepDirectory(tmp_path / "s")
        monkeypatch.setattr(slurm, "_ask", self.ask)
        monkeypatch.setattr(slurm, "check_programs", lambda: None)
        monkeypatch.setattr(launchers._Launcher, "_submit", lambda _, jobs: self.submit(jobs))
        monkeypatch.setattr(launchers, "_ASK_SECONDS", (0.0, 0.0))
        monkeypatch.setattr(command, "_gather", lambda _: None)

    def submit(self, jobs: Sequence[Any]) -> list[Any]:
        self.submissions += 1
        ids = [f"{self.submissions}_{number}" for number in range(len(jobs))]
        self.states |= dict.fromkeys(ids, "PENDING")
        return [SimpleNamespace(job_id=i, paths=SimpleNamespace(stderr=self.logs)) for i in ids]

    def ask(self, words: list[str]) -> str:
        if self.interrupt:
            raise KeyboardInterrupt
        if words[0] == "sacct":
            return ""
        for name, each in self.sweep.queue.live().items():
            if self.then == "COMPLETED":
                FakeSlurm(self.sweep.jobs / name, []).write(WHOLE)
            self.states[each.id] = self.then
        return "".join(f"{i}|{state}|None|1:00|n1\n" for i, state in self.states.items())


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeJobs:
    return FakeJobs(monkeypatch, tmp_path)


WORDS = ["preset=tiny", "seed=0,1", "hydra/launcher=submitit_slurm"]


def test_an_interrupted_sweep_leaves_its_jobs_and_finds_them_again(
    jobs: FakeJobs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = str(jobs.sweep.path)
    jobs.interrupt = True
    assert main(["sweep", "--dir", target, *WORDS]) == 130
    said = capsys.readouterr().out
    assert "submitted 2 SLURM jobs (1_0, 1_1), time limit 60 min each" in said
    assert "2 SLURM jobs (1_0, 1_1) stay in SLURM's queue; wait for them again: " in said
    assert f"fomoe sweep --resume {target}; end them: scancel 1\n" in said

    # Nobody runs them a second time beside the queue.
    jobs.interrupt = False
    jobs.then = "RUNNING"
    assert main(["sweep", "--resume", target, "hydra/launcher=basic"]) == 2
    assert "scancel them first, or resume with hydra/launcher" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(
            slurm, "_ask", lambda words: (_ for _ in ()).throw(slurm.NoAnswerError("down"))
        )
        assert main(["sweep", "--resume", target]) == 1
    assert "SLURM does not tell (down)" in capsys.readouterr().err

    def answer(words: list[str]) -> str:
        said = jobs.ask(words)
        jobs.then = "COMPLETED"
        return said

    monkeypatch.setattr(slurm, "_ask", answer)
    assert main(["sweep", "--resume", target]) == 0
    said = capsys.readouterr().out
    assert "2 SLURM jobs (1_0, 1_1) went on without this sweep: waiting for them" in said
    assert jobs.submissions == 1
    assert main(["sweep", "--resume", target]) == 0
    assert jobs.submissions == 1


def test_a_failed_sweep_on_slurm_goes_on_with_more_time(
    jobs: FakeJobs, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(jobs.sweep.path)
    jobs.then = "TIMEOUT"
    assert main(["sweep", "--dir", target, *WORDS]) == 1
    said = capsys.readouterr().out
    assert "#0 failed: TIMEOUT: it met its time limit of 1:00, SLURM job 1_0" in said
    assert f"go on: fomoe sweep --resume {target} hydra.launcher.timeout_min=MINUTES" in said
    jobs.then = "COMPLETED"
    assert main(["sweep", "--resume", target, "hydra.launcher.timeout_min=120"]) == 0
    assert jobs.submissions == 2
    # One word changes that word only; the launcher stays.
    assert "hydra/launcher=submitit_slurm" in jobs.sweep.plan().launcher
    assert "time limit 120 min each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=submitit_slurm"], "sbatch, squeue, srun not found on PATH"),
        (["hydra/launcher=no_such"], "Could not find 'hydra/launcher/no_such'"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jbs=2"], "n_jbs"),
    ],
)
def test_a_launcher_that_cannot_be_is_refused_in_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(command, "_gather", lambda _: None)
    assert main(["sweep", "--dir", str(tmp_path / "s"), "preset=tiny", "seed=0,1", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_no_answer_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(RunError, match=r"^slurm_load_jobs error: Unable to contact$"):
        slurm.look({"7_0"})


@pytest.mark.parametrize(
    ("reason", "todo"),
    [
        ("Batch job submission failed: Invalid partition name", "change hydra.launcher.KEY, e.g. "),
        (
            "Batch job submission failed: Job violates accounting/QOS policy",
            "change hydra.launcher",
        ),
        ("Unable to contact slurm controller (connect failure)", "try again when it answers"),
    ],
)
def test_what_sbatch_says_is_passed_on(
    reason: str,
    todo: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("sbatch", "srun", "squeue"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{name}: error: {reason}' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(command, "_gather", lambda _: None)
    assert main(["sweep", "--dir", str(tmp_path / "s"), *WORDS]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: sbatch refused the jobs, nothing was submitted: {reason}; {todo}"
    )
    assert error.count("\n") == 1
