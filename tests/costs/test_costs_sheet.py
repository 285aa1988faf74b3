"""The cost sheet: its formulas say what its numbers are, and its numbers behave as costs do."""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr import costs
from fomoe_flwr.codecs.sizes import Codec
from fomoe_flwr.config import CostSettings, Settings, SettingsError, check, load_settings

CASES = [
    [],
    ["outer=local_adamw", "wire.up=bfloat16"],
    ["outer=des_loc", "outer.fragments=2", "layout.overlap=1"],
    ["outer=nesterov", "layout=random", "outer.fragments=4"],
    [
        "layout=weighted",
        "costs.server_mbps=200",
        "costs.hidden_share=0.5",
        "costs.state_gb_per_second=10",
    ],
    ["model=deepseek-v3-tiny", "layout.num_workers=3", "model.routing=partitioned"],
    ["model=fomoe-tiny", "costs.topology=ring", "layout=random", "costs.resident_share=0.7"],
    ["costs.topology=ring", "layout=rolling", "outer=local_adamw", "costs.tokens=1e9"],
    ["experiment=diloco", "costs.topology=ring", "costs.bytes_per_parameter=18"],
    ["experiment=centralised", "costs.topology=ring"],
]


FAMILIES = [
    [f"model={family}-tiny", f"model.routing={routing}", "layout.num_workers=2", "layout.overlap=1"]
    for family in ("olmoe", "qwen3-moe", "mixtral", "deepseek-v3", "glm4-moe", "fomoe")
    for routing in ("skip_token", "partitioned")
]
WIRES = [
    *([f"wire={wire}", "outer.fragments=2"] for wire in ("bfloat16", "int8", "int4")),
    ["wire=sparse_loco", "wire.up_experts=int4"],
    ["wire.up=int8", "wire.up_experts=topk_int2", "wire.down_experts=int4"],
]
LAYOUTS = [
    [f"layout={kind}", "layout.reshuffle_every=2", "outer.fragments=2", "outer=des_loc"]
    for kind in ("fixed", "random", "rolling", "balanced", "weighted")
]

