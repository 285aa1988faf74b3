"""The balance loss, the z-loss and selection biases in local training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from local_training import (
    LOCAL,
    RESIDENTS,
    SHAPE,
    WINDOWS,
    assert_close,
    model_of,
    run,
    trainer_of,
)
from torch import Tensor, nn

from fomoe_flwr.config import (
    BIASED_FAMILIES,
    BalanceSettings,
    ModelSettings,
)
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.worker.training_model import token_loss


def test_the_balance_loss_is_added_with_its_weight() -> None:
    model, expected = model_of(), model_of().train()
    report = run(model, replace(LOCAL, steps=1), [WINDOWS[0]], balance_loss=0.5)
    probe = RouterProbe(expected, SHAPE.num_experts, RESIDENTS)
    loss = token_loss(expected, WINDOWS[0])
    balance = probe.losses().balance
    (loss + 0.5 * balance).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    assert_close(model, expected, atol=1e-7)
    assert report.loss == pytest.approx(loss.item())
    assert report.balance_loss == pytest.approx(balance.item())


def router_outputs(model: nn.Module, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (logits, chosen) of every router for one batch."""
    outputs: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.router.register_forward_hook(lambda _m, _i, out: outputs.append((out[0], out[-1])))
        for block in moe_blocks(model)
    ]
    token_loss(model, windows)
    for handle in handles:
        handle.remove()
    return outputs


def one_sgd_step(loss: Tensor, model: nn.Module, rate: float = 0.1) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_the_global_form_uses_the_shares_of_all_workers(routing: str) -> None:
    shape = replace(SHAPE, routing=routing)
    pooled = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3]])
    model, expected = model_of(shape).train(), model_of(shape).train()
    balance_settings = BalanceSettings(loss=0.5, form="global")
    trainer_of(
        model, LOCAL, [WINDOWS[0]], shape=shape, balance=balance_settings, pooled_share=pooled
    ).train(1)
    balance = torch.zeros(())
    for layer, (logits, _) in enumerate(router_outputs(expected, WINDOWS[0])):
        share = pooled[layer]
        if routing == "partitioned":
            share = share[list(RESIDENTS[layer])]
            share = share / share.sum()
        scored = logits.shape[-1]
        balance = balance + scored * (share * logits.softmax(-1).mean(0)).sum() / 2
    one_sgd_step(token_loss(expected, WINDOWS[0]) + 0.5 * balance, expected)
    assert_close(model, expected, atol=1e-6)


def test_pooled_shares_that_say_nothing_about_a_workers_experts_are_not_used() -> None:
    """A worker whose experts nobody was heard of would divide by zero, in every round anew."""
    shape = replace(SHAPE, routing="partitioned")
    pooled = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    model = model_of(shape).train()
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS, pooled_share=pooled)
    token_loss(model, WINDOWS[0])
    balance = probe.losses().balance
    values = []
    for layer, (logits, chosen) in enumerate(router_outputs(model, WINDOWS[0])):
        scored = logits.shape[-1]
        own = chosen.flatten().bincount(minlength=scored) / chosen.numel()
        share = own if layer == 0 else torch.full((scored,), 1 / scored)
        values.append((scored * (share * logits.softmax(-1).mean(0)).sum()).item())
    assert balance.item() == pytest.approx(sum(values) / 2, rel=1e-5)


def test_the_z_loss_is_the_mean_squared_logsumexp() -> None:
    model, expected = model_of(), model_of().train()
    trainer_of(model, LOCAL, [WINDOWS[0]], balance=BalanceSettings(loss=0.0, z_loss=0.25)).train(1)
    outputs = router_outputs(expected, WINDOWS[0])
    by_hand = [logits.exp().sum(-1).log().square().mean() for logits, _ in outputs]
    loss = token_loss(expected, WINDOWS[0]) + 0.25 * torch.stack(by_hand).mean()
    one_sgd_step(loss, expected)
    assert_close(model, expected, atol=1e-6)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("family", BIASED_FAMILIES)
def test_selection_biases_move_towards_the_experts_with_too_little_load(
    family: str, routing: str, of_family: Callable[[ModelSettings, str], ModelSettings]
) -> None:
    shape = replace(of_family(SHAPE, family), routing=routing)
    model = build_model(shape, transformers_config(shape, 8), RESIDENTS, seed=1)
    chosen: list[dict[int, Tensor]] = []
    for layer, block in enumerate(moe_blocks(model)):
        block.router.register_forward_hook(
            lambda _m, _i, out, layer=layer: chosen.append({layer: out[-1].flatten()})
        )
    steps, accumulate, rate = 3, 2, 0.01
    before = {
        layer: block.router.e_score_correction_bias.clone()
        for layer, block in enumerate(moe_blocks(model))
    }
    trainer_of(
        model,
        replace(LOCAL, accumulate=accumulate),
        [*WINDOWS, *WINDOWS],
        shape=shape,
        balance=BalanceSettings(loss=0.0, bias_rate=rate),
    ).train(steps)
    signs = set()
    for layer, block in enumerate(moe_blocks(model)):
        expected = before[layer].clone()
        calls = [call[layer] for call in chosen if layer in call]
        assert len(calls) == steps * accumulate
        for step in range(steps):
            # Both micro-batches of a step count together.
            ids = torch.cat(calls[step * accumulate : (step + 1) * accumulate])
            load = ids.bincount(minlength=len(expected)).tolist()
            mean = sum(load) / len(load)
            for expert, count in enumerate(load):
                sign = (count < mean) - (count > mean)
                expected[expert] += rate * sign
                signs.add(sign)
        torch.testing.assert_close(
            block.router.e_score_correction_bias, expected, rtol=0, atol=1e-7
        )
    assert {-1, 1} <= signs


def test_without_a_bias_rate_biases_stay(
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    shape = of_family(SHAPE, "fomoe")
    model = build_model(shape, transformers_config(shape, 8), RESIDENTS, seed=1)
    run(model, LOCAL, list(WINDOWS))
    for block in moe_blocks(model):
        assert block.router.e_score_correction_bias.eq(0).all()
