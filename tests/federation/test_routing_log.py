"""The routing tables of a round: weights, residents, fragments, and what the probe says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.data.tokens import TokenBlocks
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.routing_log import RoutingLog, probe_windows
from fomoe_flwr.layout import Layout
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RoutingCounts, chosen_experts
from fomoe_flwr.model.state import StateSpec, state_of

LAYERS, EXPERTS = 2, 12
UNEVEN = Layout(
    EXPERTS,
    (
        (tuple(range(9)), tuple(range(6, 12))),
        (tuple(range(12)), tuple(range(6))),
    ),
)
"""Worker 0 holds 9 and 12 experts, worker 1 six and six."""


def blocks_of(num_blocks: int, sequence_length: int = 32) -> TokenBlocks:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 512, num_blocks * sequence_length + 1).astype(np.uint16)
    domains = np.arange(num_blocks) * 2 // num_blocks
    return TokenBlocks(tokens, domains.astype(np.int16), ("a", "b"), sequence_length)


class Bench:
    """A routing log over a small model, and rounds made up for it."""

    def __init__(self, *overrides: str) -> None:
        self.settings: Settings = load_settings(["preset=tiny", *overrides])
        shape = self.settings.model
        config = transformers_config(shape, 32)
        self.model = build_model(shape, config, seed=3)
        self.state = state_of(self.model)
        self.spec = StateSpec.of(shape, config)
        self.log = RoutingLog(self.settings, self.spec, blocks_of(40))
        self.log.begin(self.choose)

    def choose(self, windows: torch.Tensor) -> torch.Tensor:
        return chosen_experts(self.model, windows, EXPERTS, 2)

    def record(self, layout: Layout = UNEVEN, server_round: int = 1) -> RoundRecord:
        record = RoundRecord(server_round, layout)
        for worker, tokens in enumerate((300, 100)):
            generator = torch.Generator().manual_seed(worker)
            record.counts[worker] = RoutingCounts(
                torch.randint(1, 50, (LAYERS, EXPERTS), generator=generator),
                torch.tensor([10, 20 * worker]),
                torch.tensor([6, 0]),
                tokens,
            )
            if self.log.probe is not None:
                record.choices[worker] = chosen_experts(self.model, self.log.probe, EXPERTS, 2)
        record.disagreement = torch.ones(LAYERS, EXPERTS)
        record.copies = torch.full((LAYERS, EXPERTS), 2)
        return record

    def close(self, record: RoundRecord) -> tuple[dict[str, float], dict[str, Any]]:
        return self.log.close(record, self.choose, self.state)


def column(line: Mapping[str, Any], name: str) -> list[float]:
    return [layer[name] for layer in line["layers"]]


def test_closed_forms_are_weighted_by_the_tokens_of_each_worker() -> None:
    metrics, line = Bench().close(Bench().record())
    # C(3, 2) / C(12, 2) and C(6, 2) / C(12, 2), three to one; in the other layer 0 and the latter.
    few, half = 3 / 66, 15 / 66
    assert column(line, "all_ghost_expected") == pytest.approx([(3 * few + half) / 4, half / 4])
    assert column(line, "ghost_expected") == pytest.approx([(3 * 3 / 12 + 6 / 12) / 4, 1 / 8])
    assert metrics["moe/all_ghost_expected"] == pytest.approx((3 * few + 2 * half) / 8)
    assert column(line, "all_ghost_fraction") == pytest.approx([12 / 400, 0])
    assert [w["layers"][0]["residents"] for w in line["workers"]] == [9, 6]
    assert [w["layers"][0]["all_ghost_expected"] for w in line["workers"]] == [few, half]


def test_the_load_of_all_workers_is_pooled_before_it_is_measured() -> None:
    bench = Bench()
    record = bench.record()
    for worker in (0, 1):
        record.counts[worker].load[0] = 0
        record.counts[worker].load[0, worker * 6 : worker * 6 + 6] = 10
    _, line = bench.close(record)
    assert column(line, "load_entropy")[0] == pytest.approx(1)
    assert line["layers"][0]["load"] == [10] * EXPERTS
    for worker in line["workers"]:
        assert worker["layers"][0]["load_entropy"] == pytest.approx(math.log(6) / math.log(12))
        assert worker["layers"][0]["dead_experts"] == 0.5


def test_a_partitioned_worker_is_measured_over_its_residents() -> None:
    bench = Bench("model.routing=partitioned")
    record = bench.record()
    record.counts[1].load[0] = 0
    record.counts[1].load[0, 6:] = 10
    _, line = bench.close(record)
    own = line["workers"][1]["layers"][0]
    assert (own["load_entropy"], own["dead_experts"]) == (pytest.approx(1), 0)
    assert own["ghost_expected"] == own["all_ghost_expected"] == 0


def test_drift_is_relative_to_the_weights_of_an_expert() -> None:
    bench = Bench()
    metrics, line = bench.close(bench.record())
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts."
        keys = [key for key in bench.state if key.startswith(prefix)]
        assert len(keys) == 2
        norms = [
            math.sqrt(sum(float(bench.state[key][expert].square().sum()) for key in keys))
            for expert in range(EXPERTS)
        ]
        expected = sum(1 / norm for norm in norms) / EXPERTS
        assert column(line, "expert_drift")[layer] == pytest.approx(expected, rel=1e-5)
    assert metrics["moe/expert_drift"] == pytest.approx(sum(column(line, "expert_drift")) / 2)


def test_drift_needs_two_copies_and_a_layer_that_was_sent() -> None:
    bench = Bench("outer.fragments=2")
    metrics, line = bench.close(bench.record())
    found = column(line, "expert_drift")
    assert [value is None for value in found].count(True) == 1
    assert metrics["moe/expert_drift"] == max(value for value in found if value is not None)
    record = bench.record(server_round=2)
    assert record.copies is not None
    record.copies.fill_(1)
    metrics, line = bench.close(record)
    assert column(line, "expert_drift") == [None, None]
    assert "moe/expert_drift" not in metrics


@pytest.mark.parametrize("model", ["deepseek-v3-tiny", "glm4-moe-tiny", "fomoe-tiny"])
def test_drift_is_measured_where_selection_biases_travel_with_their_experts(model: str) -> None:
    bench = Bench(f"model={model}", "model.routing=partitioned")
    assert any(entry.key.endswith("_bias") for entry in bench.spec.expert)
    metrics, _ = bench.close(bench.record())
    assert metrics["moe/expert_drift"] > 0


def test_churn_compares_with_the_round_before() -> None:
    bench = Bench()
    metrics, _ = bench.close(bench.record())
    assert (metrics["moe/churn"], metrics["moe/worker_agreement"]) == (0, 1)
    with torch.no_grad():
        # The last layer's choices are turned around; those before it stay.
        bench.state["model.layers.1.mlp.gate.weight"].neg_()
    metrics, line = bench.close(bench.record())
    assert column(line, "churn") == [0, pytest.approx(1, abs=0.05)]
    metrics, _ = bench.close(bench.record())
    assert metrics["moe/churn"] == 0


def test_router_cosine_is_that_of_the_global_rows_not_of_biases() -> None:
    bench = Bench("model=deepseek-v3-tiny")
    assert any(key.endswith("gate.e_score_correction_bias") for key in bench.state)
    with torch.no_grad():
        for layer in range(LAYERS):
            bench.state[f"model.layers.{layer}.mlp.gate.weight"].fill_(1.0)
    metrics, _ = bench.close(bench.record())
    assert metrics["moe/router_cosine"] == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100, 10_000])
def test_the_probe_is_held_out_text_of_no_more_tokens_than_asked(count: int) -> None:
    blocks = blocks_of(40)
    windows = probe_windows(blocks, count)
    assert windows is not None
    assert 0.5 * min(count, 40 * 32) <= windows.numel() <= count
    starts = {tuple(row) for row in blocks.window(np.arange(40))[:, : windows.shape[1]].tolist()}
    assert {tuple(row) for row in windows.tolist()} <= starts


def test_the_probe_takes_from_every_domain() -> None:
    blocks = blocks_of(40)
    windows = probe_windows(blocks, 64)
    assert windows is not None
    rows = [blocks.window(np.arange(40))[:, :32].tolist().index(row) for row in windows.tolist()]
    assert [int(blocks.domain_ids[row]) for row in rows] == [0, 1]


def test_no_probe_no_windows() -> None:
    assert probe_windows(blocks_of(4), 0) is None
    bench = Bench("eval.probe_tokens=0")
    metrics, line = bench.close(bench.record())
    assert not {"moe/churn", "moe/worker_agreement"} & metrics.keys()
    assert "churn" not in line["layers"][0]
    assert all(math.isfinite(value) for value in metrics.values())
