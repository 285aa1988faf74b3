"""The outer step against torch's own SGD, key by key and expert by expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.aggregation import HolderMean
from fomoe_flwr.config import OuterSettings
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.outer import OuterStep

EXPERTS, ROUNDS = 4, 5
UP, DOWN = "model.layers.0.mlp.experts.up", "model.layers.1.mlp.experts.down"
SPEC = StateSpec(
    shared=(Entry("embed", (3, 2), None), Entry("norm", (2,), None)),
    expert=(Entry(UP, (EXPERTS, 2, 3), 0), Entry(DOWN, (EXPERTS, 2), 1)),
    num_layers=2,
    num_experts=EXPERTS,
)
ALL = (tuple(range(EXPERTS)),) * 2
SETTINGS = [
    OuterSettings("average", lr=1.0),
    OuterSettings("average", lr=0.7),
    OuterSettings("nesterov", lr=0.7, momentum=0.9),
    OuterSettings("nesterov", lr=1.0, momentum=0.0),
]
RESIDENTS = st.tuples(
    *[st.sets(st.integers(0, EXPERTS - 1)).map(lambda held: tuple(sorted(held)))] * 2
)


def initial(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    entries = (*SPEC.shared, *SPEC.expert)
    return {entry.key: torch.randn(entry.shape, generator=generator) for entry in entries}


def one_reply(residents: Residents, seed: int) -> HolderMean:
    generator = torch.Generator().manual_seed(seed)
    mean = HolderMean(SPEC)
    mean.fold(
        torch.randn(SPEC.shared_size, generator=generator),
        torch.randn(SPEC.experts_size(residents), generator=generator),
        residents,
        1.0,
    )
    return mean


class TorchReference:
    """One parameter and one torch SGD for every shared key and every single expert."""

    def __init__(self, state: dict[str, Tensor], outer: OuterSettings) -> None:
        self.leaves: dict[tuple[str, int | None], Tensor] = {}
        for entry in SPEC.shared:
            self.leaves[entry.key, None] = state[entry.key].clone()
        for entry in SPEC.expert:
            for expert in range(EXPERTS):
                self.leaves[entry.key, expert] = state[entry.key][expert].clone()
        nesterov = outer.name == "nesterov" and outer.momentum > 0
        self.optimizers = {
            place: torch.optim.SGD(
                [leaf],
                lr=outer.lr,
                momentum=outer.momentum if nesterov else 0.0,
                nesterov=nesterov,
            )
            for place, leaf in self.leaves.items()
        }

    def apply(self, mean: HolderMean) -> None:
        for key, gradient in mean.shared_means().items():
            self._step((key, None), gradient)
        for entry in SPEC.expert:
            for expert in mean.returned(entry.layer or 0).tolist():
                self._step((entry.key, expert), mean.rows[entry.key][expert])

    def _step(self, place: tuple[str, int | None], gradient: Tensor) -> None:
        self.leaves[place].grad = gradient.clone()
        self.optimizers[place].step()

    def state(self) -> dict[str, Tensor]:
        shared = {entry.key: self.leaves[entry.key, None] for entry in SPEC.shared}
        return shared | {
            entry.key: torch.stack([self.leaves[entry.key, e] for e in range(EXPERTS)])
            for entry in SPEC.expert
        }


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=atol)


def assert_identical(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.parametrize("outer", SETTINGS, ids=str)
def test_five_rounds_equal_torch_sgd(outer: OuterSettings) -> None:
    state, step = initial(), OuterStep(outer)
    reference = TorchReference(state, outer)
    for server_round in range(ROUNDS):
        mean = one_reply(ALL, server_round)
        reference.apply(mean)
        step.apply(state, mean)
    assert_close(state, reference.state())


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(0.01, 2.0),
    momentum=st.floats(0.0, 0.99),
    rounds=st.lists(RESIDENTS, min_size=ROUNDS, max_size=ROUNDS),
)
def test_any_rates_and_holders_equal_torch_sgd(
    lr: float, momentum: float, rounds: list[Residents]
) -> None:
    outer = OuterSettings("nesterov", lr=lr, momentum=momentum)
    state, step = initial(), OuterStep(outer)
    reference = TorchReference(state, outer)
    for server_round, residents in enumerate(rounds):
        mean = one_reply(residents, server_round)
        reference.apply(mean)
        step.apply(state, mean)
    assert_close(state, reference.state(), atol=2e-5)


def test_experts_without_a_reply_keep_value_and_momentum_exactly() -> None:
    state, step = initial(), OuterStep(OuterSettings("nesterov", lr=0.7, momentum=0.9))
    step.apply(state, one_reply(ALL, 0))
    before = {key: value.clone() for key, value in state.items()}
    velocity = {key: value.clone() for key, value in step.tensors().items()}
    step.apply(state, one_reply(((1, 3), ()), 1))
    for key, ghosts in ((UP, [0, 2]), (DOWN, [0, 1, 2, 3])):
        assert torch.equal(state[key][ghosts], before[key][ghosts])
        momentum = step.tensors()[f"momentum/{key}"]
        assert torch.equal(momentum[ghosts], velocity[f"momentum/{key}"][ghosts])
    assert not torch.isclose(state[UP][[1, 3]], before[UP][[1, 3]]).any()


@pytest.mark.parametrize("outer", SETTINGS, ids=str)
def test_no_reply_at_all_changes_nothing(outer: OuterSettings) -> None:
    state, step = initial(), OuterStep(outer)
    step.apply(state, HolderMean(SPEC))
    assert_identical(state, initial())


def test_average_of_one_worker_is_that_workers_weights() -> None:
    state, trained = initial(), initial(seed=1)
    mean = HolderMean(SPEC)
    mean.fold(
        SPEC.pack_shared(state) - SPEC.pack_shared(trained),
        SPEC.pack_experts(state) - SPEC.pack_experts(trained),
        ALL,
        3.0,
    )
    OuterStep(OuterSettings("average", lr=1.0)).apply(state, mean)
    assert_close(state, trained)


def test_average_keeps_no_state() -> None:
    step = OuterStep(OuterSettings("average", lr=1.0, momentum=0.9))
    step.apply(initial(), one_reply(ALL, 0))
    assert step.tensors() == {}


def test_the_state_goes_on_exactly_after_a_restore() -> None:
    outer = OuterSettings("nesterov", lr=0.7, momentum=0.9)
    state, step = initial(), OuterStep(outer)
    for server_round in range(2):
        step.apply(state, one_reply(ALL, server_round))
    stored = {key: value.clone() for key, value in state.items()}
    resumed = OuterStep(outer)
    resumed.restore({key: value.clone() for key, value in step.tensors().items()})
    for server_round in range(2, ROUNDS):
        step.apply(state, one_reply(((0, 1), (2,)), server_round))
        resumed.apply(stored, one_reply(((0, 1), (2,)), server_round))
    assert_identical(stored, state)
    assert_identical(resumed.tensors(), step.tensors())


def test_restoring_copies() -> None:
    outer = OuterSettings("nesterov", lr=0.7, momentum=0.9)
    first = OuterStep(outer)
    first.apply(initial(), one_reply(ALL, 0))
    stored = {key: value.clone() for key, value in first.tensors().items()}
    second = OuterStep(outer)
    second.restore(first.tensors())
    second.apply(initial(), one_reply(ALL, 1))
    assert_identical(first.tensors(), stored)


def test_the_step_works_in_place() -> None:
    state = initial()
    before = dict(state)
    OuterStep(OuterSettings("average", lr=1.0)).apply(state, one_reply(ALL, 0))
    assert all(state[key] is value for key, value in before.items())
