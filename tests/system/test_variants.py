"""Whole runs of every variant: each ends, a seed repeats it, full overlap is Photon."""

from __future__ import annotations

import math

import pytest
from command_line import (
    Start,
    assert_same_end,
    lasting,
)
from safetensors.torch import load_file

from fomoe_flwr.config import read_settings

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
