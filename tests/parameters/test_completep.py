"""CompleteP's factors: the rules themselves, the groups they make, and the rate that is stepped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fomoe_flwr.config import LocalSettings, ModelSettings, RoutingMode, load_settings
from fomoe_flwr.model.families import FAMILIES, model_class, transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.parameters.completep import Multipliers, multipliers
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.optimizer import make_optimizer

SHAPE = ModelSettings(
    num_layers=4,
    hidden_size=16,
    expert_size=8,
    num_heads=2,
    num_kv_heads=2,
    num_experts=4,
    top_k=2,
    vocab_size=260,
)
HIDDEN = [
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.3.self_attn.o_proj.weight",
    "model.layers.3.mlp.experts.up_proj",
    "model.layers.3.mlp.experts.down_proj",
]
INSIDE = [
    "model.layers.3.input_layernorm.weight",
    "model.layers.3.post_feedforward_layernorm.weight",
    "model.layers.3.mlp.gate.weight",
]
OUTSIDE = [
    "model.embed_tokens.weight",
    "model.embed_norm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_rules(alpha: float) -> None:
    width, depth = 4.0, 8.0
    eps, depth_lr = depth**-alpha / width, depth ** (alpha - 1)
    for key in HIDDEN:
        expected = Multipliers(lr=depth_lr / width, eps=eps, decay=width)
        assert multipliers(key, width, depth, alpha) == expected
    for key in INSIDE:
        assert multipliers(key, width, depth, alpha) == Multipliers(lr=depth_lr, eps=eps)
    for key in OUTSIDE:
        assert multipliers(key, width, depth, alpha) == Multipliers(eps=eps)


def test_the_proxy_itself_has_no_factor() -> None:
    for key in (*HIDDEN, *INSIDE, *OUTSIDE):
        assert multipliers(key, 1.0, 1.0) == Multipliers()


def test_decay_per_step_does_not_depend_on_width() -> None:
    """AdamW shrinks by rate * decay: a smaller rate must not weaken it."""
    found = multipliers(HIDDEN[0], 16.0, 128.0)
    assert found.lr * found.decay == 1.0


def test_groups_of_the_100b_model() -> None:
    model = load_settings(["model=paper-100b"]).model
    with torch.device("meta"):
        built = model_class("fomoe")(transformers_config(model, 2048))
    local = LocalSettings(lr=0.01, eps=1e-8, weight_decay=0.5)
    groups = make_optimizer(built, local).param_groups
    found = {(g["lr_multiplier"], g["weight_decay"]): len(g["params"]) for g in groups}
    layers = 512
    assert found == {
        (1.0, 0.0): 3 + layers * 5,  # embedding, two norms; a layer's router and four norms
        (1 / 16, 8.0): layers * 6,
    }
    assert all(g["eps"] == pytest.approx(1e-8 / 16 / 128) for g in groups)
    assert all(g["lr"] == pytest.approx(0.01 * g["lr_multiplier"]) for g in groups)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_the_papers_block_under_adam_has_factors(
    family: str, optimizer: str, of_family: Callable[[ModelSettings, str], ModelSettings]
) -> None:
    shape = of_family(SHAPE, family)
    model = build_model(shape, transformers_config(shape, 8), seed=0)
    groups = make_optimizer(model, LocalSettings(optimizer=optimizer)).param_groups
    found = {group["lr_multiplier"] for group in groups}
    # `of_family` makes this shape twice as wide as its proxy.
    assert found == ({1.0, 0.5} if (family, optimizer) == ("fomoe", "adamw") else {1.0})
    held = [id(p) for group in groups for p in group["params"]]
    # A block without shared experts has matrices of no elements; nothing trains those.
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.numel())


def test_an_adam_step_moves_each_parameter_by_its_own_rate(
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    shape = of_family(SHAPE, "fomoe")
    residents = ((0, 1, 2, 3),) * shape.num_layers
    model = build_model(shape, transformers_config(shape, 8), residents, seed=0)
    local = LocalSettings(lr=0.1, weight_decay=0.5)
    optimizer = make_optimizer(model, local)
    inner = InnerState(model, optimizer, local, RoutingMode.SKIP_TOKEN, residents)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    inner.step(0.1)
    for name, parameter in model.named_parameters():
        factors = multipliers(name, 2.0, 2.0)
        exempt = any(part in name for part in ("embed", "norm", ".gate."))
        shrink = 0.0 if exempt else 0.1 * factors.lr * 0.5 * factors.decay
        expected = before[name] * (1 - shrink) - 0.1 * factors.lr
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
