"""Limits by the median: who is scaled, to what, and what a minority can do."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.aggregation.norm_limits import NormLimits
from fomoe_flwr.config import SettingsError, load_settings


def vectors(shared: float, experts: float, num_experts: int = 7) -> tuple[Tensor, Tensor]:
    """Return vectors whose root mean squares are the given numbers."""
    return torch.full((5,), shared), torch.full((num_experts,), experts)


def after(replies: list[tuple[float, float]], factor: float = 2.0) -> NormLimits:
    """Return the limits after a round of these replies."""
    limits = NormLimits(factor)
    for reply in replies:
        limits.fit("update", vectors(*reply))
    limits.close_round()
    return limits


def test_each_part_is_held_to_its_own_median() -> None:
    limits = after([(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)])
    for shared, experts, want in (
        (3.9, 39.0, (3.9, 39.0)),
        (8.0, 39.0, (4.0, 39.0)),
        (1.0, 1e9, (1.0, 40.0)),
        (1.0, 1e30, (1.0, 0.0)),
    ):
        fitted, is_clipped = limits.fit("update", vectors(shared, experts))
        assert [float(v[0]) for v in fitted] == pytest.approx(want)
        assert is_clipped == (want != (shared, experts))


def test_the_number_of_residents_does_not_matter() -> None:
    limits = after([(1.0, 1.0)] * 3)
    for num_experts in (1, 1000):
        assert not limits.fit("update", vectors(1.0, 1.9, num_experts))[1]
        assert limits.fit("update", vectors(1.0, 2.1, num_experts))[1]


def test_nothing_is_scaled_before_there_is_something_to_compare_with() -> None:
    limits = NormLimits(2.0)
    assert not limits.fit("update", vectors(1e6, 1e6))[1]
    limits.close_round()
    assert not limits.fit("moment", vectors(1e9, 1e9))[1]
    assert not limits.fit("update", vectors(1.0, 1.0))[1]


def test_a_worker_without_experts_says_nothing_about_their_size() -> None:
    limits = after([(1.0, 1.0), (1.0, 1.0)])
    fitted, is_clipped = limits.fit("update", (torch.ones(5), torch.empty(0)))
    assert not is_clipped
    assert fitted[1].numel() == 0


def test_zero_believes_all_sizes_and_remembers_nothing() -> None:
    limits = after([(1.0, 1.0)], factor=0.0)
    sent = vectors(1e30, 1e30)
    fitted, is_clipped = limits.fit("update", sent)
    assert fitted is sent
    assert not is_clipped
    assert limits.to_json() == {}


def test_a_round_without_replies_keeps_the_limits() -> None:
    limits = after([(1.0, 1.0)])
    limits.close_round()
    assert limits.fit("update", vectors(3.0, 1.0))[1]


def test_a_checkpoint_keeps_the_limits() -> None:
    limits, restored = after([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]), NormLimits(2.0)
    restored.restore(json.loads(json.dumps(limits.to_json())))
    sent = vectors(100.0, 100.0)
    for mine, other in zip(
        limits.fit("update", sent)[0], restored.fit("update", sent)[0], strict=True
    ):
        assert torch.equal(mine, other)


@given(
    honest=st.lists(st.floats(0.5, 2.0), min_size=3, max_size=9),
    liars=st.lists(st.floats(0.0, 1e15), max_size=4),
    factor=st.floats(1.0, 5.0),
)
def test_a_minority_cannot_move_the_limit_beyond_the_honest(
    honest: list[float], liars: list[float], factor: float
) -> None:
    liars = liars[: (len(honest) - 1) // 2]
    limits = after([(size, size) for size in honest + liars], factor)
    fitted, _ = limits.fit("update", vectors(1e18, 1e18))
    for part in fitted:
        size = float(part[0])
        assert min(honest) * factor * 0.999 <= size <= max(honest) * factor * 1.001


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["outer.clip_to_median=0.5"], ["outer.clip_to_median=0.5", "0 or >= 1"]),
        (["outer.clip_to_median=-1"], ["outer.clip_to_median=-1"]),
        (
            ["outer.clip_to_median=2", "privacy.clip_norm=1", "outer.weighting=uniform"],
            ["outer.clip_to_median=2", "privacy.clip_norm=1"],
        ),
    ],
)
def test_contradictions_are_refused(words: list[str], names: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(["preset=tiny", *words])
    assert all(name in str(error.value) for name in names)
