"""The cost sheet: its formulas say what its numbers are, and its numbers behave as costs do."""

from __future__ import annotations

import math
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


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_every_formula_gives_its_value(words: list[str]) -> None:
    explained = [line for line in costs.lines(load_settings(words)) if line.formula]
    assert len(explained) > 25
    for line in explained:
        found = eval(line.formula, {"__builtins__": {}}, dict(line.terms))
        # Bytes and counts are whole.
        assert found == pytest.approx(line.value, rel=1e-6, abs=1), line.key
        if isinstance(line.value, float):
            assert found == pytest.approx(line.value, rel=1e-9), line.key


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
