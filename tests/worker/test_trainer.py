"""Local training: accumulation, clipping, precision, the report, and when it gives up."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from local_training import (
    LOCAL,
    WINDOWS,
    assert_close,
    model_of,
    run,
)
from torch import Tensor, nn

from fomoe_flwr.worker.trainer import TrainingError
from fomoe_flwr.worker.training_model import token_loss


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
