"""Sweeps: what is planned, refused, run, continued and reported."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import SettingsError, quoted
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.sweep import job as job_module
from fomoe_flwr.sweep.directory import SweepDirectory
from fomoe_flwr.sweep.job import JobRecord, end_if_running, read_record, run_job, write_record
from fomoe_flwr.sweep.plan import Plan, plan_sweep

FAKE_RUN = """
import json, os, signal, sys
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
seed = words.get("seed", "-")
folder = Path(words.get("output_dir", words.get("resume")).strip("'"))
with (folder / "starts.txt").open("a") as starts:
    starts.write(" ".join(words) + chr(10))
if seed == os.environ.get("FAIL_SEED"):
    print("error: this seed is unlucky")
    sys.exit(2)
if seed == os.environ.get("KILL_SEED"):
    (folder / "checkpoints" / "round-000001").mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
(folder / "metrics.jsonl").write_text(json.dumps({
    "round": 1, "eval/loss": 5.0, "round/seconds": 1.0, "train/loss": 5.5}) + chr(10))
(folder / "summary.json").write_text(json.dumps({
    "status": "completed", "rounds": 1, "rounds_done": 1, "eval/loss": {"last": 5.0},
    "comm/bytes_up": 10, "comm/bytes_down": 20}))
"""
"""A run that takes no time: it leaves what a run leaves, or fails as told."""


@pytest.fixture
def fake_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "fake_run.py"
    script.write_text(FAKE_RUN)
    monkeypatch.setattr(
        job_module, "run_command", lambda words: [sys.executable, "-S", str(script), *words]
    )


def starts(sweep: SweepDirectory) -> dict[str, list[str]]:
    """Return, for every seed, the keys of each start's words."""
    found = {}
    for job in sweep.plan().jobs:
        path = sweep.folder(job) / "starts.txt"
        found[job.varied["seed"]] = path.read_text().splitlines() if path.is_file() else []
    return found


def test_the_plan_is_the_cross_product_in_hydras_order() -> None:
    plan = plan_sweep(["preset=tiny", "layout.overlap=1,2", "seed=range(0,3)", "rounds=3"])
    assert [dict(job.varied) for job in plan.jobs] == [
        {"layout.overlap": str(overlap), "seed": str(seed)}
        for overlap in (1, 2)
        for seed in (0, 1, 2)
    ]
    assert all(job.refusal == "" for job in plan.jobs)
    assert plan.jobs[0].overrides == ("preset=tiny", "layout.overlap=1", "seed=0", "rounds=3")


def test_jobs_are_named_by_content() -> None:
    def names(*words: str) -> set[str]:
        return {job.name for job in plan_sweep(["preset=tiny", *words]).jobs}

    few = names("layout.overlap=1,2", "seed=0,1")
    assert few < names("layout.overlap=1,2", "seed=0,1,2")
    assert few == names("layout.overlap=2,1", "seed=1,0")
    assert few.isdisjoint(names("layout.overlap=1,2", "seed=0,1", "rounds=3"))
    # What is only reckoned with does not make another run.
    assert few == names("layout.overlap=1,2", "seed=0,1", "costs.up_mbps=5")


