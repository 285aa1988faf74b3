"""The experts computation against a float64 dense reference: values and all four gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.model.experts import CORES, resident_experts
from fomoe_flwr.model.experts.form import Form

TOKENS, WIDTH, EXPERT_WIDTH = 24, 16, 8


def clamped(inner: Tensor) -> Tensor:
    """Mix rows as gpt-oss does: gate and rest interleaved, both clamped."""
    gate, up = inner[..., ::2].clamp(max=1.0), inner[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


@dataclass(frozen=True)
class Kind:
    """A form of experts, as a class of transformers would have it."""

    act: Callable[[Tensor], Tensor]
    has_gate: bool = True
    is_transposed: bool = False
    has_bias: bool = False

    @property
    def form(self) -> Form:
        if self.act is clamped:
            return Form(clamped, True, self.is_transposed)
        return Form.of(self.act, self.has_gate, self.is_transposed)

    def activate(self, inner: Tensor) -> Tensor:
        if self.act is clamped or not self.has_gate:
            return self.act(inner)
        gate, up = inner.chunk(2, -1)
        return self.act(gate) * up


FORMS = {
    "gated SiLU": Kind(F.silu),
    "plain SiLU": Kind(F.silu, has_gate=False),
    "plain ReLU": Kind(F.relu, has_gate=False),
    "gated GELU": Kind(F.gelu),
    "transposed": Kind(F.silu, is_transposed=True),
    "biased": Kind(F.silu, has_bias=True),
    "gpt-oss": Kind(clamped, is_transposed=True, has_bias=True),
}


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of the norm of the difference over the norm; on a GPU products of fp32 may run in tf32."""

CASES = [
    *(pytest.param((core, "cpu", torch.float32), id=f"{core}-cpu") for core in CORES),
    *(
        pytest.param(
            (core, "cuda", dtype), id=f"{core}-cuda-{str(dtype)[6:]}", marks=pytest.mark.gpu
        )
        for core in CORES
        for dtype in TOLERANCE
    ),
]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Kind:
    return FORMS[request.param]


@dataclass(frozen=True)
class Where:
    """Core, device and type of the experts under test."""

    core: str
    device: str
    dtype: torch.dtype


@pytest.fixture(params=CASES)
def where(request: pytest.FixtureRequest) -> Where:
    core, device, dtype = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Where(core, device, dtype)


def dense_reference(
    x: Tensor, slot: Tensor, weight: Tensor, up: Tensor, down: Tensor, *biases: Tensor, kind: Kind
) -> Tensor:
    """Run every resident on every token and keep what was chosen; ghosts have no resident."""
    num_residents = up.shape[0]
    gates = torch.zeros(len(x), num_residents + 1, dtype=x.dtype)
    gates = gates.scatter_add(1, slot, weight)[:, :num_residents]
    if kind.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias, down_bias = biases or (torch.zeros(()), torch.zeros(()))
    inner = kind.activate(torch.einsum("td,rfd->trf", x, up) + up_bias)
    y = torch.einsum("trf,rdf->trd", inner, down) + down_bias
    return (y * gates[..., None]).sum(1)


