"""The bytes of every round: predicted, measured, divided by fragments and by 16 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Start
from federated import OUTER, Federate, Federation, failures, use_no_training
from micro import NUM_WORKERS, micro

from fomoe_flwr import costs
from fomoe_flwr.config import SettingsError, load_settings
from fomoe_flwr.layout import Layout

LAYOUTS = {
    "fixed": ["layout.kind=fixed"],
    "random": ["layout.kind=random"],
    "every two": ["layout.kind=random", "layout.reshuffle_every=2"],
    "every three": ["layout.kind=random", "layout.reshuffle_every=3", "layout.overlap=1"],
    "rolling": ["layout.kind=rolling"],
    "warm": ["layout.kind=fixed", "layout.warm_rounds=2"],
}


@pytest.mark.usefixtures("made_up_data")
@pytest.mark.parametrize(
    ("outer", "layout"),
    # Nesterov's momentum stays on the server.
    [(outer, layout) for outer in OUTER for layout in LAYOUTS if outer != "nesterov"]
    + [("nesterov", "fixed"), ("nesterov", "random")],
)
@pytest.mark.parametrize("fragments", [1, 2])
def test_predicted_bytes_are_the_bytes_of_every_round_and_worker(
    outer: str, fragments: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_no_training(monkeypatch)
    family = {"average": "deepseek-v3", "nesterov": "olmoe", "local_adamw": "fomoe"}
    settings = micro(
        *OUTER[outer],
        *LAYOUTS[layout],
        f"outer.fragments={fragments}",
        f"model={family.get(outer, 'olmoe')}-tiny",
        "model.num_experts=6",
        f"model.routing={'partitioned' if layout in ('random', 'rolling') else 'skip_token'}",
        "rounds=9" if outer != "des_loc" else "rounds=14",
        "wire.up=bfloat16",
    )
    federation = Federation(settings, tmp_path).run()
    assert failures(federation) == {}
    previous = None
    for snapshot in federation.rounds:
        record = snapshot.record
        predicted = costs.predict_round(settings, record.layout, record.server_round, previous)
        for w in range(NUM_WORKERS):
            place = record.server_round, w
            assert federation.traffic.down[place] == predicted.down_per_worker[w], place
            assert federation.traffic.up[place] == predicted.up_per_worker[w], place
        assert (record.bytes_down, record.bytes_up) == (predicted.down, predicted.up)
        if layout == "fixed":
            payloads = costs.predict_payloads(settings, record.layout, record.server_round)
            for traffic, workers in zip((record.up, record.down), payloads, strict=True):
                for kind in ("shared", "experts", "moments"):
                    expected = sum(getattr(payload, kind) for payload in workers)
                    assert traffic.by_kind[kind] == expected, (record.server_round, kind)
        previous = record.layout


def test_fragments_divide_the_peak_bytes_of_a_round(start: Start) -> None:
    short = ["rounds=5", "local.steps=1", "eval.max_tokens=128", "eval.sample_tokens=0"]
    plain, parted = start("plain", *short), start("parted", *short, "outer.fragments=2")
    up, down = (
        {
            run.path.name: [row[f"comm/bytes_{way}"] for row in run.read_metrics()]
            for run in (plain, parted)
        }
        for way in ("up", "down")
    )
    assert max(up["parted"]) * 2 == max(up["plain"])
    assert up["parted"] == [up["plain"][0] // 2] * 5
    assert down["parted"] == [down["plain"][0]] + [down["plain"][0] // 2] * 4
    settings = load_settings([f"resume={parted.path}", "rounds=5"])
    layout = Layout.from_json(parted.read_layouts()["1"])
    for server_round in range(1, 6):
        predicted = costs.predict_round(settings, layout, server_round)
        assert up["parted"][server_round - 1] == predicted.up
        assert down["parted"][server_round - 1] == predicted.down
    summary = costs.summary(settings)
    assert [summary[f"bytes/{way}_per_round"] for way in ("up", "down")] == [up["parted"][4]] * 2


def test_bfloat16_on_the_wire_halves_the_bytes(start: Start) -> None:
    full = start("full").read_summary()
    half = start("half", "wire.up=bfloat16", "wire.down=float16").read_summary()
    for key in ("comm/bytes_up", "comm/bytes_down"):
        assert 2 * half[key] == full[key]


@pytest.mark.parametrize("outer", OUTER)
def test_bfloat16_on_the_wire_stays_close(outer: str, federate: Federate) -> None:
    words = [*OUTER[outer], "outer.fragments=2", "rounds=4"]
    half = federate(*words, "wire.up=bfloat16", "wire.down=bfloat16")
    full = federate(*words)
    assert failures(half) == {}
    for key, value in full.state.items():
        moved = (value - full.initial[key]).norm()
        assert (half.state[key] - value).norm() < 0.25 * moved, key


@pytest.mark.parametrize("way", ["up", "down"])
def test_moments_do_not_travel_as_float16(way: str) -> None:
    """Squares of gradients lie below its smallest number, and a root of 0 stands in a divisor."""
    with pytest.raises(SettingsError, match="use bfloat16 or float32"):
        micro("outer=local_adamw", f"wire.{way}=float16")
    micro("outer=average", f"wire.{way}=float16")
    micro("outer=local_adamw", f"wire.{way}=bfloat16")
