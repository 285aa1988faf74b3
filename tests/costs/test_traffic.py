"""Bytes of a round: what a worker holds, moments, fragments, and layouts that move."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fomoe_flwr import costs
from fomoe_flwr.config import (
    ModelSettings,
    Settings,
    load_settings,
)
from fomoe_flwr.costs.case import Case
from fomoe_flwr.layout import Layout, draw_layout
from fomoe_flwr.model.families import FAMILIES
from fomoe_flwr.parameters import shapes
from fomoe_flwr.parameters.keys import is_expert_key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize(("up", "down"), [("float32", "float32"), ("bfloat16", "float32")])
def test_bytes_are_elements_times_their_size(
    family: str,
    routing: str,
    up: str,
    down: str,
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    settings = Settings(model=of_family(ModelSettings(), family))
    settings.model.routing, settings.wire.up, settings.wire.down = routing, up, down
    layout = Case(settings).layout
    sizes = {"float32": 4, "bfloat16": 2}
    held, buffers = [], shapes.buffer_shapes(settings.model)
    for worker in range(layout.num_workers):
        elements = 0
        for key, shape in (shapes.parameter_shapes(settings.model) | buffers).items():
            if is_expert_key(key, settings.model.routing_mode):
                residents = layout.of_worker(worker)[int(key.split(".")[2])]
                elements += len(residents) * math.prod(shape[1:])
            else:
                elements += math.prod(shape)
        held.append(elements)
    resident = costs.resident_counts(settings.model, layout)
    assert (resident == held) == (not buffers)
    sent = costs.predict_bytes(settings, layout)
    assert sent.up_per_worker == [n * sizes[up] for n in held]
    assert sent.down_per_worker == [n * sizes[down] for n in held]
    summary = costs.summary(settings)
    assert summary["bytes/up_per_round"] == sent.up == sum(sent.up_per_worker)
    assert summary["bytes/down_per_round"] == sent.down == sum(sent.down_per_worker)
    assert summary["params/resident"] == max(resident)


OUTER: dict[str, tuple[list[str], float]] = {
    "average": (["outer=average"], 1),
    "nesterov": (["outer=nesterov"], 1),
    "local_adamw": (["outer=local_adamw"], 3),
    "des_loc": (["outer=des_loc"], 1 + 1 / 3 + 1 / 6),
    "des_loc 2 5": (
        ["outer=des_loc", "outer.first_moment_every=2", "outer.second_moment_every=5"],
        1 + 1 / 2 + 1 / 5,
    ),
}


@pytest.mark.parametrize("fragments", [1, 2, 4])
@pytest.mark.parametrize("outer", OUTER)
def test_moments_multiply_the_bytes_of_a_round_and_fragments_divide_them(
    outer: str, fragments: int
) -> None:
    words, factor = OUTER[outer]
    plain = costs.summary(load_settings([]))
    found = costs.summary(load_settings([*words, f"outer.fragments={fragments}"]))
    for key in ("up_per_round", "down_per_round", "full_replica_per_round"):
        assert found[f"bytes/{key}"] == pytest.approx(
            float(plain[f"bytes/{key}"]) * factor / fragments, rel=1e-6
        )
    # Full replicas would have the same outer step; data-parallel training sends gradients only.
    assert found["ratio/full_replica"] == pytest.approx(plain["ratio/full_replica"], rel=1e-6)
    expected = float(plain["ratio/ddp"]) * fragments / factor
    assert found["ratio/ddp"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["fixed", "random"])
@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("outer", OUTER)
def test_the_prediction_of_a_round_is_the_mean_over_a_cycle(
    outer: str, fragments: int, kind: str, every: int
) -> None:
    settings = load_settings(
        [
            *OUTER[outer][0],
            f"outer.fragments={fragments}",
            f"layout={kind}",
            f"layout.reshuffle_every={every}",
        ]
    )
    layouts = [
        draw_layout(settings.layout, 4, 16, 0, server_round) for server_round in range(1, 133)
    ]
    # 60 is a multiple of every period here; the first moments are behind after as many rounds.
    rounds = [
        costs.predict_round(settings, layouts[r - 1], r, layouts[r - 2]) for r in range(61, 121)
    ]
    mean = costs.predict_bytes(settings, layouts[0])
    for way in ("up_per_worker", "down_per_worker"):
        for worker in range(4):
            total = sum(getattr(each, way)[worker] for each in rounds)
            assert getattr(mean, way)[worker] == pytest.approx(total / 60, abs=0.5)


def test_the_first_round_has_neither_moments_nor_fragments_to_send() -> None:
    settings = load_settings(["outer=local_adamw", "outer.fragments=4"])
    layout = Case(settings).layout
    plain = costs.predict_bytes(load_settings([]), layout)
    first, second = (costs.predict_round(settings, layout, r) for r in (1, 2))
    assert first.down_per_worker == plain.down_per_worker
    assert first.up * 4 == second.down * 4 == plain.up * 3
    # Each fragment has one of four layers and a quarter of every other key.
    assert len({costs.predict_round(settings, layout, r).up for r in range(1, 9)}) == 1


def test_fragments_do_not_save_where_the_layout_moves_in_every_round() -> None:
    random = ["layout=random", "layout.reshuffle_every=1"]
    plain = costs.summary(load_settings(random))
    parted = costs.summary(load_settings([*random, "outer.fragments=4"]))
    assert parted["bytes/up_per_round"] == plain["bytes/up_per_round"] // 4  # type: ignore[operator]
    assert parted["bytes/down_per_round"] == plain["bytes/down_per_round"]


def test_buffers_travel_without_moments() -> None:
    words = ["model=deepseek-v3-tiny", "layout.num_workers=2", "layout.overlap=2"]
    average, moments = (
        costs.predict_bytes(load_settings([*words, f"outer={name}"]), Layout.full(2, 12, 2)).up
        for name in ("average", "local_adamw")
    )
    biases = 2 * 2 * 12 * 4
    assert moments == 3 * (average - biases) + biases
