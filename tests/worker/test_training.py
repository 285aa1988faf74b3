"""Local training: the schedule, what decays, accumulation, and when it gives up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.config import BIASED_FAMILIES, BalanceSettings, LocalSettings, ModelSettings
from fomoe_flwr.model.families import FAMILIES, transformers_config
from fomoe_flwr.model.residency import build_model, moe_blocks
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.model.state import state_of
from fomoe_flwr.parameters.keys import RoutingMode
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.training import (
    LocalReport,
    TrainingError,
    learning_rate,
    make_optimizer,
    token_loss,
    train,
)

SHAPE = ModelSettings(
    num_layers=2,
    hidden_size=16,
    expert_size=8,
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    top_k=2,
    vocab_size=260,
    init_std=0.3,
)
RESIDENTS = ((0, 2), (1, 2, 3))
LOCAL = LocalSettings(
    steps=2,
    optimizer="sgd",
    lr=0.1,
    warmup_steps=0,
    schedule="constant",
    grad_clip=0.0,
)
WINDOWS = torch.randint(0, 260, (4, 4, 9), generator=torch.Generator().manual_seed(0))


class Given:
    """Batches that serve the given ones in order."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.position = batches, 0

    def next_batch(self) -> Tensor:
        self.position += 1
        return self.batches[self.position - 1]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def model_of(shape: ModelSettings = SHAPE) -> PreTrainedModel:
    return build_model(shape, transformers_config(shape, 8), RESIDENTS, seed=1)


def run(
    model: nn.Module,
    local: LocalSettings,
    batches: list[Tensor],
    first_step: int = 0,
    balance_loss: float = 0.0,
) -> LocalReport:
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    report = train(
        model,
        probe,
        make_optimizer(model, local),
        InnerState(model, local, RoutingMode.SKIP_TOKEN, RESIDENTS),
        Given(batches),
        local,
        balance=BalanceSettings(loss=balance_loss),
        first_step=first_step,
        total_steps=100,
        device=torch.device("cpu"),
    )
    probe.close()
    return report


def assert_close(got: nn.Module, want: nn.Module, atol: float) -> None:
    expected = state_of(want)
    for key, value in state_of(got).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=atol)


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


@pytest.mark.parametrize("steps", [1, 2])
def test_two_half_batches_accumulated_equal_one_batch(steps: int) -> None:
    halves, whole = model_of(), model_of()
    run(
        halves,
        replace(LOCAL, steps=steps, accumulate=2),
        [half for batch in WINDOWS for half in batch.split(2)],
    )
    run(whole, replace(LOCAL, steps=steps), list(WINDOWS))
    assert_close(halves, whole, atol=1e-6)
    assert any(
        not torch.allclose(p, q)
        for p, q in zip(halves.parameters(), model_of().parameters(), strict=True)
    )


def test_clipping_bounds_the_whole_gradient() -> None:
    model, start = model_of(), model_of()
    report = run(model, replace(LOCAL, steps=1, grad_clip=0.01), [WINDOWS[0]])
    moved = [p - q for p, q in zip(model.parameters(), start.parameters(), strict=True)]
    norm = torch.cat([m.detach().flatten() for m in moved]).norm().item()
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert report.grad_norm > 0.01


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


def test_token_loss_is_the_mean_over_all_predicted_tokens() -> None:
    model = model_of()
    logits = model(input_ids=WINDOWS[0][:, :-1], use_cache=False).logits
    nats = [
        -logits[b, s].log_softmax(-1)[WINDOWS[0][b, s + 1]].item()
        for b in range(4)
        for s in range(8)
    ]
    assert token_loss(model, WINDOWS[0]).item() == pytest.approx(sum(nats) / len(nats), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_report_counts_tokens_and_means_losses(accumulate: int) -> None:
    model = model_of()
    frozen = copy.deepcopy(model).train()
    local = replace(LOCAL, lr=1e-12, accumulate=accumulate)
    report = run(model, local, list(WINDOWS))
    losses = [token_loss(frozen, batch).item() for batch in WINDOWS[: 2 * accumulate]]
    assert report.tokens == 2 * accumulate * 4 * 8
    assert report.routing.tokens == report.tokens
    assert report.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    last = losses[-accumulate:]
    assert report.last_loss == pytest.approx(sum(last) / accumulate, rel=1e-5)
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)


