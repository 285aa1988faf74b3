"""The cost model against models that are really built, and against the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fomoe_flwr import costs
from fomoe_flwr.config import (
    LayoutSettings,
    ModelSettings,
    Settings,
    SettingsError,
    load_settings,
)
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.model.families import FAMILIES, model_class, transformers_config
from fomoe_flwr.model.state import state_of
from fomoe_flwr.parameters import shapes
from fomoe_flwr.parameters.keys import is_expert_key

SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "hidden_size": 32, "expert_size": 24, "num_heads": 2, "num_kv_heads": 1,
     "num_experts": 12, "top_k": 3, "vocab_size": 512},
    {"num_layers": 3, "hidden_size": 48, "expert_size": 16, "num_heads": 6, "num_kv_heads": 2,
     "num_experts": 5, "top_k": 1, "vocab_size": 300},
]  # fmt: skip


PAPER = {
    "54M": (256, 4, 8, 128, 2, 200_019),
    "150M": (512, 16, 16, 128, 4, 200_019),
    "2B": (1024, 128, 32, 128, 8, 200_019),
    "13B": (2048, 256, 64, 128, 16, 200_019),
    "100B": (4096, 512, 128, 128, 32, 200_019),
}


def built(model: ModelSettings) -> PreTrainedModel:
    """Build the transformers model that the settings describe, without memory."""
    with torch.device("meta"):
        return model_class(model.family)(transformers_config(model, 8))


def olmoe(layers: int, hidden: int, size: int, experts: int, k: int, vocab: int) -> ModelSettings:
    heads = hidden // 64
    return ModelSettings(
        num_layers=layers, hidden_size=hidden, expert_size=size, num_heads=heads,
        num_kv_heads=heads, num_experts=experts, top_k=k, vocab_size=vocab, tie_embeddings=False,
    )  # fmt: skip


def drawn(settings: Settings) -> Layout:
    model = settings.model
    return draw_layout(settings.layout, model.num_layers, model.num_experts, settings.seed, 1)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_equal_the_built_model(
    shape: dict[str, Any],
    family: str,
    tied: bool,
    routing: str,
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    model = of_family(ModelSettings(tie_embeddings=tied, routing=routing, **shape), family)
    whole = built(model)
    real = {key: tuple(p.shape) for key, p in whole.named_parameters()}
    assert shapes.parameter_shapes(model) == real
    everything = {key: tuple(value.shape) for key, value in state_of(whole).items()}
    assert shapes.parameter_shapes(model) | shapes.buffer_shapes(model) == everything
    counts = costs.parameter_counts(model)
    sizes = {key: math.prod(shape) for key, shape in real.items()}
    expert = sum(n for key, n in sizes.items() if is_expert_key(key, model.routing_mode))
    assert counts.total == sum(sizes.values())
    assert counts.expert == expert
    assert counts.shared == counts.total - expert
    assert counts.per_expert_per_layer * model.num_layers * model.num_experts == expert
    assert counts.router == sum(n for key, n in sizes.items() if ".mlp.gate." in key)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_active_parameters_leave_out_the_experts_not_chosen(routing: str) -> None:
    model = ModelSettings(routing=routing)
    counts = costs.parameter_counts(model)
    idle = model.num_layers * (16 - 2) * 3 * model.hidden_size * model.expert_size
    assert counts.active == counts.total - idle


def test_the_routing_mode_decides_where_router_rows_count() -> None:
    shared = costs.parameter_counts(ModelSettings(routing="skip_token"))
    parted = costs.parameter_counts(ModelSettings(routing="partitioned"))
    assert parted.total == shared.total
    assert parted.expert - shared.expert == shared.router == 4 * 16 * 256


def test_olmoe_1b_7b_is_what_its_name_says() -> None:
    counts = costs.parameter_counts(olmoe(16, 2048, 1024, 64, 8, 50304))
    assert counts.total == 6_919_161_856
    assert counts.active == 1_282_017_280


def test_full_overlap_costs_a_full_replica() -> None:
    settings = Settings(layout=LayoutSettings(overlap=4))
    summary = costs.summary(settings)
    assert summary["params/resident"] == summary["params/total"]
    assert summary["memory/worker_bytes"] == summary["memory/full_replica_bytes"]
    assert summary["ratio/full_replica"] == 1
    assert summary["ratio/ddp"] == settings.local.steps
    assert summary["skip/speedup_limit"] == 1
    assert summary["bytes/up_per_round"] == 4 * 4 * costs.parameter_counts(settings.model).total


def test_the_ratio_follows_the_star_formula() -> None:
    settings = Settings()
    counts = costs.parameter_counts(settings.model)
    share = counts.expert / counts.total
    expected = 1 / (1 - share * (1 - 2 / 4))
    summary = costs.summary(settings)
    assert summary["ratio/full_replica"] == pytest.approx(expected)
    assert summary["ratio/ddp"] == pytest.approx(expected * settings.local.steps)


def test_memory_counts_weights_gradients_and_moments() -> None:
    assert costs.memory_bytes(1000, "adamw") == 16_000
    assert costs.memory_bytes(1000, "sgd") == 8_000
    with pytest.raises(SettingsError, match=r"local\.optimizer=lion"):
        costs.memory_bytes(1000, "lion")


@pytest.mark.parametrize(
    ("model", "sequence_length", "share", "limits"),
    [
        (olmoe(16, 2048, 1024, 64, 8, 50304), 4096, 0.61, (1.18, 1.44, 1.85, 2.16)),
        (olmoe(12, 1024, 512, 64, 8, 50304), 1024, 0.57, (1.17, 1.40, 1.74, 1.99)),
        (olmoe(8, 2048, 1024, 64, 8, 50304), 2048, 0.60, (1.18, 1.43, 1.81, 2.09)),
        (olmoe(4, 256, 256, 16, 2, 4096), 256, 0.40, (1.11, 1.25, 1.43, 1.54)),
        (olmoe(6, 256, 128, 64, 8, 4096), 256, 0.60, (1.18, 1.43, 1.82, 2.12)),
        (olmoe(8, 512, 512, 16, 4, 8192), 512, 0.63, (1.19, 1.46, 1.90, 2.23)),
    ],
)
def test_skip_limits(
    model: ModelSettings, sequence_length: int, share: float, limits: tuple[float, ...]
) -> None:
    # Worked out by hand: f is the experts' share, and the limit is 1 / (1 - f (1 - a)).
    found = costs.token_flops(model, sequence_length).expert_share
    assert found == pytest.approx(share, abs=0.006)
    for resident, limit in zip((0.75, 0.5, 0.25, 0.125), limits, strict=True):
        assert costs.skip_speedup_limit(found, resident) == pytest.approx(limit, abs=0.006)


def test_flops_are_twice_the_active_matrix_parameters_and_the_scores() -> None:
    model = olmoe(3, 128, 96, 8, 2, 512)
    flops = costs.token_flops(model, 64)
    counts = costs.parameter_counts(model)
    norms = model.num_layers * 4 * 128 + 128
    matrices = counts.active - norms - model.vocab_size * 128
    assert flops.forward - flops.scores == 2 * matrices
    assert flops.train == 3 * flops.forward
    # Every token attends to 32 others on average, by two products of 128 multiply-adds each.
    assert flops.scores == 3 * 2 * 2 * 128 * 32


def test_the_speedup_limit_is_whole_flops_over_the_worker_s() -> None:
    summary = costs.summary(Settings())
    ratio = float(summary["flops/train_per_token"]) / float(summary["flops/worker_train_per_token"])
    assert summary["skip/speedup_limit"] == pytest.approx(ratio)
    assert summary["skip/resident_share"] == 0.5


def test_partitioned_routing_saves_no_expert_flops_while_top_k_experts_are_resident() -> None:
    model = ModelSettings(routing="partitioned", top_k=2)
    few = LayoutSettings(num_workers=16, overlap=1)
    assert costs.summary(Settings(model=model))["skip/speedup_limit"] == 1
    assert costs.summary(Settings(model=model, layout=few))["skip/resident_share"] == 0.5


@pytest.mark.parametrize(("routing", "share"), [("skip_token", 2 * 2 / 16), ("partitioned", 0.5)])
def test_both_batch_sizes(routing: str, share: float) -> None:
    settings = Settings(model=ModelSettings(routing=routing))
    settings.local.batch_size, settings.local.accumulate = 3, 5
    summary = costs.summary(settings)
    worker_tokens = 3 * 5 * settings.data.sequence_length
    assert summary["batch/shared_tokens"] == 4 * worker_tokens
    assert summary["batch/expert_tokens"] == pytest.approx(worker_tokens * share)


@pytest.mark.parametrize(
    ("name", "total", "active", "share"),
    [
        ("54M", 54_358_784, 52_785_920, 0.0387),
        ("150M", 152_872_448, 127_706_624, 0.2204),
        ("2B", 1_819_626_496, 1_014_320_128, 0.5924),
        ("13B", 13_328_095_232, 6_885_644_288, 0.6470),
        ("100B", 104_166_928_384, 52_627_320_832, 0.6623),
    ],
)
def test_the_paper_s_models(name: str, total: int, active: int, share: float) -> None:
    counts = costs.paper_counts(*PAPER[name])
    assert (counts.total, counts.active) == (total, active)
    assert counts.shared + counts.expert == total
    assert round(counts.expert / total, 4) == share


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_models_are_built_with_exactly_the_paper_s_parameters(name: str) -> None:
    model = load_settings([f"model=paper-{name.lower()}"]).model
    shape = (model.hidden_size, model.num_layers, model.num_experts, model.expert_size)
    assert (*shape, model.top_k, model.vocab_size) == PAPER[name]
    assert model.hidden_size // model.num_heads == 64
    sizes = {key: math.prod(s) for key, s in shapes.parameter_shapes(model).items()}
    norms = sum(n for key, n in sizes.items() if "norm" in key)
    assert norms == (4 * model.num_layers + 2) * model.hidden_size
    paper, ours = costs.paper_counts(*PAPER[name]), costs.parameter_counts(model)
    assert ours.total - norms == paper.total
    assert ours.active - norms == paper.active
    assert (ours.shared - norms, ours.expert) == (paper.shared, paper.expert)
    real = {key: tuple(p.shape) for key, p in built(model).named_parameters()}
    assert shapes.parameter_shapes(model) == real


RING = {
    "54M": "1.040/1.030 1.040/1.035 1.027/1.020 1.040/1.038 1.034/1.030 1.023/1.017",
    "150M": "1.283/1.198 1.283/1.239 1.172/1.124 1.283/1.260 1.233/1.198 1.144/1.104",
    "2B": "2.453/1.800 2.453/2.076 1.653/1.421 2.453/2.249 2.032/1.800 1.512/1.340",
    "13B": "2.833/1.943 2.833/2.305 1.759/1.478 2.833/2.542 2.245/1.943 1.587/1.384",
    "100B": "2.961/1.987 2.961/2.378 1.791/1.495 2.961/2.638 2.313/1.987 1.609/1.396",
}


@pytest.mark.parametrize("name", RING)
def test_ring_ratios(name: str) -> None:
    counts = costs.paper_counts(*PAPER[name])
    cells = [(2, 1), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)]
    for (workers, overlap), cell in zip(cells, RING[name].split(), strict=True):
        found = [
            costs.ring_ratio_full_replica(counts.shared, counts.expert, workers, overlap, rate)
            for rate in (0, 1)
        ]
        assert "/".join(f"{ratio:.3f}" for ratio in found) == cell


def test_the_paper_s_headline_is_the_per_round_gain_times_the_local_steps() -> None:
    counts = costs.paper_counts(*PAPER["2B"])
    part = (counts.shared, counts.expert, 4, 2, 1.0)
    assert costs.ring_ratio_full_replica(*part) == pytest.approx(1.4209, abs=5e-5)
    assert costs.ring_ratio_ddp(*part, local_steps=32) == pytest.approx(45.47, abs=5e-3)
    # bf16, GB per worker and round.
    assert 2e-9 * costs.ring_round(*part) == pytest.approx(3.842, abs=5e-4)
    assert 2e-9 * costs.ring_round(counts.shared, counts.expert, 4, 4) == pytest.approx(
        5.459, abs=5e-4
    )


def test_ring_edges() -> None:
    assert costs.ring_ratio_full_replica(10, 90, 1, 1) == 1
    assert costs.ring_ratio_full_replica(10, 90, 8, 8, 1.0) == 1
    assert costs.ring_ratio_full_replica(0, 90, 8, 1) == math.inf


def test_layouts_and_settings_that_do_not_fit_are_refused() -> None:
    settings = Settings()
    layout = drawn(settings)
    with pytest.raises(ValueError, match="the layout has 4 layers of 16 experts"):
        costs.resident_counts(replace(settings.model, num_layers=5), layout)
    with pytest.raises(SettingsError, match=r"layout\.overlap=9"):
        costs.summary(Settings(layout=LayoutSettings(overlap=9)))
    with pytest.raises(SettingsError, match=r"model\.family=gpt2"):
        costs.parameter_counts(ModelSettings(family="gpt2"))
    settings.wire.up = "int3"
    with pytest.raises(ValueError, match="'int3' is not one of float32, "):
        costs.predict_bytes(settings, layout)


def test_uneven_layouts_report_the_largest_worker() -> None:
    settings = Settings(
        model=ModelSettings(num_experts=6),
        layout=LayoutSettings(num_workers=4, overlap=3, allow_uneven=True, draw="same"),
    )
    held = costs.resident_counts(settings.model, drawn(settings))
    assert len(set(held)) == 2
    assert costs.summary(settings)["params/resident"] == max(held)
