"""The experts computation against a float64 dense reference: values and all four gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.model.experts import resident_experts

TOKENS, WIDTH, EXPERT_WIDTH = 24, 16, 8


Form = tuple[Callable[[Tensor], Tensor], bool]
FORMS: dict[str, Form] = {
    "gated SiLU": (F.silu, True),
    "plain SiLU": (F.silu, False),
    "plain ReLU": (F.relu, False),
    "gated GELU": (F.gelu, True),
}
"""Activation, and whether an expert is W2 (act(Wg x) * Wu x) or W2 act(W1 x)."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


def dense_reference(
    x: Tensor,
    slot: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    has_gate: bool,
) -> Tensor:
    """Run every resident on every token and keep what was chosen; ghosts have no resident."""
    num_residents = up.shape[0]
    gates = torch.zeros(len(x), num_residents + 1, dtype=x.dtype)
    gates = gates.scatter_add(1, slot, weight)[:, :num_residents]
    inner = torch.einsum("td,rfd->trf", x, up)
    if has_gate:
        gate, up = inner.chunk(2, -1)
        inner = act(gate) * up
    else:
        inner = act(inner)
    y = torch.einsum("trf,rdf->trd", inner, down)
    return (y * gates[..., None]).sum(1)


def case(num_residents: int, slot: Tensor, seed: int = 0, has_gate: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        draw(len(slot), WIDTH),
        slot,
        draw(*slot.shape).sigmoid(),
        draw(num_residents, (1 + has_gate) * EXPERT_WIDTH, WIDTH) / WIDTH**0.5,
        draw(num_residents, WIDTH, EXPERT_WIDTH) / EXPERT_WIDTH**0.5,
    ]


def assert_equal_to_reference(num_residents: int, slot: Tensor, form: Form, seed: int = 0) -> None:
    exact = case(num_residents, slot, seed, has_gate=form[1])
    single = [t.float() if t.is_floating_point() else t for t in exact]
    probe = torch.randn(len(slot), WIDTH, generator=torch.Generator().manual_seed(9))
    results = []
    for function, inputs in ((dense_reference, exact), (resident_experts, single)):
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        out = function(*leaves, *form)
        (out * probe.to(out.dtype)).sum().backward()
        grads = [t.grad for t in leaves if t.is_floating_point()]
        assert all(g is not None for g in grads)
        results.append([out.detach(), *grads])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def random_slots(num_residents: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Choose distinct experts per token; those past `num_residents` are ghosts."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(TOKENS, num_experts, generator=generator).topk(top_k).indices
    return chosen.clamp(max=num_residents)


@pytest.mark.parametrize(("num_residents", "num_experts"), [(8, 8), (4, 8), (1, 8), (7, 8)])
def test_some_ghosts(num_residents: int, num_experts: int, form: Form) -> None:
    assert_equal_to_reference(num_residents, random_slots(num_residents, num_experts, 3, 1), form)


def test_residents_that_nobody_chose(form: Form) -> None:
    assert_equal_to_reference(5, torch.full((TOKENS, 1), 3), form)


def test_tokens_of_which_every_choice_is_a_ghost(form: Form) -> None:
    slot = random_slots(4, 8, 2, 3)
    slot[::2] = 4
    assert_equal_to_reference(4, slot, form)


def test_nothing_resident_in_the_batch_gives_zeros_and_zero_gradients(form: Form) -> None:
    assert_equal_to_reference(4, torch.full((TOKENS, 2), 4), form)


def test_one_expert_takes_nearly_all(form: Form) -> None:
    slot = torch.zeros(TOKENS, 2, dtype=torch.long)
    slot[:, 1] = 4
    slot[-1] = torch.tensor([3, 2])
    assert_equal_to_reference(4, slot, form)


@settings(max_examples=40, deadline=None)
@given(
    num_residents=st.integers(1, 6),
    num_ghosts=st.integers(0, 4),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 1000),
    form=st.sampled_from(sorted(FORMS)),
)
def test_any_case(num_residents: int, num_ghosts: int, top_k: int, seed: int, form: str) -> None:
    num_experts = num_residents + num_ghosts
    slot = random_slots(num_residents, num_experts, min(top_k, num_experts), seed)
    assert_equal_to_reference(num_residents, slot, FORMS[form], seed)


def test_a_ghost_costs_no_row() -> None:
    """The gathered rows are the resident assignments, not all assignments."""
    seen = []
    original = F.grouped_mm

    def spy(a: Tensor, b: Tensor, **kwargs: Tensor) -> Tensor:
        seen.append(len(a))
        return original(a, b, **kwargs)

    slot = random_slots(2, 8, 3, 5)
    inputs = [t.float() if t.is_floating_point() else t for t in case(2, slot)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "grouped_mm", spy)
        resident_experts(*inputs)
    assert seen == [int((slot < 2).sum())] * 2
