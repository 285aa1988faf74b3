"""Whole runs through the command line: what they leave behind, repeat, resume and refuse."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import load_settings, read_settings
from fomoe_flwr.federation.deployment.launch import project_root, words_for
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.run_config import settings_of
from fomoe_flwr.report import live
from fomoe_flwr.run.checkpoint import stored_rounds
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.heartbeat import Heartbeat
from fomoe_flwr.run.tracking import Tracker

METRICS = (
    "round",
    "eval/loss",
    "eval/perplexity",
    "eval/bits_per_byte",
    "train/loss",
    "train/tokens_per_second",
    "moe/ghost_fraction",
    "moe/all_ghost_fraction",
    "moe/ghost_expected",
    "moe/all_ghost_expected",
    "moe/load_entropy",
    "moe/load_kl",
    "moe/max_vio",
    "moe/load_cv",
    "moe/dead_experts",
    "moe/router_cosine",
    "moe/churn",
    "moe/worker_agreement",
    "comm/bytes_up",
    "comm/bytes_down",
    "round/seconds",
    "round/workers_ok",
    "round/workers_failed",
)
"""Contract of DESIGN section 8."""

Start = Callable[..., RunDirectory]


write_report = live.write_report


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the plots out: they take longer than the runs."""
    monkeypatch.setattr(live, "write_report", lambda run: [])


@pytest.fixture
def words(small_text: Path) -> list[str]:
    return [
        "run",
        "preset=tiny",
        f"data.path={small_text}",
        "local.threads=1",
        "local.steps=2",
        "local.batch_size=2",
        "eval.max_tokens=512",
        "eval.sample_tokens=4",
    ]


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Start:
    """Return a function that does a whole run under `tmp_path`."""

    def run(name: str, *overrides: str) -> RunDirectory:
        assert main([*words, f"output_dir={tmp_path / name}", *overrides]) == 0
        return RunDirectory(tmp_path / name)

    return run


