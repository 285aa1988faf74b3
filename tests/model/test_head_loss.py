"""The head's loss in chunks against cross entropy of whole logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.model import head_loss as subject
from fomoe_flwr.model.head_loss import head_loss

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(tokens: int, width: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, width, generator=generator),
        torch.randn(vocabulary, width, generator=generator),
        torch.randint(vocabulary, (tokens,), generator=generator),
    )


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double().cpu() - want.detach()).norm() / want.detach().norm())


def assert_equal_to_reference(
    case: tuple[Tensor, ...], multiplier: float, device: str, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, head, target = case[0].to(dtype), case[1].to(dtype), case[2]
    exact = [t.double().requires_grad_() for t in (hidden, head)]
    want = F.cross_entropy(exact[0] @ exact[1].t() * multiplier, target)
    (3 * want).backward()
    ours = [t.to(device).clone().requires_grad_() for t in (hidden, head)]
    loss = head_loss(*ours, target.to(device), multiplier)
    assert loss.dtype is torch.float32
    (3 * loss).backward()
    assert apart(loss, want) < tolerance
    for mine, reference, other in zip(ours, exact, exact[::-1], strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype is dtype
        # A token that is nearly certain has the gradient p - 1: what is left of p's rounding there
        # is not small beside the gradient, but beside the weights that multiply it.
        rounding = 4 * torch.finfo(torch.float32).eps * 3 * multiplier * other.detach().norm()
        error = (mine.grad.double().cpu() - reference.grad).norm()
        assert error < tolerance * reference.grad.norm() + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_rows", [1, 5, 37, 100])
def test_value_and_gradients_whatever_the_chunk(
    device: str, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(subject.CHUNK_BYTES, device, chunk_rows * 5003 * 4)
    assert_equal_to_reference(inputs(37, 16, 5003), 0.5, device, torch.float32, 2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_types(dtype: torch.dtype, tolerance: float) -> None:
    assert_equal_to_reference(inputs(40, 8, 300), 1.0, "cpu", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [50304, 50259])
@pytest.mark.parametrize("chunk_rows", [16, 1000])
def test_bfloat16_on_a_gpu(
    chunk_rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(subject.CHUNK_BYTES, "cuda", chunk_rows * vocabulary * 2)
    assert_equal_to_reference(inputs(256, 64, vocabulary), 1.0, "cuda", torch.bfloat16, 2e-2)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 12),
    vocabulary=st.integers(2, 400),
    multiplier=st.sampled_from([0.25, 1.0]),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens: int, width: int, vocabulary: int, multiplier: float, seed: int) -> None:
    case = inputs(tokens, width, vocabulary, seed)
    assert_equal_to_reference(case, multiplier, "cpu", torch.float32, 1e-4)


def test_large_logits_do_not_overflow() -> None:
    hidden, head, target = inputs(8, 4, 50)
    assert_equal_to_reference((1e3 * hidden, head, target), 1.0, "cpu", torch.float32, 1e-4)


def test_without_gradients_nothing_is_kept() -> None:
    hidden, head, target = inputs(8, 4, 50)
    with torch.no_grad():
        loss = head_loss(hidden.requires_grad_(), head, target, 1.0)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(F.cross_entropy(hidden @ head.t(), target).item(), rel=1e-5)


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = subject._cross_entropy_rows

    def spy(logits_CV: Tensor, *others: object) -> Tensor:
        rows.append(len(logits_CV))
        return original(logits_CV, *others)

    monkeypatch.setattr(subject, "_cross_entropy_rows", spy)
    monkeypatch.setitem(subject.CHUNK_BYTES, "cpu", 10 * 50 * 4)
    head_loss(*inputs(24, 4, 50), 1.0)
    assert rows == [10, 10, 4]