GIVEN = {
    *("model/name", "model/routing", "layout/digest", "layout/overlap_min", "layout/overlap_max"),
    *("params/shared", "params/router", "bytes/ddp_per_step"),
}
"""What follows from nothing else on the sheet."""
NOTHING_SENT = {
    *("time/down_seconds", "time/up_seconds"),
    *("ratio/full_replica", "ratio/diloco", "ratio/ddp"),
}
"""What has no formula where nothing is sent that way."""
WHOLE_SLICES = {"bytes/down_per_round"}
"""What has none where a layout moves and a round sends a fragment: who moves gets everything."""

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(formula: str, terms: Mapping[str, float]) -> float:
    """Work out a formula: names, numbers and the four operations, nothing else."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name):
            return terms[node.id]
        assert isinstance(node, ast.Constant), ast.unparse(node)
        return float(node.value)

    return value(ast.parse(formula, mode="eval").body)


def check_formulas(words: list[str]) -> None:
    """Check that each line has a formula and is what the formula says."""
    sheet = costs.lines(load_settings(words))
    missing = {line.key for line in sheet if not line.formula} - GIVEN
    assert missing <= NOTHING_SENT | WHOLE_SLICES
    assert not missing & WHOLE_SLICES or "outer.fragments" in " ".join(words)
    for line in sheet:
        if line.formula:
            found = evaluate(line.formula, line.terms)
            # Bytes and counts are whole.
            assert found == pytest.approx(line.value, rel=1e-6, abs=1), line.key
            if isinstance(line.value, float):
                assert found == pytest.approx(line.value, rel=1e-9), line.key


@pytest.mark.parametrize("words", [*CASES, *FAMILIES, *WIRES, *LAYOUTS], ids=" ".join)
def test_every_formula_gives_its_value(words: list[str]) -> None:
    check_formulas(words)


def test_every_formula_gives_its_value_for_an_explicit_layout(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps([[list(range(12)), list(range(4, 16))]]), encoding="utf-8")
    check_formulas(["layout=explicit", f"layout.path={path}", "layout.num_workers=2"])


@pytest.mark.parametrize("words", [CASES[0], CASES[4], CASES[7]], ids=" ".join)
def test_what_a_formula_takes_from_another_line_is_that_line(words: list[str]) -> None:
    lines = {line.key: line for line in costs.lines(load_settings(words))}
    for key, term, other in (
        ("params/total", "expert", "params/expert"),
        ("params/active", "total", "params/total"),
        ("bytes/up_per_step", "bytes_up", "bytes/up_per_round"),
        ("ratio/full_replica", "theirs", "bytes/full_replica_per_round"),
        ("ratio/ddp", "one_step", "bytes/ddp_per_step"),
        ("flops/worker_train_per_token", "train", "flops/train_per_token"),
        ("batch/expert_tokens", "shared_tokens", "batch/shared_tokens"),
        ("time/compute_seconds", "step", "time/step_seconds"),
        ("time/round_seconds", "compute", "time/compute_seconds"),
        ("time/round_seconds", "up", "time/up_seconds"),
        ("time/run_seconds", "round_seconds", "time/round_seconds"),
        ("speedup/diloco", "theirs", "time/diloco_run_seconds"),
    ):
        assert lines[key].terms[term] == pytest.approx(lines[other].value), (key, term)


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_an_element_takes_its_own_bytes(words: list[str]) -> None:
    settings = load_settings(words)
    for line in costs.lines(settings):
        if line.key in ("bytes/up_per_round", "bytes/down_per_round") and "held" in line.terms:
            name = getattr(settings.wire, line.key.split("_")[0].removeprefix("bytes/"))
            expected = Codec(name).bytes_per_element
            assert line.terms["bytes_per_element"] == pytest.approx(expected, rel=1e-6)


def test_the_explanation_has_the_numbers_in_the_places_of_their_names() -> None:
    line = costs.Line("a", 7, "one_part + part * 2", {"one_part": 1, "part": 3.0})
    assert line.substituted == "1 + 3 * 2"
    assert costs.show([line], explain=True).splitlines()[1:] == [
        "    = one_part + part * 2",
        "    = 1 + 3 * 2",
    ]


def summary(*words: str) -> dict[str, Any]:
    return dict(costs.summary(load_settings(words)))


@pytest.mark.parametrize("topology", ["star", "ring"])
@pytest.mark.parametrize("outer", ["average", "nesterov"])
def test_full_overlap_is_diloco_in_bytes_and_in_time(topology: str, outer: str) -> None:
    found = summary(f"costs.topology={topology}", f"outer={outer}", "layout.overlap=4")
    assert found["ratio/full_replica"] == found["ratio/diloco"] == 1
    assert found["speedup/full_replica"] == found["speedup/diloco"] == 1


def test_local_adamw_sends_three_times_what_diloco_does() -> None:
    found = summary("outer=local_adamw", "layout.overlap=4")
    assert found["ratio/diloco"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("topology", ["star", "ring"])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("costs.up_mbps", [10, 100, 1000]),
        ("costs.down_mbps", [10, 100, 1000]),
        ("costs.site_teraflops", [0.001, 1, 1000]),
        ("costs.mfu", [0.1, 0.4, 1]),
        ("costs.hidden_share", [0, 0.3, 1]),
        ("costs.state_gb_per_second", [1, 10, 100]),
    ],
)
def test_better_sites_never_take_longer(topology: str, key: str, values: list[float]) -> None:
    seconds = [
        summary(f"{key}={value}", f"costs.topology={topology}")["time/run_seconds"]
        for value in values
    ]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("topology", ["star", "ring"])
def test_more_overlap_costs_more_bytes_memory_and_flops(topology: str) -> None:
    found = [summary(f"layout.overlap={n}", f"costs.topology={topology}") for n in (1, 2, 4)]
    for key in ("bytes/up_per_round", "memory/worker_bytes", "flops/worker_train_per_token"):
        values = [each[key] for each in found]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_no_more_communication_hides_than_there_is_computation() -> None:
    plain = summary("costs.site_teraflops=1000", "costs.up_mbps=1")
    hidden = summary("costs.site_teraflops=1000", "costs.up_mbps=1", "costs.hidden_share=1")
    saved = plain["time/round_seconds"] - hidden["time/round_seconds"]
    assert saved == pytest.approx(plain["time/compute_seconds"])
    assert hidden["time/round_seconds"] > hidden["time/compute_seconds"]


def test_the_server_s_link_carries_everybody_s_bytes() -> None:
    found = summary("costs.server_mbps=1000", "costs.latency_seconds=0")
    assert found["time/up_seconds"] == pytest.approx(8 * found["bytes/up_per_round"] / 1e9)
    # Four times as fast as a site, the server holds nobody up.
    enough = summary("costs.server_mbps=4000")
    assert enough["time/up_seconds"] == pytest.approx(summary()["time/up_seconds"])


def test_latency_counts_for_every_step_of_data_parallel_training() -> None:
    near, far = (summary(f"costs.latency_seconds={s}") for s in (0, 1))
    steps = load_settings([]).rounds * load_settings([]).local.steps
    assert far["time/ddp_run_seconds"] - near["time/ddp_run_seconds"] == pytest.approx(2 * steps)


def test_a_measured_share_replaces_uniform_routing() -> None:
    found = summary("costs.resident_share=0.8")
    assert found["skip/resident_share"] == pytest.approx(0.8)
    # In `partitioned` routing nothing that a token chooses is a ghost.
    parted = summary("costs.resident_share=0.8", "model.routing=partitioned")
    assert parted["skip/resident_share"] == 1


def test_the_token_budget_scales_the_run() -> None:
    once, twice = (summary(f"costs.tokens={n}") for n in (1e9, 2e9))
    assert twice["time/run_seconds"] == pytest.approx(2 * once["time/run_seconds"])
    own = summary("rounds=3")["time/run_seconds"]
    assert own == pytest.approx(3 * summary()["time/round_seconds"])


def test_a_ring_s_bytes_are_those_of_the_paper() -> None:
    words = ["model=paper-2b", "costs.topology=ring", "layout=random", "wire.up=bfloat16"]
    settings = load_settings(words)
    counts = costs.parameter_counts(settings.model)
    found = summary(*words)["bytes/up_per_round"]
    ring = costs.ring_round(counts.shared, counts.expert, 4, 2, 1.0)
    biases = costs.ring_factor(4) * 128 * 32
    assert found == pytest.approx(4 * 2 * (ring + biases), abs=4)


def test_only_what_moves_is_fetched_in_a_ring() -> None:
    fixed, every, rarely, rolling = (
        summary("costs.topology=ring", *words)["bytes/up_per_round"]
        for words in (
            ["layout=fixed"],
            ["layout=random"],
            ["layout=random", "layout.reshuffle_every=4"],
            ["layout=rolling"],
        )
    )
    assert every - fixed == pytest.approx(4 * (rarely - fixed), abs=8)
    # Rolling by one of eight residents fetches one new expert a layer, 4 B each number.
    expert = costs.parameter_counts(load_settings([]).model).per_expert_per_layer
    assert rolling - fixed == pytest.approx(4 * 4 * 4 * expert, abs=8)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("costs.mfu=1.5", "costs.mfu=1.5 is out of range: it must be > 0 and <= 1"),
        ("costs.mfu=0", "costs.mfu=0.0 is out of range"),
        ("costs.up_mbps=0", "costs.up_mbps=0.0 is out of range: it must be > 0"),
        ("costs.topology=mesh", "costs.topology=mesh is not one of star, ring"),
        ("costs.hidden_share=-1", "costs.hidden_share=-1.0 is out of range"),
        ("costs.up_mbit=3", "did you mean costs.up_mbps"),
        ("costs.latency_seconds=soon", "costs.latency_seconds"),
    ],
)
def test_wrong_assumptions_are_refused(word: str, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings([word])
    assert named in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_assumptions_are_finite(value: float) -> None:
    with pytest.raises(SettingsError, match=r"costs\.up_mbps"):
        check(Settings(costs=CostSettings(up_mbps=value)))
