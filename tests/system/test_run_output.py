"""What a whole run leaves behind and prints."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
from command_line import Start, stored

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import read_settings
from fomoe_flwr.report import live
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.phases import phases_of

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

draw_beside = live.draw_beside


def test_a_run_leaves_everything_that_is_promised(
    start: Start, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "draw_beside", draw_beside)
    began = time.monotonic()
    run = start("run", "seed=3", "rounds=3", "checkpoint.keep=2")
    lasted = time.monotonic() - began

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
    for row in rows:
        # Every second of a round belongs to a phase, and nearly all to one with a name.
        assert sum(phases_of(row).values()) == pytest.approx(row["round/seconds"], abs=1e-6)
        assert row["round/other_seconds"] < 0.05 * row["round/seconds"] + 0.1
    around = [v for k, v in summary.items() if re.match(r"(start|end)/\w+_seconds", k)]
    total = sum(around) + sum(row["round/seconds"] for row in rows)
    assert total == pytest.approx(summary["run/seconds"], abs=0.05)
    # What comes before is to read the settings; the run is in this process.
    assert lasted - 3 < summary["run/seconds"] <= lasted
    assert summary["eval/loss"]["first"] == rows[0]["eval/loss"]
    assert summary["eval/loss"]["last"] == rows[-1]["eval/loss"]
    for key in ("comm/bytes_up", "comm/bytes_down"):
        assert summary[key] == sum(row[key] for row in rows)
    state = stored(run)["weights"]
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


def test_an_empty_output_directory_may_exist(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert start("run", "rounds=1").read_summary()["status"] == "completed"


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