def lasting(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the metrics that a repetition must repeat: all but times and the text of paths."""
    return [
        {
            k: v
            for k, v in row.items()
            if "seconds" not in k and k != "train/tokens_per_second" and "overhead" not in k
        }
        for row in run.read_metrics()
    ]


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    name = (run.checkpoints / "latest").read_text(encoding="utf-8").strip()
    return load_file(run.checkpoints / name / "weights.safetensors")


def assert_same_end(one: RunDirectory, other: RunDirectory) -> None:
    assert lasting(one) == lasting(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key
    assert one.read_layouts() == other.read_layouts()
    assert one.routing.read_text("utf-8") == other.routing.read_text("utf-8")
    assert [line["round"] for line in one.read_routing()] == [row["round"] for row in lasting(one)]


def test_a_run_leaves_everything_that_is_promised(
    start: Start, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "write_report", write_report)
    run = start("run", "seed=3", "rounds=3", "checkpoint.keep=2")

    settings = read_settings(run.config)
    assert (settings.seed, settings.rounds, settings.output_dir) == (3, 3, str(run.path))
    assert settings.data.path == str(small_text)

    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert [name for name in METRICS if name not in row] == []
        assert all(math.isfinite(row[name]) for name in METRICS)
        assert row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"]))
        assert (row["round/workers_ok"], row["round/workers_failed"]) == (2, 0)
        assert 0 < row["moe/all_ghost_fraction"] < row["moe/ghost_fraction"] < 1
        # Two workers hold six of twelve experts each, top-2; no expert has two copies to compare.
        assert row["moe/ghost_expected"] == pytest.approx(1 / 2)
        assert row["moe/all_ghost_expected"] == pytest.approx((6 * 5) / (12 * 11))
        assert "moe/expert_drift" not in row
    for row, line in zip(rows, run.read_routing(), strict=True):
        assert line["round"] == row["round"]
        assert [layer["layer"] for layer in line["layers"]] == [0, 1]
        for name in ("load_entropy", "max_vio", "router_cosine", "churn", "worker_agreement"):
            mean = sum(layer[name] for layer in line["layers"]) / 2
            assert mean == pytest.approx(row[f"moe/{name}"]), name
        assert [worker["worker"] for worker in line["workers"]] == [0, 1]
        for worker in line["workers"]:
            assert worker["tokens"] == row["train/tokens"] / 2
            assert [layer["residents"] for layer in worker["layers"]] == [6, 6]

    summary = run.read_summary()
    assert (summary["status"], summary["rounds_done"]) == ("completed", 3)
    assert summary["eval/loss"]["first"] == rows[0]["eval/loss"]
    assert summary["eval/loss"]["last"] == rows[-1]["eval/loss"]
    for key in ("comm/bytes_up", "comm/bytes_down"):
        assert summary[key] == sum(row[key] for row in rows)
    state = weights(run)
    experts = {key: value for key, value in state.items() if ".experts." in key}
    assert summary["params/total"] == sum(value.numel() for value in state.values())
    assert summary["params/expert"] == sum(value.numel() for value in experts.values())
    assert summary["params/shared"] == summary["params/total"] - summary["params/expert"]
    assert summary["params/resident"] == summary["params/shared"] + summary["params/expert"] // 2
    assert rows[0]["comm/bytes_up"] == 2 * 4 * summary["params/resident"]

    layouts = run.read_layouts()
    assert list(layouts) == ["1", "2", "3"]
    for layers in layouts.values():
        assert len(layers) == 2
        for workers in layers:
            assert sorted(expert for held in workers for expert in held) == list(range(12))

    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept == ["latest", "round-000002", "round-000003"]
    for name in ("weights.safetensors", "outer.safetensors", "state.json"):
        assert (run.checkpoints / "round-000003" / name).is_file()
    assert (run.checkpoints / "latest").read_text(encoding="utf-8") == "round-000003\n"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (run.export / name).is_file()
    pictures = ("baselines", "layout", "load", "loss", "routing", "timeline")
    assert sorted(path.stem for path in run.plots.iterdir()) == list(pictures)
    assert run.report.read_text(encoding="utf-8").count("<figure>") >= len(pictures)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in run.plots.iterdir())
    assert len(list(run.samples.iterdir())) == 3
    assert (run.tokenizer / "tokenizer.json").is_file()
    assert len(list((run.path / "tensorboard").iterdir())) == 1
    assert [p for p in run.path.rglob("*") if ".draft" in p.name or ".probe" in p.name] == []


def test_what_is_printed_begins_and_ends_with_the_run_directory(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=2")
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == f"run directory:  {run.path}"
    assert lines[-1] == f"run directory: {run.path}"
    assert len([line for line in lines if line.startswith(("round   1/2 |", "round   2/2 |"))]) == 2


def test_without_an_output_directory_the_run_goes_under_outputs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "rounds=1"]) == 0
    (path,) = (tmp_path / "outputs").iterdir()
    assert path.name.endswith("-fomoe-tiny")
    assert RunDirectory(path).read_summary()["status"] == "completed"


def test_the_same_seed_gives_the_same_run_to_the_last_digit(start: Start) -> None:
    assert_same_end(start("one", "seed=4"), start("two", "seed=4"))


def test_another_seed_gives_another_run(start: Start) -> None:
    one = lasting(start("one", "seed=4", "layout.kind=random"))
    two = lasting(start("two", "seed=5", "layout.kind=random"))
    for a, b in zip(one, two, strict=True):
        for key in ("eval/loss", "train/loss", "layout/digest"):
            assert a[key] != b[key], key


def test_training_lowers_the_loss(start: Start) -> None:
    run = start("run", "rounds=3", "local.steps=10", "local.lr=0.01")
    loss = run.read_summary()["eval/loss"]
    assert loss["untrained"] - loss["last"] > 0.2


@pytest.mark.parametrize(("outer", "kind"), [("average", "random"), ("nesterov", "fixed")])
def test_overlap_of_all_workers_is_photon_exactly(start: Start, outer: str, kind: str) -> None:
    everybody = ["layout.num_workers=3", f"outer={outer}", f"layout.kind={kind}"]
    photon = start("photon", "experiment=photon", *everybody)
    fomoe = start("fomoe", "experiment=fomoe", *everybody, "layout.overlap=3")
    assert_same_end(photon, fomoe)
    assert all(row["moe/ghost_fraction"] == 0 for row in fomoe.read_metrics())


VARIANTS = {
    "centralised": ["experiment=centralised"],
    "diloco": ["experiment=diloco"],
    "photon": ["experiment=photon", "layout.num_workers=3"],
    "fomoe of four": ["layout.num_workers=4", "layout.overlap=2"],
    "nesterov": ["outer=nesterov"],
    "random": ["layout.kind=random", "layout.reshuffle_every=2", "rounds=4"],
    "partitioned": ["model.routing=partitioned"],
    "partitioned, random": ["model.routing=partitioned", "layout.kind=random", "outer=nesterov"],
    "qwen3_moe": ["model=qwen3-moe-tiny"],
    "qwen3_moe by its family": ["model.family=qwen3_moe", "model.tie_embeddings=false"],
    "bfloat16": ["wire.up=bfloat16", "wire.down=bfloat16"],
    "sgd": ["local.optimizer=sgd", "local.lr=0.1"],
    "no inner state": ["local.keep_inner_state=false"],
    "uneven": ["layout.num_workers=5", "layout.overlap=1", "layout.allow_uneven=true"],
    "seldom evaluated": ["eval.every=2", "rounds=3", "checkpoint.every=2"],
    "no sample": ["eval.sample_tokens=0"],
    "no probe": ["eval.probe_tokens=0"],
    "fragments": ["outer.fragments=2", "layout.num_workers=4", "layout.overlap=2"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_to_its_end(start: Start, variant: str) -> None:
    run = start("run", *VARIANTS[variant])
    settings, summary, rows = read_settings(run.config), run.read_summary(), run.read_metrics()
    assert (summary["status"], summary["rounds_done"]) == ("completed", settings.rounds)
    assert [row["round"] for row in rows] == list(range(1, settings.rounds + 1))
    assert all(row["round/workers_ok"] == settings.layout.num_workers for row in rows)
    assert all(row["round/workers_failed"] == 0 for row in rows)
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    is_full = settings.layout.overlap == settings.layout.num_workers
    assert (rows[0]["moe/ghost_fraction"] == 0) == (
        is_full or settings.model.routing == "partitioned"
    )
    momentum = load_file(run.checkpoints / f"round-{settings.rounds:06d}" / "outer.safetensors")
    assert bool(momentum) == (settings.outer.name == "nesterov")


def test_full_replicas_after_no_training_agree_and_do_not_churn(start: Start) -> None:
    run = start("run", "experiment=photon", "local.lr=1e-30", "local.optimizer=sgd")
    for row in run.read_metrics():
        assert (row["moe/churn"], row["moe/worker_agreement"], row["moe/expert_drift"]) == (0, 1, 0)


def test_probe_tokens_are_at_most_those_asked_for(start: Start) -> None:
    run = start("run", "eval.probe_tokens=5", "rounds=1")
    (row,) = run.read_metrics()
    # Five tokens with two choices each, in two layers.
    assert (row["moe/churn"] * 20) % 1 == pytest.approx(0, abs=1e-9)
    none = start("none", "eval.probe_tokens=0", "rounds=1")
    assert not {"moe/churn", "moe/worker_agreement"} & none.read_metrics()[0].keys()
    # Watching changes nothing.
    assert none.read_metrics()[0]["eval/loss"] == row["eval/loss"]
    assert none.read_metrics()[0]["comm/bytes_up"] == row["comm/bytes_up"]


def test_a_random_layout_moves_when_it_shall_and_new_experts_start_fresh(start: Start) -> None:
    run = start("run", "layout.kind=random", "layout.reshuffle_every=2", "rounds=4")
    one, two, three, four = run.read_layouts().values()
    assert one == two != three == four
    fresh = [row["moe/fresh_experts"] for row in run.read_metrics()]
    moved = sum(
        len(set(now) - set(before))
        for workers_now, workers_before in zip(three, two, strict=True)
        for now, before in zip(workers_now, workers_before, strict=True)
    )
    assert fresh == [0, 0, moved, 0]


def test_bfloat16_on_the_wire_halves_the_bytes(start: Start) -> None:
    full = start("full").read_summary()
    half = start("half", "wire.up=bfloat16", "wire.down=float16").read_summary()
    for key in ("comm/bytes_up", "comm/bytes_down"):
        assert 2 * half[key] == full[key]


def test_a_folder_of_text_and_json_lines_splits_by_domain(
    start: Start, small_text: Path, tmp_path: Path
) -> None:
    text = small_text.read_text(encoding="utf-8")
    folder = tmp_path / "texts"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "a.txt").write_text(text[:30_000], encoding="utf-8")
    lines = [
        json.dumps({"text": text[i : i + 1000], "domain": "notes"})
        for i in range(30_000, 60_000, 1000)
    ]
    (folder / "notes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = start(
        "run", f"data.path={folder}", "data.partition=by_domain", "data.holdout_fraction=0.1"
    )
    last = run.read_metrics()[-1]
    assert last["round/workers_ok"] == 2
    assert math.isfinite(last["eval/loss"])
    domains = {key for key in last if key.startswith("eval/bits_per_byte/")}
    assert domains <= {"eval/bits_per_byte/letters", "eval/bits_per_byte/notes"}
    assert domains


def test_a_relative_path_of_text_is_stored_absolute(
    words: list[str], small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_text.parent)
    out = tmp_path / "run"
    changed = [*words, f"data.path={small_text.name}", f"output_dir={out}", "rounds=1"]
    assert main(changed) == 0
    monkeypatch.chdir(tmp_path)
    assert read_settings(out / "config.yaml").data.path == str(small_text)
    assert main(["evaluate", str(out)]) == 0


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


@pytest.mark.parametrize(
    "moment",
    ["in the third evaluation", "after one reply of round three", "between checkpoint and line"],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    start: Start, moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = start("whole", *RESUMED)
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
            start("halved", *RESUMED)
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


def test_a_line_cut_off_by_a_crash_is_written_again(start: Start) -> None:
    run = start("run", "rounds=2")
    before = lasting(run)
    text = run.metrics.read_text(encoding="utf-8")
    run.metrics.write_text(text[:-40], encoding="utf-8")
    resume(run)
    assert lasting(run) == before


def test_resuming_a_finished_run_changes_nothing(start: Start) -> None:
    run = start("run")
    before, state, text = lasting(run), weights(run), run.metrics.read_text(encoding="utf-8")
    resume(run)
    assert lasting(run) == before
    assert run.metrics.read_text(encoding="utf-8") == text
    assert run.read_summary()["status"] == "completed"
    for key, value in weights(run).items():
        assert torch.equal(value, state[key])


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


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the single line of an error; nothing else may have been printed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def refuse(capsys: pytest.CaptureFixture[str], words: list[str], out: Path, *overrides: str) -> str:
    assert main([*words, f"output_dir={out}", *overrides]) == 2
    assert not out.exists()
    return only_error(capsys)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("layout.overlp=2", "layout.overlp is not a setting; did you mean layout.overlap?"),
        ("rounds=0", "rounds=0 is out of range: it must be >= 1"),
        ("local.lr=nan", "local.lr=nan is out of range: it must be > 0"),
        ("model.routing=all", "model.routing=all is not one of skip_token, partitioned"),
        ("outer=nestrov", "outer=nestrov is not one of "),
        ("layout.overlap=7", "layout.overlap=7 needs layout.num_workers >= 7 (got 2)"),
        ("layout.num_workers=7", "model.num_experts=12, layout.overlap=1 and layout.num_workers=7"),
        ("local=5", "Config group override must be a string or a list"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    override: str,
    text: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refuse(capsys, words, tmp_path / "run", override).startswith(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refuse(capsys, words, tmp_path / "run", "local.device=cuda")
    assert text == "local.device=cuda but torch sees no GPU: use auto or cpu"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("no.parquet", b"PAR1 this is no parquet", "as Parquet"),
        ("no.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("no.jsonl", b'{"words": "a"}\n', "has no column 'text'"),
        ("no.txt", b"abc\xff\xfe", "is not UTF-8"),
        ("no.txt", b"", "documents"),
        ("no.pdf", b"%PDF", "must end in one of"),
    ],
)
def test_text_that_cannot_be_read_is_refused_before_anything_is_written(
    name: str,
    content: bytes,
    text: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = refuse(capsys, words, tmp_path / "run", f"data.path={path}")
    assert text in found
    assert name in found


def test_text_that_is_not_there_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refuse(capsys, words, tmp_path / "run", f"data.path={tmp_path / 'nowhere'}")
    assert "does not exist" in found
    (tmp_path / "empty").mkdir()
    found = refuse(capsys, words, tmp_path / "run", f"data.path={tmp_path / 'empty'}")
    assert "holds no file that ends in one of" in found


def test_too_little_text_is_refused_with_what_one_step_needs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(10)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = refuse(capsys, words, tmp_path / "run", f"data.path={tmp_path / 'few.jsonl'}")
    assert found.startswith("too small corpus: ")
    assert "layout.num_workers=2 * local.batch_size=2 * data.sequence_length=32 = 128" in found


def test_text_that_turns_out_too_little_for_a_worker_ends_the_run_with_a_reason(
    words: list[str], small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Enough bytes for a step, but not enough tokens: that shows when the workers tokenise.
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("validation", "test"):
        (folder / f"{split}.txt").write_text(small_text.read_text("utf-8")[:9000], "utf-8")
    (folder / "train.txt").write_text("the quick brown fox jumps over the dog " * 5, "utf-8")
    out = f"output_dir={tmp_path / 'run'}"
    assert main([*words, f"data.path={folder}", out, "federation.node_wait_seconds=0"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: 2 of 2 workers cannot start: DataError: ")
    assert "data.sequence_length" in lines[0]
    assert RunDirectory(tmp_path / "run").read_summary()["status"] == "failed"


@pytest.mark.parametrize("split", ["validation", "train"])
def test_text_too_short_for_one_window_is_refused(
    split: str, words: list[str], small_text: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        text = "short " * 3 if name == split else small_text.read_text("utf-8")[:9000]
        (folder / f"{name}.txt").write_text(text, "utf-8")
    assert main([*words, f"data.path={folder}", f"output_dir={tmp_path / 'run'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "data.path" in line
    assert "data.sequence_length" in line


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_directory_that_cannot_be_made_is_refused(
    place: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    out = tmp_path / place
    assert main([*words, f"output_dir={out}"]) == 2
    found = only_error(capsys)
    assert found.startswith(f"output_dir={out} cannot be written: ")
    assert found.endswith("; give another output_dir")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def test_an_output_directory_that_holds_a_run_is_refused(
    start: Start, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=1")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*words, f"output_dir={run.path}"]) == 2
    assert only_error(capsys) == (
        f"output_dir={run.path} already holds a run: give another output_dir, or "
        f"resume={run.path} to go on with it"
    )
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert after == before


def test_an_empty_output_directory_may_exist(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert start("run", "rounds=1").read_summary()["status"] == "completed"


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
    assert rows[1]["round/failures"] == {"1": "RuntimeError: the GPU fell out (Flower error 2)"}
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


def test_words_for_flower_hold_in_any_working_directory(tmp_path: Path) -> None:
    given = ["preset=tiny", "engine=flower", "output_dir=here", "data.path=text", "rounds=3"]
    settings = load_settings(given)
    settings.output_dir = f"{tmp_path}/it's, (new)=1"
    settings.data.path = f"{tmp_path}/a b"
    again = load_settings(words_for(settings, given))
    assert again == settings


def test_words_for_flower_resume_the_same_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("run", "rounds=1")
    monkeypatch.chdir(run.path.parent)
    given = ["resume=run", "rounds=3", "engine=flower"]
    settings = load_settings(given)
    monkeypatch.chdir("/")
    assert load_settings(words_for(settings, given)) == settings


def test_a_run_config_as_declared_resumes_a_run(start: Start) -> None:
    run = start("run", "rounds=2", "local.schedule=constant")
    declared = tomllib.loads((project_root() / "pyproject.toml").read_text(encoding="utf-8"))
    config = declared["tool"]["flwr"]["app"]["config"]
    assert settings_of(config | {"resume": str(run.path)}).rounds == 2
    overrides = f"resume={run.path} rounds=3 engine=flower"
    settings = settings_of(config | {"overrides": overrides})
    assert (settings.rounds, settings.output_dir) == (3, str(run.path))
    # What it declares changes nothing where nothing is asked for.
    assert settings_of(config).preset == load_settings([]).preset