def test_a_name_is_a_safe_folder_name() -> None:
    plan = plan_sweep(["preset=tiny", "eval.sample_prompt='a/../b','c d'"])
    assert all(set("/ '\"=,").isdisjoint(job.name) for job in plan.jobs)
    assert len({job.name for job in plan.jobs}) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,0"], "would be run twice"),
        (["seed=0,1", "output_dir=/tmp/x"], "output_dir is not a setting of a sweep"),
        (["seed=0,1", "resume=/tmp/x"], "resume is not a setting of a sweep"),
        (["layout.overlp=1,2"], "did you mean layout.overlap?"),
        (["seed=(0,"], "seed"),
        (["local.lr=interval(0,1)"], "does not support sweep type"),
        (["layout.overlap=5,6"], "needs layout.num_workers >= 5"),
        ([], "needs something that varies"),
    ],
)
def test_what_no_job_could_take_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "sweep"
    assert main(["sweep", "--dir", str(target), *words]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


def test_contradictions_are_found_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_runs: None
) -> None:
    target = tmp_path / "sweep"
    words = ["preset=tiny", "layout.overlap=1,2,4", "seed=0,1"]
    assert main(["sweep", "--dir", str(target), *words]) == 2
    said = capsys.readouterr().err
    assert "2 of 6 combinations cannot run, nothing was started" in said
    assert said.count("needs layout.num_workers >= 4") == 2
    assert not target.exists()
    assert main(["sweep", "--dir", str(target), "--invalid", "skip", *words]) == 0
    rows = list(csv.DictReader((target / "results.csv").open()))
    assert [row["status"] for row in rows] == ["completed"] * 4 + ["skipped"] * 2
    assert "needs layout.num_workers >= 4" in rows[-1]["error"]


def test_a_failed_job_is_reported_and_stops_nobody(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fake_runs: None,
) -> None:
    monkeypatch.setenv("FAIL_SEED", "1")
    monkeypatch.setenv("KILL_SEED", "2")
    target = tmp_path / "sweep"
    assert main(["sweep", "-m", "--dir", str(target), "preset=tiny", "seed=0,1,2,3"]) == 1
    said = capsys.readouterr().out
    assert "failed    seed=1: this seed is unlucky" in said
    assert "failed    seed=2: killed by SIGKILL" in said
    rows = list(csv.DictReader((target / "results.csv").open()))
    assert [row["status"] for row in rows] == ["completed", "failed", "failed", "completed"]
    assert [row["eval/loss"] for row in rows] == ["5", "", "", "5"]
    assert pyarrow.parquet.read_table(target / "results.parquet").num_rows == 4

    # The second attempt does what is left, each in its own way, and nothing else.
    monkeypatch.delenv("FAIL_SEED")
    monkeypatch.delenv("KILL_SEED")
    assert main(["sweep", "--resume", str(target)]) == 0
    fresh = "preset seed output_dir"
    sweep = SweepDirectory(target)
    # Seed 1 left no checkpoint, so its folder was cleared and it began anew; seed 2 went on.
    assert starts(sweep) == {"0": [fresh], "1": [fresh], "2": [fresh, "resume"], "3": [fresh]}
    assert [sweep.record(job).attempts for job in sweep.plan().jobs] == [1, 2, 2, 1]
    assert "2 of 4 jobs were completed before" in capsys.readouterr().out


def test_more_values_go_on_where_fewer_ended(tmp_path: Path, fake_runs: None) -> None:
    target = str(tmp_path / "sweep")
    assert main(["sweep", "--dir", target, "preset=tiny", "seed=0,1"]) == 0
    assert main(["sweep", "--dir", target, "preset=tiny", "seed=2,1,0"]) == 0
    sweep = SweepDirectory(Path(target))
    assert {seed: len(lines) for seed, lines in starts(sweep).items()} == {"0": 1, "1": 1, "2": 1}


def test_resume_refuses_other_settings_and_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_runs: None
) -> None:
    target = str(tmp_path / "sweep")
    assert main(["sweep", "--dir", target, "preset=tiny", "seed=0"]) == 0
    capsys.readouterr()
    assert main(["sweep", "--resume", target, "rounds=5"]) == 2
    assert "rounds=5 cannot change" in capsys.readouterr().err
    assert main(["sweep", "--resume", str(tmp_path)]) == 2
    assert "is not a sweep" in capsys.readouterr().err


def test_one_sweep_at_a_time_in_a_folder(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path)
    again = SweepDirectory(tmp_path)
    with sweep.claimed(), pytest.raises(SettingsError, match="another sweep"), again.claimed():
        pass
    with sweep.claimed():
        pass