def case(
    num_residents: int, slot: Tensor, seed: int = 0, kind: Kind = Kind(F.silu)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = (1 + kind.has_gate) * EXPERT_WIDTH
    up = draw(num_residents, rows, WIDTH) / WIDTH**0.5
    down = draw(num_residents, WIDTH, EXPERT_WIDTH) / EXPERT_WIDTH**0.5
    if kind.is_transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = [draw(num_residents, rows), draw(num_residents, WIDTH)] if kind.has_bias else []
    return [draw(len(slot), WIDTH), slot, draw(*slot.shape).sigmoid(), up, down, *biases]


def assert_equal_to_reference(
    num_residents: int, slot: Tensor, form: Kind, where: Where, seed: int = 0
) -> None:
    """Compare the sum and all gradients; the reference gets the very numbers, rounded."""
    if form.act is clamped and where.dtype is torch.bfloat16:
        pytest.skip("rounding carries numbers across the clamp, where the slope jumps")
    exact = case(num_residents, slot, seed, form)
    rounded = [t.to(where.dtype) if t.is_floating_point() else t for t in exact]
    probe = torch.randn(len(slot), WIDTH, generator=torch.Generator().manual_seed(9))
    probe = probe.to(where.dtype)
    has_ghosts = bool((slot == num_residents).any())

    def ours(
        x: Tensor, slot: Tensor, weight: Tensor, up: Tensor, down: Tensor, *more: Tensor
    ) -> Tensor:
        options = {"has_ghosts": has_ghosts, "core": where.core}
        return resident_experts(x, slot, weight, up, down, form.form, *more, **options)

    results = []
    for function, inputs, device in (
        (
            partial(dense_reference, kind=form),
            [t.double() if t.is_floating_point() else t for t in rounded],
            "cpu",
        ),
        (ours, rounded, where.device),
    ):
        moved = [t.clone().to(device) for t in inputs]
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in moved]
        out = function(*leaves)
        (out * probe.to(out)).sum().backward()
        grads = [t.grad for t in leaves if t.is_floating_point()]
        assert all(g is not None for g in grads)
        results.append([out.detach(), *grads])
    for want, got in zip(*results, strict=True):
        apart = (got.double().cpu() - want).norm()
        assert apart <= TOLERANCE[where.dtype] * want.norm() + 1e-7, (want, got)


def random_slots(num_residents: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Choose distinct experts per token; those past `num_residents` are ghosts."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(TOKENS, num_experts, generator=generator).topk(top_k).indices
    return chosen.clamp(max=num_residents)


@pytest.mark.parametrize(("num_residents", "num_experts"), [(8, 8), (4, 8), (1, 8), (7, 8)])
def test_some_ghosts(num_residents: int, num_experts: int, form: Kind, where: Where) -> None:
    slot = random_slots(num_residents, num_experts, 3, 1)
    assert_equal_to_reference(num_residents, slot, form, where)


def test_residents_that_nobody_chose(form: Kind, where: Where) -> None:
    assert_equal_to_reference(5, torch.full((TOKENS, 1), 3), form, where)


def test_tokens_of_which_every_choice_is_a_ghost(form: Kind, where: Where) -> None:
    slot = random_slots(4, 8, 2, 3)
    slot[::2] = 4
    assert_equal_to_reference(4, slot, form, where)


def test_nothing_resident_in_the_batch_gives_zeros_and_zero_gradients(
    form: Kind, where: Where
) -> None:
    assert_equal_to_reference(4, torch.full((TOKENS, 2), 4), form, where)


def test_one_expert_takes_nearly_all(form: Kind, where: Where) -> None:
    slot = torch.zeros(TOKENS, 2, dtype=torch.long)
    slot[:, 1] = 4
    slot[-1] = torch.tensor([3, 2])
    assert_equal_to_reference(4, slot, form, where)


@settings(max_examples=40, deadline=None)
@given(
    num_residents=st.integers(1, 6),
    num_ghosts=st.integers(0, 4),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 1000),
    form=st.sampled_from(sorted(FORMS)),
    core=st.sampled_from(CORES),
)
def test_any_case(
    num_residents: int, num_ghosts: int, top_k: int, seed: int, form: str, core: str
) -> None:
    num_experts = num_residents + num_ghosts
    slot = random_slots(num_residents, num_experts, min(top_k, num_experts), seed)
    assert_equal_to_reference(
        num_residents, slot, FORMS[form], Where(core, "cpu", torch.float32), seed
    )


@pytest.mark.parametrize("core", ["autograd", "fused"])
def test_a_ghost_costs_no_row(core: str) -> None:
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
        resident_experts(*inputs, core=core)
    assert seen == [int((slot < 2).sum())] * 2
