"""The planner: within memory, soonest, explained, and run."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr import costs
from fomoe_flwr.cli.main import main
from fomoe_flwr.config import SettingsError, expand_files, load_settings
from fomoe_flwr.costs import Site
from fomoe_flwr.federation.run_config import settings_of
from fomoe_flwr.layout import draw_layout
from fomoe_flwr.plan import (
    Bounds,
    Candidate,
    NamedSite,
    Plan,
    Sites,
    default_overlap,
    fit,
    make_plan,
    plan_overrides,
    read_sites,
    show_plan,
)
from fomoe_flwr.plan.candidate import Model, Work

GIB = 2**30


def site(name: str, gib: float = 1.0, tera: float = 1.0, mbps: float = 100.0) -> NamedSite:
    return NamedSite(name, gib * GIB, Site(tera * 1e12, mbps * 1e6, mbps * 1e6, 0.01, 50e9))


FOUR = Sites(tuple(site(name) for name in "abcd"))


def planned(sites: Sites = FOUR, *words: str, **bounds: Any) -> Plan:
    return make_plan(load_settings(["costs.tokens=1e8", *words]), sites, Bounds(**bounds))


def test_alike_sites_get_an_even_layout_of_least_overlap_and_most_steps() -> None:
    chosen = planned().chosen
    assert (len(chosen.sites), chosen.overlap, chosen.local_steps) == (4, 2, 64)
    assert chosen.residents == (8, 8, 8, 8)


@pytest.mark.parametrize(
    ("workers", "least"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 4), (9, 4), (64, 4)]
)
def test_the_least_overlap_follows_the_paper_s_tables(workers: int, least: int) -> None:
    assert default_overlap(workers) == least


@pytest.mark.parametrize(
    "wire", [["wire.up=bfloat16"], ["wire.up=float16", "wire.up_experts=int8", "outer=average"]]
)
def test_the_planned_run_costs_what_the_plan_says(wire: list[str]) -> None:
    words = ["costs.tokens=1e8", "outer=local_adamw", *wire]
    sites = Sites((site("a"), site("b", mbps=40), site("c", tera=0.3)))
    plan = make_plan(load_settings(words), sites, Bounds(min_overlap=2))
    settings = load_settings(plan_overrides(plan, words))
    layout = draw_layout(settings.layout, 4, 16, 0, 1)
    assert [len(held) for held in layout.residents[0]] == list(plan.chosen.residents)
    sent = costs.predict_bytes(settings, layout)
    assert plan.chosen.bytes_per_round == pytest.approx(sent.up + sent.down, rel=1e-4)
    held = costs.resident_counts(settings.model, layout)
    assert [costs.memory_bytes(n, "adamw") for n in held] == list(plan.chosen.memory_bytes)
    executed = costs.executed_experts(settings.model, layout)
    tokens = settings.local.batch_size * settings.local.accumulate * 128
    expected = costs.star_seconds(
        [each.site for each in plan.chosen.sites],
        sent.down_per_worker,
        sent.up_per_worker,
        [
            settings.local.steps
            * each.site.step_seconds(
                tokens * costs.token_flops(settings.model, 128, share).train,
                costs.memory_bytes(count, "adamw"),
            )
            for each, share, count in zip(plan.chosen.sites, executed, held, strict=True)
        ],
    )
    assert plan.chosen.round.total == pytest.approx(expected.total, rel=1e-4)
    assert settings.rounds == plan.chosen.rounds


@pytest.mark.parametrize(
    "sites",
    [
        [site("a"), site("b", mbps=30), site("c", tera=0.2)],
        [site("a", gib=0.11), site("b", mbps=50), site("c", mbps=10)],
        [site("a", tera=0.01), site("b", tera=0.02), site("c", tera=0.1)],
    ],
)
def test_no_other_placement_ends_sooner(sites: Sequence[NamedSite]) -> None:
    settings = load_settings(["model.num_experts=8", "local.lr=1e-3"])
    model = Model(settings, 0.2)
    found = fit(model, sites, 2, 16, 24, 1e6)
    assert isinstance(found, Candidate)
    assert sum(found.residents) == 16
    rooms = [model.room(each) for each in sites]
    work = Work(16, found.batch_size * found.accumulate * 128)
    best = math.inf
    for counts in itertools.product(*(range(1, room + 1) for room in rooms)):
        if sum(counts) == 16:
            ends = [model.site_seconds(s, n, work) for s, n in zip(sites, counts, strict=True)]
            best = min(best, max(ends))
    # An even layout is taken where it costs no more than one hundredth.
    assert found.round.total <= 1.01 * best
    assert all(held <= room for held, room in zip(found.residents, rooms, strict=True))


def test_nobody_s_memory_is_exceeded() -> None:
    small = Sites((site("a", gib=0.12), site("b", gib=0.2), site("c", gib=0.3), site("d")))
    plan = planned(small)
    for each, held in zip(plan.chosen.sites, plan.chosen.memory_bytes, strict=True):
        assert held <= 0.8 * each.memory_bytes
    assert not plan.chosen.is_even


def test_a_site_that_holds_the_others_up_is_left_out_and_that_is_said() -> None:
    sites = Sites((*FOUR.sites, site("slow", mbps=0.5)))
    plan = planned(sites)
    assert "slow" not in [each.name for each in plan.chosen.sites]
    told = [other for other in plan.alternatives if other.name.startswith("all 5 sites")]
    assert any("x the time" in other.reason for other in told)
    assert any("without slow" not in other.name for other in told)


def test_more_of_anything_never_takes_longer() -> None:
    seconds = planned().chosen.seconds
    for change in ("gib", "tera", "mbps"):
        better = Sites(tuple(site(name, **{change: 200.0}) for name in "abcd"))
        assert planned(better).chosen.seconds <= seconds
    assert planned(replace(FOUR, server_bits_per_second=1e6)).chosen.seconds > seconds
    assert planned(FOUR, max_local_steps=16).chosen.seconds > seconds
    assert planned(FOUR, min_overlap=4).chosen.seconds > seconds


def test_every_rejected_choice_has_a_reason() -> None:
    plan = planned(Sites((*FOUR.sites[:3], site("tiny", gib=0.01))))
    text = show_plan(plan)
    for reason in ("x the time", "below the least overlap of", "tiny has 0.01 GiB"):
        assert reason in text
    for method in ("DiLoCo or Photon on all sites", "data-parallel on all sites"):
        assert any(other.name == method for other in plan.alternatives)
    assert all(other.reason for other in plan.alternatives)
    chosen = plan.chosen
    for other in plan.alternatives:
        if other.candidate and "full replica" not in other.reason:
            assert other.candidate.seconds >= chosen.seconds


def test_the_paper_s_loss_is_quoted_only_where_it_measured_one() -> None:
    assert "+7.8% perplexity" in show_plan(planned(FOUR, max_local_steps=32))
    assert "the paper has no number" in show_plan(planned(FOUR, max_local_steps=40))


def test_what_fits_nowhere_says_what_would() -> None:
    with pytest.raises(SettingsError) as caught:
        planned(Sites(tuple(site(name, gib=0.02) for name in "abcd")))
    text = str(caught.value)
    needed = float(text.split("sites: ")[1].split(" GiB at each")[0])
    assert "costs.bytes_per_parameter" in text
    # It would, indeed, and a little less would not.
    assert planned(Sites(tuple(site(n, gib=needed * 1.001) for n in "abcd"))).chosen.overlap == 2
    less = Sites(tuple(site(name, gib=needed * 0.9) for name in "abcd"))
    with pytest.raises(SettingsError, match="fits on no choice"):
        planned(less, min_overlap=2)


@pytest.mark.parametrize(
    ("bound", "named"),
    [
        ({"max_local_steps": 0}, r"--max-local-steps=0 is out of range: it must be >= 1"),
        ({"headroom": 1.0}, r"--headroom=1\.0 is out of range: it must be >= 0 and < 1"),
        ({"headroom": math.nan}, r"--headroom=nan"),
        ({"batch": -1}, r"--batch=-1"),
        ({"min_overlap": -2}, r"--min-overlap=-2"),
    ],
)
def test_wrong_bounds_are_refused(bound: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        planned(FOUR, **bound)


ENTRY = "{name: a, memory_gib: 1, teraflops: 1, up_mbps: 10, down_mbps: 10}"


def write(folder: Path, text: str) -> Path:
    path = folder / "sites.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[]", "has no list `sites`"),
        ("sites: []", "is empty"),
        ("sites: [3]", r"sites\[0\] must be a mapping"),
        (f"sites: [{ENTRY}, {ENTRY}]", "two sites have the name a"),
        ("sites: [{memory_gib: 1, teraflops: 1, up_mbps: 1}]", r"sites\[0\] has no down_mbps"),
        (f"sites: [{ENTRY.replace('teraflops: 1', 'teraflops: 0')}]", "teraflops=0 is out of"),
        (f"sites: [{ENTRY.replace('teraflops: 1', 'teraflops: fast')}]", "teraflops=fast must be"),
        (f"sites: [{ENTRY.replace('teraflops: 1', 'teraflops: .nan')}]", "must be a finite number"),
        (f"sites: [{ENTRY.replace('teraflops: 1', 'teraflops: true')}]", "teraflops=True must be"),
        (f"sites: [{ENTRY.replace('}', ', mfu: 2}')}]", "mfu=2 is out of range"),
        (f"sites: [{ENTRY.replace('}', ', latency_seconds: -1}')}]", "latency_seconds=-1"),
        (f"sites: [{ENTRY.replace('up_mbps', 'up_mpbs')}]", "did you mean up_mbps"),
        (f"sites: [{ENTRY}]\nserver_mbs: 3", "did you mean server_mbps"),
        ("sites: [", "cannot read sites from"),
    ],
)
def test_wrong_sites_are_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        read_sites(write(tmp_path, text))


def test_sites_are_read_with_their_units(tmp_path: Path) -> None:
    entry = ENTRY.replace("}", ", mfu: 0.5, latency_seconds: 0}")
    found = read_sites(write(tmp_path, f"sites: [{entry}]\nserver_mbps: 20"))
    assert found.server_bits_per_second == 20e6
    assert found.sites == (NamedSite("a", GIB, Site(0.5e12, 10e6, 10e6, 0.0)),)


@pytest.mark.slow
def test_a_plan_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = write(
        tmp_path,
        "sites:\n"
        "  - {name: big, memory_gib: 1, teraflops: 0.0001, up_mbps: 100, down_mbps: 100}\n"
        "  - {name: low, memory_gib: 1, teraflops: 0.0001, up_mbps: 30, down_mbps: 30}\n"
        "  - {name: off, memory_gib: 1, teraflops: 0.0001, up_mbps: 0.001, down_mbps: 1}\n",
    )
    plan = tmp_path / "plan.yaml"
    words = ["preset=tiny", "local.threads=1", "eval.max_tokens=64", "costs.tokens=500"]
    bounds = ["--max-local-steps", "2", "--headroom", "0.3"]
    assert main(["plan", str(sites), *words, *bounds, "--to", str(plan), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chosen"]["sites"] == ["big", "low"]
    assert told["chosen"]["residents"][0] > told["chosen"]["residents"][1]
    assert main(["run", str(plan), f"output_dir={tmp_path}/run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds_done"] == told["chosen"]["rounds"]
    layout = json.loads((tmp_path / "run" / "layout.json").read_text())
    first = next(iter(layout.values()))
    assert [len(held) for held in first[0]] == told["chosen"]["residents"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    sent = last["comm/bytes_up"] + last["comm/bytes_down"]
    assert sent == told["chosen"]["bytes_per_round"]


def test_flower_gets_the_same_settings(tmp_path: Path) -> None:
    sites = write(tmp_path, f"sites: [{ENTRY}, {ENTRY.replace('name: a', 'name: b')}]")
    plan = tmp_path / "plan.yaml"
    assert main(["plan", str(sites), "preset=tiny", "output_dir=/x", "--to", str(plan)]) == 0
    run_config = tomllib.loads((tmp_path / "plan.toml").read_text())
    assert settings_of(run_config) == load_settings(expand_files([str(plan)]))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("3", "has no list `overrides`"),
        ("overrides: [3]", "has no list `overrides`"),
        ("overrides: ['layout.overlap=9']", "layout.overlap=9 needs layout.num_workers"),
        ("{", "cannot read overrides from"),
    ],
)
def test_wrong_files_of_overrides_are_refused(
    tmp_path: Path, text: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text)
    assert main(["costs", str(path)]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["missing.yaml"], "cannot read sites from missing.yaml"),
        (["SITES", "model=paper-100b"], "the model fits on no choice of the 1 sites"),
        (["SITES", "--to", "plan.json"], "--to=plan.json must end in .yaml"),
        (["SITES", "--headroom", "2"], "--headroom=2.0 is out of range"),
        (["SITES", "layout.overlap=x"], "layout.overlap"),
    ],
)
def test_the_command_explains_what_is_wrong(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = str(write(tmp_path, f"sites: [{ENTRY}]"))
    assert main(["plan", *(sites if word == "SITES" else word for word in words)]) == 2
    assert named in capsys.readouterr().err
