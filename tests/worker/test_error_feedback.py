"""Error feedback: nothing is lost for good, and what is left of an expert stays the expert's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federated import Federation, assert_identical, use_made_up_data
from micro import micro
from torch import Tensor

from fomoe_flwr.codecs.vectors import decode, encode
from fomoe_flwr.config import WireSettings
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.worker.error_feedback import ErrorFeedback

SPEC = StateSpec(
    shared=(Entry("model.embed", (40, 5), None), Entry("model.layers.0.norm", (30,), None)),
    expert=(
        Entry("model.layers.0.mlp.experts.up", (4, 8, 3), 0),
        Entry("model.layers.1.mlp.experts.up", (4, 8, 3), 1),
    ),
    num_layers=2,
    num_experts=4,
)
HELD: Residents = ((0, 2), (1, 3))
LOSSY = ("int8", "int4", "topk_bfloat16", "topk_int2")


def seed(name: str) -> int:
    return len(name)


def updates(round_: int, residents: Residents = HELD) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(round_)
    return (
        torch.randn(SPEC.shared_size, generator=generator),
        torch.randn(SPEC.experts_size(residents), generator=generator),
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", LOSSY)
def test_with_decay_one_all_that_was_sent_adds_up_to_all_updates(name: str, rounding: str) -> None:
    wire = WireSettings(up=name, keep=3, feedback=1.0, rounding=rounding)
    feedback = ErrorFeedback(wire, SPEC, HELD)
    sent, wanted = torch.zeros(SPEC.shared_size), torch.zeros(SPEC.shared_size)
    codec = wire.codecs_up.shared
    for round_ in range(10):
        shared, experts = updates(round_)
        corrected, _ = feedback.correct(SPEC, shared, experts, seed)
        sent += decode(encode(corrected, codec, seed("shared")), codec, len(corrected))
        wanted += shared
    left = SPEC.pack_shared(feedback.left)
    assert bool(left.any())
    torch.testing.assert_close(sent + left, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_codecs_that_lose_little_leave_nothing(name: str, tmp_path: Path) -> None:
    feedback = ErrorFeedback(WireSettings(up=name), SPEC, HELD)
    shared, experts = updates(0)
    assert feedback.correct(SPEC, shared, experts, seed) == (shared, experts)
    feedback.save(tmp_path / "left.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_experts_may_have_a_codec_of_their_own() -> None:
    wire = WireSettings(up="float32", up_experts="int4")
    feedback = ErrorFeedback(wire, SPEC, HELD)
    shared, experts = updates(0)
    same, corrected = feedback.correct(SPEC, shared, experts, seed)
    assert same is shared
    assert torch.equal(corrected, experts)
    assert set(feedback.left) == {entry.key for entry in SPEC.expert}


def test_what_is_left_belongs_to_the_expert_when_residents_change(tmp_path: Path) -> None:
    path, wire = tmp_path / "left.safetensors", WireSettings(up="int4")
    before = ErrorFeedback(wire, SPEC, HELD)
    before.correct(SPEC, *updates(0), seed)
    before.save(path)
    after = ErrorFeedback(wire, SPEC, ((1, 2, 3), (3,)))
    after.restore(path)
    first, second = (entry.key for entry in SPEC.expert)
    assert torch.equal(after.left[first][1], before.left[first][1])  # expert 2
    assert not after.left[first][0].any()
    assert not after.left[first][2].any()
    assert torch.equal(after.left[second][0], before.left[second][1])  # expert 3
    assert torch.equal(after.left["model.embed"], before.left["model.embed"])
    assert bool(before.left[first].any())


def test_a_fragment_changes_only_what_it_carries() -> None:
    feedback = ErrorFeedback(WireSettings(up="int4"), SPEC, HELD)
    feedback.correct(SPEC, *updates(0), seed)
    before = {key: value.clone() for key, value in feedback.left.items()}
    part = SPEC.fragment(1, 2)
    feedback.correct(
        part, torch.randn(part.shared_size), torch.randn(part.experts_size(HELD)), seed
    )
    changed = {key for key, value in feedback.left.items() if not torch.equal(value, before[key])}
    assert changed == {"model.embed", "model.layers.1.mlp.experts.up"}
    assert torch.equal(feedback.left["model.embed"][:20], before["model.embed"][:20])


def test_an_update_that_is_not_finite_does_not_spoil_what_is_left() -> None:
    feedback = ErrorFeedback(WireSettings(up="int4"), SPEC, HELD)
    feedback.correct(SPEC, *updates(0), seed)
    before = {key: value.clone() for key, value in feedback.left.items()}
    shared, experts = updates(1)
    shared[3] = float("nan")
    experts[3] = float("inf")
    feedback.correct(SPEC, shared, experts, seed)
    assert_identical(feedback.left, before)


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("up", ["int4", "topk_int2"])
def test_a_run_that_stops_and_goes_on_is_the_run(
    up: str, fragments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers find on their disks what codecs left behind; layouts move in between."""
    use_made_up_data(monkeypatch)
    words = [f"wire.up={up}", "wire.feedback=0.95", "layout=random", "layout.overlap=2"]
    settings = micro(*words, f"outer.fragments={fragments}", "rounds=4", "wire.rounding=stochastic")
    whole = Federation(settings, tmp_path / "whole").run()
    halves = Federation(settings, tmp_path / "halves")
    halves.strategy.start(halves.grid, num_rounds=2)
    later = Federation(settings, tmp_path / "halves")
    for key, value in halves.state.items():
        later.state[key].copy_(value)
    later.strategy.first_round = 3
    later.strategy.load_state_dict(halves.strategy.state_dict())
    later.run()
    assert_identical(later.state, whole.state)
    forgetful = Federation(micro(*words, "wire.feedback=0.0", "rounds=4"), tmp_path / "none").run()
    assert any(not torch.equal(forgetful.state[k], v) for k, v in whole.state.items())
