"""Runs that are stopped, killed or finished, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Start, assert_same_end, assert_same_tensors, lasting, only_error, stored

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import read_settings
from fomoe_flwr.federation import client
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.run.checkpoint import stored_rounds
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.heartbeat import Heartbeat
from fomoe_flwr.run.tracking import Tracker

RESUMED = ["rounds=4", "outer=nesterov", "layout.kind=random", "layout.reshuffle_every=2"]


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def stop_at(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, is_time: Callable[..., bool]
) -> None:
    """Make a method raise instead of doing its work once it is time."""
    inner = getattr(owner, name)

    def instead(self: Any, *arguments: Any) -> Any:
        if is_time(*arguments):
            raise StoppedError
        return inner(self, *arguments)

    monkeypatch.setattr(owner, name, instead)


def resume(run: RunDirectory, *overrides: str) -> None:
    assert main(["run", f"resume={run.path}", *overrides]) == 0


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(
    "moment",
    ["in the third evaluation", "after one reply of round three", "between checkpoint and line"],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    start: Start, moment: str, delay: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [*RESUMED, f"outer.delay_steps={delay}", f"outer.merge_alpha={delay / 4}"]
    whole = start("whole", *words)
    with monkeypatch.context() as patch:
        if moment == "in the third evaluation":
            from fomoe_flwr.federation.server import Server

            stop_at(patch, Server, "_close_round", lambda record: record.server_round == 3)
        elif moment == "after one reply of round three":
            # Two queries and two tasks a round: the eighth pull is worker 1's in round 3.
            pulls = iter(range(1, 100))
            stop_at(patch, InProcessGrid, "pull_messages", lambda ids: next(pulls) == 8)
        else:
            stop_at(patch, Tracker, "log", lambda row: row["round"] == 3)
        with pytest.raises(StoppedError):
            start("halved", *words)
    halved = RunDirectory(tmp_path / "halved")
    assert halved.read_summary()["status"] == "failed"
    assert [row["round"] for row in halved.read_metrics()] == [1, 2]
    resume(halved)
    assert_same_end(whole, halved)
    summary, other = halved.read_summary(), whole.read_summary()
    assert summary["status"] == "completed"
    for key in ("eval/loss", "comm/bytes_up", "comm/bytes_down", "tokens"):
        assert summary[key] == other[key]


@pytest.mark.parametrize(
    "mode",
    [
        "outer=nesterov layout.kind=rolling layout.overlap=1",
        "outer=local_adamw layout.kind=random",
        "outer=des_loc outer.first_moment_every=1 outer.second_moment_every=2",
        "outer.fragments=2 layout.kind=balanced",
        "wire.up=int4 wire.rounding=stochastic wire.down=bfloat16",
        "wire.up=topk_int2 layout.kind=random",
        "outer.weighting=uniform privacy.clip_norm=0.1 privacy.noise_multiplier=1 "
        "privacy.noise_seed=3",
        "outer=nesterov outer.clip_to_median=1",
        "outer.robust=median outer.weighting=uniform",
        "balance.form=global local.schedule=wsd model.routing=partitioned",
    ],
)
def test_every_mode_goes_on_as_if_it_had_not_been_stopped(
    mode: str, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fomoe_flwr.federation.server import Server

    overrides = ["rounds=4", *mode.split()]
    whole = start("whole", *overrides)
    with monkeypatch.context() as patch:
        stop_at(patch, Server, "_close_round", lambda record: record.server_round == 3)
        with pytest.raises(StoppedError):
            start("halved", *overrides)
    halved = RunDirectory(tmp_path / "halved")
    resume(halved)
    assert_same_end(whole, halved)


def test_a_run_whose_process_was_killed_ends_as_if_it_had_not_been(
    start: Start, words: list[str], tmp_path: Path
) -> None:
    overrides = ["rounds=8", "outer=nesterov", "layout.kind=random", "layout.reshuffle_every=2"]
    whole = start("whole", *overrides)
    killed = RunDirectory(tmp_path / "killed")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fomoe_flwr.cli",
                *words,
                *overrides,
                f"output_dir={killed.path}",
            ],
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 60
    while len(killed.read_metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    assert killed.read_summary()["status"] == "running"
    assert 3 <= len(killed.read_metrics()) < 8
    resume(killed)
    assert_same_end(whole, killed)


def test_a_killed_run_of_fragments_and_moments_resumes_bit_by_bit(
    start: Start, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = [
        "outer=local_adamw", "outer.fragments=2", "layout.kind=random", "layout.reshuffle_every=3",
        "layout.num_workers=3", "layout.overlap=2", "balance=recommended", "rounds=6",
        "checkpoint.every=2", "outer.weighting=routed", "outer.router_rows=holders",
        "local.steps=1", "eval.max_tokens=128", "eval.sample_tokens=0",
    ]  # fmt: skip
    straight = start("straight", *modes)
    inner = client.run_round

    def kill(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        if (task.server_round, task.worker) == (5, 1):
            raise KeyboardInterrupt
        return result

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(client, "run_round", kill)
        assert main([*words, f"output_dir={out}", *modes]) == 130
    assert main(["run", f"resume={out}"]) == 0
    resumed = RunDirectory(out)
    assert_same_tensors(stored(resumed), stored(straight))
    rows = [lasting(run) for run in (resumed, straight)]
    assert json.dumps(rows[0]) == json.dumps(rows[1])
    assert [row["round/workers_failed"] for row in rows[0]] == [0] * 6


def test_a_line_cut_off_by_a_crash_is_written_again(start: Start) -> None:
    run = start("run", "rounds=2")
    before = lasting(run)
    text = run.metrics.read_text(encoding="utf-8")
    run.metrics.write_text(text[:-40], encoding="utf-8")
    resume(run)
    assert lasting(run) == before


def test_resuming_a_finished_run_changes_nothing(start: Start) -> None:
    run = start("run")
    before, state, text = lasting(run), stored(run), run.metrics.read_text(encoding="utf-8")
    resume(run)
    assert lasting(run) == before
    assert run.metrics.read_text(encoding="utf-8") == text
    assert run.read_summary()["status"] == "completed"
    assert_same_tensors(stored(run), state)


def test_a_finished_run_can_be_given_more_rounds(start: Start) -> None:
    run = start("run", "rounds=2", "local.schedule=constant")
    resume(run, "rounds=3")
    whole = start("whole", "rounds=3", "local.schedule=constant")
    assert_same_end(whole, run)
    assert run.read_summary()["rounds_done"] == 3
    settings = read_settings(run.config)
    assert (settings.rounds, settings.resume) == (3, "")
    resume(run)
    assert run.read_summary()["status"] == "completed"


def test_a_run_cannot_be_resumed_with_fewer_rounds_than_it_has_done(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=2")
    before = run.read_summary()
    capsys.readouterr()
    assert main(["run", f"resume={run.path}", "rounds=1"]) == 2
    assert only_error(capsys) == (f"rounds=1 but {run.path} has done 2: resume it with rounds >= 2")
    assert run.read_summary() == before
    assert read_settings(run.config).rounds == 2


def test_a_run_stopped_in_its_first_round_is_resumed_from_its_untrained_model(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fomoe_flwr.federation.server import Server

    whole = start("whole")
    with monkeypatch.context() as patch:
        stop_at(patch, Server, "_close_round", lambda record: True)
        with pytest.raises(StoppedError):
            start("run")
    run = RunDirectory(tmp_path / "run")
    assert stored_rounds(run.checkpoints) == [0]
    resume(run)
    assert_same_end(whole, run)


def test_a_run_that_never_wrote_a_checkpoint_cannot_be_resumed_but_begun_again(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fomoe_flwr.federation.server import Server

    with monkeypatch.context() as patch:
        stop_at(patch, Server, "_evaluate_start", lambda: True)
        with pytest.raises(StoppedError):
            start("run")
    capsys.readouterr()
    assert main(["run", f"resume={tmp_path / 'run'}"]) == 2
    assert "holds no checkpoint: nothing to resume from" in only_error(capsys)
    assert start("run").read_summary()["status"] == "completed"


def test_a_run_directory_has_one_writer(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run")
    before = run.read_summary()
    with Heartbeat(run.heartbeat):
        capsys.readouterr()
        assert main(["run", f"resume={run.path}"]) == 1
        assert only_error(capsys) == (
            f"another process writes to {run.path}: end it before you resume the run"
        )
    assert run.read_summary() == before
    resume(run)
