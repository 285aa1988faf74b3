"""The outer step against torch's own SGD, key by key and expert by expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import OuterSettings
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec

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


GATE = "model.layers.0.mlp.gate.weight"
ROUTED = StateSpec(
    shared=(Entry("embed", (2,), None), Entry(GATE, (3, 1), None)),
    expert=(Entry("model.layers.0.mlp.experts.w", (3, 1), 0),),
    num_layers=1,
    num_experts=3,
)
EXPERT = ROUTED.expert[0].key


def folded(*replies: tuple[list[float], list[float], list[int]], rows: str = "all") -> HolderMean:
    """Fold (shared vector, expert rows, residents) with equal weights."""
    mean = HolderMean(ROUTED, rows)
    for shared, experts, held in replies:
        mean.fold(torch.tensor(shared), torch.tensor(experts), [held], 1.0)
    return mean


def zeros() -> dict[str, Tensor]:
    return {e.key: torch.zeros(e.shape) for e in (*ROUTED.shared, *ROUTED.expert)}


THREE = (
    ([1.0, 2.0, 3.0, 6.0, 9.0], [4.0, 8.0], [0, 1]),
    ([1.0, 2.0, 3.0, 6.0, 9.0], [16.0], [1]),
    ([4.0, 8.0, 0.0, 0.0, 0.0], [2.0], [1]),
)
"""Experts 0, 1, 2 have 1, 3 and no holders; their means are 4 and 26/3."""


def test_experts_have_a_rate_of_their_own() -> None:
    state = zeros()
    OuterStep(OuterSettings("average", lr=0.5, expert_lr=0.25)).apply(state, folded(*THREE))
    assert state["embed"].tolist() == [-0.5 * 2.0, -0.5 * 4.0]
    torch.testing.assert_close(
        state[EXPERT].flatten(), torch.tensor([-0.25 * 4.0, -0.25 * 26 / 3, 0.0])
    )
    # The router is shared here, and so is its rate.
    assert state[GATE].flatten().tolist() == [-1.0, -2.0, -3.0]


def test_an_expert_rate_of_zero_means_the_common_one() -> None:
    state, common = zeros(), zeros()
    OuterStep(OuterSettings("average", lr=0.5, expert_lr=0.0)).apply(state, folded(*THREE))
    OuterStep(OuterSettings("average", lr=0.5, expert_lr=0.5)).apply(common, folded(*THREE))
    assert_identical(state, common)


@pytest.mark.parametrize("rows", ["all", "holders"])
def test_every_mean_grows_by_the_root_of_its_own_replies(rows: str) -> None:
    state = zeros()
    OuterStep(OuterSettings("average", lr=1.0, sqrt_holders=True)).apply(
        state, folded(*THREE, rows=rows)
    )
    root = 3**0.5
    torch.testing.assert_close(state["embed"], torch.tensor([-2.0 * root, -4.0 * root]))
    # One reply for expert 0, three for expert 1: not one factor for all.
    torch.testing.assert_close(state[EXPERT].flatten(), torch.tensor([-4.0, -26 / 3 * root, 0.0]))
    gate = {"all": [-2.0 * root, -4.0 * root, -6.0 * root], "holders": [-3.0, -4.0 * root, 0.0]}
    torch.testing.assert_close(state[GATE].flatten(), torch.tensor(gate[rows]))


def test_the_root_enters_the_momentum_as_well() -> None:
    step, state = (
        OuterStep(OuterSettings("nesterov", 0.5, momentum=0.5, sqrt_holders=True)),
        zeros(),
    )
    step.apply(state, folded(*THREE))
    grown = 2.0 * 3**0.5
    assert step.momentum["embed"][0].item() == pytest.approx(grown)
    assert state["embed"][0].item() == pytest.approx(-0.5 * (grown + 0.5 * grown))


def test_averaged_moments_replace_only_what_was_returned() -> None:
    step = OuterStep(OuterSettings("local_adamw"))
    step.average_moment("exp_avg", folded(*THREE), zeros())
    first = {key: value.clone() for key, value in step.moments["exp_avg"].items()}
    assert first["embed"].tolist() == [2.0, 4.0]
    torch.testing.assert_close(first[EXPERT].flatten(), torch.tensor([4.0, 26 / 3, 0.0]))
    assert step.moments["exp_avg_sq"] == {}
    step.average_moment("exp_avg", folded(([7.0] * 5, [5.0], [2])), zeros())
    second = step.moments["exp_avg"]
    # A mean, not a step: no memory of what was there before ...
    assert second["embed"].tolist() == [7.0, 7.0]
    # ... except where nobody replied.
    assert torch.equal(second[EXPERT][:2], first[EXPERT][:2])
    assert second[EXPERT][2].item() == 5.0


def test_averaged_moments_leave_the_weights_alone() -> None:
    state = initial()
    step = OuterStep(OuterSettings("local_adamw"))
    step.average_moment("exp_avg_sq", one_reply(ALL, 0), state)
    assert_identical(state, initial())
    step.moments["exp_avg_sq"]["embed"].zero_()
    assert_identical(state, initial())


def test_moments_survive_tensors_and_restore() -> None:
    outer = OuterSettings("des_loc")
    step, state = OuterStep(outer), initial()
    step.average_moment("exp_avg", one_reply(ALL, 0), state)
    step.average_moment("exp_avg_sq", one_reply(((0, 2), (1,)), 1), state)
    stored = {key: value.clone() for key, value in step.tensors().items()}
    keys = [entry.key for entry in (*SPEC.shared, *SPEC.expert)]
    assert sorted(stored) == sorted(f"{m}/{key}" for m in ("exp_avg", "exp_avg_sq") for key in keys)
    again = OuterStep(outer)
    again.restore(step.tensors())
    for each in (step, again):
        each.average_moment("exp_avg", one_reply(((1,), ()), 2), state)
    assert_identical(again.tensors(), step.tensors())
    assert not torch.equal(again.tensors()["exp_avg/embed"], stored["exp_avg/embed"])
    assert torch.equal(again.tensors()[f"exp_avg_sq/{DOWN}"], stored[f"exp_avg_sq/{DOWN}"])


@pytest.mark.parametrize("num_fragments", [2, 3])
def test_momentum_on_fragments_is_momentum_on_the_whole(num_fragments: int) -> None:
    """A whole synchronisation cut into F parts, one after another, is the same synchronisation."""
    spec = replace(
        SPEC, shared=(Entry("embed", (7, 2), None), Entry("norm", (2,), None)), num_layers=2
    )
    outer = OuterSettings("nesterov", lr=0.7, momentum=0.9)
    entries = (*spec.shared, *spec.expert)
    start = {
        e.key: torch.randn(e.shape, generator=torch.Generator().manual_seed(3)) for e in entries
    }
    whole, cut = OuterStep(outer), OuterStep(outer)
    states = [{key: value.clone() for key, value in start.items()} for _ in range(2)]
    for turn, held in enumerate([ALL, ((0, 1), (2,)), ALL]):
        generator = torch.Generator().manual_seed(turn)
        sent = {e.key: torch.randn(e.shape, generator=generator) for e in entries}
        for step, state, parts in (
            (whole, states[0], [spec]),
            (cut, states[1], [spec.fragment(f, num_fragments) for f in range(num_fragments)]),
        ):
            for part in parts:
                mean = HolderMean(part)
                mean.fold(part.pack_shared(sent), part.pack_experts(sent, held), held, 1.0)
                step.apply(state, mean)
    assert_identical(states[1], states[0])
    assert_identical(cut.tensors(), whole.tensors())
    assert not any(torch.equal(states[0][key], value) for key, value in start.items())


def test_moments_of_fragments_fill_the_whole_row_by_row() -> None:
    spec = replace(SPEC, shared=(Entry("embed", (5, 2), None),))
    step = OuterStep(OuterSettings("local_adamw", fragments=2))
    state = {e.key: torch.zeros(e.shape) for e in (*spec.shared, *spec.expert)}
    for fragment, expected in ((0, [1, 1, 0, 0, 0]), (1, [1, 1, 2, 2, 2])):
        part, held = spec.fragment(fragment, 2), ALL
        mean = HolderMean(part)
        value = float(fragment + 1)
        shared, experts = part.shared_size, part.experts_size(held)
        mean.fold(torch.full((shared,), value), torch.full((experts,), value), held, 1.0)
        step.average_moment("exp_avg", mean, state)
        assert step.moments["exp_avg"]["embed"][:, 0].tolist() == expected
    assert step.moments["exp_avg"][UP].eq(1).all()
    assert step.moments["exp_avg"][DOWN].eq(2).all()