def test_a_job_that_a_killed_sweep_left_is_ended_and_only_that(tmp_path: Path) -> None:
    ours, others = tmp_path / "ours", tmp_path / "others"
    sleep = "import time; time.sleep(60)"
    for folder in (ours, others):
        command = [sys.executable, "-c", sleep, f"output_dir={quoted(str(tmp_path / 'ours'))}"]
        child = subprocess.Popen(command)
        try:
            record = JobRecord("running", "", 1, 0.0, time.time(), os.uname().nodename, child.pid)
            write_record(folder, record)
            end_if_running(folder)
            assert read_record(folder).status == "failed"
            assert (child.poll() is not None or not psutil.pid_exists(child.pid)) == (
                folder == ours
            )
        finally:
            child.kill()
            child.wait()


def test_a_job_whose_record_is_lost_but_whose_run_is_whole_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    RunDirectory(folder).write_summary({"status": "completed", "rounds": 2, "rounds_done": 2})
    assert run_job(folder, ["preset=no-such-preset"]).status == "completed"
    assert read_record(folder).attempts == 0


def test_a_stored_plan_is_the_plan(tmp_path: Path) -> None:
    plan = plan_sweep(["preset=tiny", "layout.overlap=1,4", "hydra/launcher=joblib"])
    plan.save(tmp_path / "sweep.json")
    assert Plan.load(tmp_path / "sweep.json") == plan
    assert plan.launcher == ("hydra/launcher=joblib",)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_real_runs_by_every_local_launcher(launcher: str, tmp_path: Path, small_text: Path) -> None:
    words = ["preset=tiny", "rounds=1", f"data.path={small_text}", "layout.overlap=1,2"]
    words += [f"hydra/launcher={launcher}"]
    command = [sys.executable, "-m", "fomoe_flwr.sweep", "-m", "--dir", str(tmp_path / "s"), *words]
    subprocess.run(command, check=True, timeout=300)
    sweep = SweepDirectory(tmp_path / "s")
    assert [sweep.record(job).status for job in sweep.plan().jobs] == ["completed"] * 2


@pytest.mark.slow
def test_jobs_go_through_slurm(tmp_path: Path, small_text: Path) -> None:
    """Stand-ins for sbatch, srun and squeue run the very batch file that the launcher wrote."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        # The tasks begin after the id is told, as on a cluster: the launcher needs it to put the
        # pickled jobs in their places.
        "sbatch": """
here=$(cd "$(dirname "$0")/.." && pwd)
for file in "$@"; do :; done
last=$(grep -oP '(?<=--array=0-)[0-9]+' "$file" || echo 0)
seq -f '7_%.0f' 0 "$last" >"$here/tasks"
touch "$here/done"
(
  for task in $(seq 0 "$last"); do
    SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NODELIST=here \\
    SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_JOB_NUM_NODES=1 \\
    bash "$file"
    echo "7_$task" >>"$here/done"
  done
) >"$here/tasks.log" 2>&1 </dev/null &
echo 'Submitted batch job 7'
""",
        "srun": """
while [ "${1#-}" != "$1" ]; do
  case "$1" in --output|--error) shift;; esac
  shift
done
exec "$@"
""",
        "squeue": """
here=$(dirname "$0")/..
for task in $(cat "$here/tasks"); do
  grep -qx "$task" "$here/done" && state=COMPLETED || state=RUNNING
  echo "$task|$state|None|1:00:00|here"
done
""",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tools / name).chmod(0o755)
    command = [sys.executable, "-m", "fomoe_flwr.cli", "sweep", "--dir", str(tmp_path / "s")]
    command += ["preset=tiny", "rounds=1", f"data.path={small_text}", "layout.overlap=1,2"]
    command += ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=debug"]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sweep = SweepDirectory(tmp_path / "s")
    assert [sweep.record(job).status for job in sweep.plan().jobs] == ["completed"] * 2
    assert (tmp_path / "done").read_text().split() == ["7_0", "7_1"]
    assert json.loads((sweep.path / "sweep.json").read_text())["launcher"]