def test_training_leaves_no_gradient_behind() -> None:
    model = model_of()
    run(model, LOCAL, list(WINDOWS))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_names_step_and_keys() -> None:
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(TrainingError, match=r"nan at step 17: lower local\.lr=0\.1 or local\.gr"):
        run(model, LOCAL, list(WINDOWS), first_step=17)


def test_a_divergence_in_the_middle_names_its_first_step() -> None:
    model, calls = model_of(), []

    def poison(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        calls.append(len(calls))
        return output * (torch.nan if calls[-1] >= 2 else 1.0)

    model.lm_head.register_forward_hook(poison)
    with pytest.raises(TrainingError, match="at step 42: ") as caught:
        run(model, replace(LOCAL, steps=4), list(WINDOWS), first_step=40)
    assert "\n" not in str(caught.value)


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


def test_bfloat16_trains_fp32_weights_and_is_close() -> None:
    half, full, start = model_of(), model_of(), model_of()
    seen: list[torch.dtype] = []
    half.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda _m, _i, out: seen.append(out.dtype)
    )
    losses = [
        run(model, replace(LOCAL, lr=0.02, precision=precision), list(WINDOWS), 0, 0.01).loss
        for model, precision in ((half, "bfloat16"), (full, "float32"))
    ]
    assert set(seen) == {torch.bfloat16}
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    moved, apart = [], []
    for mine, theirs, before in zip(
        half.parameters(), full.parameters(), start.parameters(), strict=True
    ):
        assert mine.dtype is torch.float32
        moved.append((theirs - before).flatten())
        apart.append((mine - theirs).flatten())
    # Far from a bit-for-bit copy, and far from another direction.
    share = (torch.cat(apart).norm() / torch.cat(moved).norm()).item()
    assert 1e-5 < share < 0.15


def router_outputs(model: nn.Module, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (logits, chosen) of every router for one batch."""
    outputs: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.gate.register_forward_hook(lambda _m, _i, out: outputs.append((out[0], out[-1])))
        for _, block in moe_blocks(model)
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
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS, pooled_share=pooled)
    train(
        model,
        probe,
        make_optimizer(model, LOCAL),
        InnerState(model, LOCAL, RoutingMode(routing), RESIDENTS),
        Given([WINDOWS[0]]),
        replace(LOCAL, steps=1),
        balance=BalanceSettings(loss=0.5, form="global"),
        first_step=0,
        total_steps=100,
        device=torch.device("cpu"),
    )
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
    probe = RouterProbe(model, SHAPE.num_experts, RESIDENTS)
    train(
        model,
        probe,
        make_optimizer(model, LOCAL),
        InnerState(model, LOCAL, RoutingMode.SKIP_TOKEN, RESIDENTS),
        Given([WINDOWS[0]]),
        replace(LOCAL, steps=1),
        balance=BalanceSettings(loss=0.0, z_loss=0.25),
        first_step=0,
        total_steps=100,
        device=torch.device("cpu"),
    )
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
    residents = ((0, 2), (1, 2, 3))
    model = build_model(shape, transformers_config(shape, 8), residents, seed=1)
    probe = RouterProbe(model, shape.num_experts, residents)
    optimizer = make_optimizer(model, LOCAL)
    chosen: list[dict[int, Tensor]] = []
    for layer, block in moe_blocks(model):
        block.gate.register_forward_hook(
            lambda _m, _i, out, layer=layer: chosen.append({layer: out[-1].flatten()})
        )
    steps, accumulate, rate = 3, 2, 0.01
    before = {
        layer: block.gate.e_score_correction_bias.clone() for layer, block in moe_blocks(model)
    }
    train(
        model,
        probe,
        optimizer,
        InnerState(model, LOCAL, RoutingMode(routing), residents),
        Given([*WINDOWS, *WINDOWS]),
        replace(LOCAL, steps=steps, accumulate=accumulate),
        balance=BalanceSettings(loss=0.0, bias_rate=rate),
        first_step=0,
        total_steps=100,
        device=torch.device("cpu"),
    )
    signs = set()
    for layer, block in moe_blocks(model):
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
        torch.testing.assert_close(block.gate.e_score_correction_bias, expected, rtol=0, atol=1e-7)
    assert {-1, 1} <= signs


def test_without_a_bias_rate_biases_stay(
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    shape = of_family(SHAPE, "fomoe")
    model = build_model(shape, transformers_config(shape, 8), RESIDENTS, seed=1)
    run(model, LOCAL, list(WINDOWS))
    for _, block in moe_blocks(model):
        assert block.gate.e_score_correction_bias.eq(0).all()
