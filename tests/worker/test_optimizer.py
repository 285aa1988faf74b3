"""The schedule of the learning rate, and what weight decay touches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from local_training import (
    LOCAL,
    SHAPE,
    WINDOWS,
    assert_close,
    model_of,
    run,
)

from fomoe_flwr.config import (
    LocalSettings,
    ModelSettings,
)
from fomoe_flwr.model.families import FAMILIES
from fomoe_flwr.worker.optimizer import learning_rate, make_optimizer
from fomoe_flwr.worker.training_model import token_loss


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.0), (9, 0.55), (14, 0.1), (99, 0.1)],
)
def test_cosine_schedule_warms_up_and_ends_at_its_minimum(step: int, expected: float) -> None:
    local = LocalSettings(lr=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(local, step, 14) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.01), (1, 0.02), (2, 0.02), (10**6, 0.02)])
def test_constant_schedule_warms_up_and_stays(step: int, expected: float) -> None:
    local = LocalSettings(lr=0.02, warmup_steps=2, schedule="constant")
    assert learning_rate(local, step, 14) == pytest.approx(expected, rel=1e-12)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    local = LocalSettings(lr=0.02, warmup_steps=0, schedule="cosine", min_lr_ratio=0.0)
    assert learning_rate(local, 0, 8) == 0.02
    assert learning_rate(local, 4, 8) == pytest.approx(0.01)
    assert learning_rate(local, 8, 8) == 0.0


def test_a_warm_up_longer_than_the_run_never_divides_by_zero() -> None:
    local = LocalSettings(lr=1.0, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(local, 4, 5) == 0.5
    assert math.isfinite(learning_rate(local, 10, 5))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.5),
        (1, 1.0),
        (2, 1.0),
        (14, 1.0),
        (15, 1.0),
        (16, 1 - 0.9 / 5),
        (18, 1 - 3 * 0.9 / 5),
        (19, 1 - 4 * 0.9 / 5),
        (20, 0.1),
        (99, 0.1),
    ],
)
def test_wsd_warms_up_stays_and_decays_in_the_last_share(step: int, expected: float) -> None:
    local = LocalSettings(
        lr=1.0, warmup_steps=2, schedule="wsd", min_lr_ratio=0.1, decay_fraction=0.25
    )
    assert learning_rate(local, step, 20) == pytest.approx(expected, rel=1e-12)


def test_wsd_edges() -> None:
    local = LocalSettings(lr=1.0, warmup_steps=0, schedule="wsd", min_lr_ratio=0.0)
    assert learning_rate(replace(local, decay_fraction=1.0), 0, 4) == 1.0
    assert learning_rate(replace(local, decay_fraction=1.0), 3, 4) == pytest.approx(0.25)
    # Too short for a tail of its own: one step, and nothing divided by zero.
    assert learning_rate(replace(local, decay_fraction=0.01), 2, 4) == 1.0
    assert learning_rate(replace(local, decay_fraction=0.01), 3, 4) == 1.0
    assert learning_rate(replace(local, decay_fraction=0.01), 4, 4) == 0.0
    # A warm-up that reaches into the tail wins.
    assert learning_rate(replace(local, warmup_steps=4, decay_fraction=1.0), 2, 4) == 0.75


def test_the_rate_follows_the_step_of_the_whole_run() -> None:
    local = replace(LOCAL, steps=1, warmup_steps=4)
    for first_step in range(6):
        model, expected = model_of(), model_of()
        report = run(model, local, [WINDOWS[0]], first_step)
        assert report.lr == pytest.approx(0.1 * min(1.0, (first_step + 1) / 4))
        token_loss(expected.train(), WINDOWS[0]).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= report.lr * parameter.grad
        assert_close(model, expected, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_touches_attention_and_experts_only(
    optimizer: str,
    family: str,
    tied: bool,
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    model = model_of(replace(of_family(SHAPE, family), tie_embeddings=tied))
    local = LocalSettings(optimizer=optimizer, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = make_optimizer(model, local)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    shrunk = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    matrices = {
        name
        for name, p in model.named_parameters()
        if (".self_attn." in name and "norm" not in name) or "experts." in name
        if p.numel()
    }
    assert shrunk == matrices
    assert "model.layers.1.mlp.experts.down_proj" in shrunk
    for name in shrunk:
        got = model.get_parameter(name).detach()
        torch.testing.assert_close(got, before[name] * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)


def test_every_parameter_is_optimised_once() -> None:
    model = model_of()
    made = make_optimizer(model, LocalSettings(weight_decay=0.1))
    held = [id(p) for group in made.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
