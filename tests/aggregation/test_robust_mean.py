"""Trimmed mean and median over holders, against their definition, and against liars."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.robust_mean import RobustMean
from fomoe_flwr.codecs.slabs import SLAB
from fomoe_flwr.config import SettingsError, load_settings
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec

EXPERTS, LAYERS = 4, 2
SPEC = StateSpec(
    shared=(
        Entry("embed", (3, 2), None),
        Entry("model.layers.1.mlp.gate.weight", (EXPERTS, 2), None),
    ),
    expert=(
        Entry("model.layers.0.mlp.experts.up", (EXPERTS, 2, 3), 0),
        Entry("model.layers.1.mlp.experts.up", (EXPERTS, 5), 1),
    ),
    num_layers=LAYERS,
    num_experts=EXPERTS,
)
ROUTER = "model.layers.1.mlp.gate.weight"
Reply = tuple[Tensor, Tensor, Residents]

residents = st.lists(
    st.sets(st.integers(0, EXPERTS - 1)).map(lambda held: tuple(sorted(held))),
    min_size=LAYERS,
    max_size=LAYERS,
).map(tuple)


def reply(held: Residents, seed: int) -> Reply:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(SPEC.shared_size, generator=generator),
        torch.randn(SPEC.experts_size(held), generator=generator),
        held,
    )


def settled(replies: list[Reply], trim: float, folder: Path, rows: str = "all") -> RobustMean:
    mean = RobustMean(SPEC, rows, trim, folder)
    for each in replies:
        mean.fold(*each, 1.0)
    mean.settle()
    return mean


def center(copies: list[Tensor], trim: float) -> Tensor:
    """The definition: numpy's median, or the mean without the largest and smallest."""
    stacked = np.stack([c.double().numpy() for c in copies])
    if trim == 0.5:
        return torch.from_numpy(np.median(stacked, 0))
    cut = int(trim * len(copies))
    return torch.from_numpy(np.sort(stacked, 0)[cut : len(copies) - cut].mean(0))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    held=st.lists(residents, min_size=1, max_size=7),
    trim=st.sampled_from([0.1, 0.25, 0.34, 0.5]),
    rows=st.sampled_from(["all", "holders"]),
    seed=st.integers(0, 99),
)
def test_every_key_is_centred_over_its_holders(
    held: list[Residents], trim: float, rows: str, seed: int, tmp_path: Path
) -> None:
    replies = [reply(h, seed + i) for i, h in enumerate(held)]
    mean = settled(replies, trim, tmp_path, rows)
    shared = mean.shared_means()
    want = SPEC.split_shared(center([r[0] for r in replies], trim).float())
    assert shared.keys() == (want.keys() if rows == "all" else want.keys() - {ROUTER})
    for key, value in shared.items():
        torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-6)
    for entry in mean.row_entries:
        layer = 0 if ".0." in entry.key else 1
        for expert in range(EXPERTS):
            copies = []
            for vector, experts, h in replies:
                if expert in h[layer]:
                    place = h[layer].index(expert)
                    is_router = entry.key == ROUTER
                    pieces = (
                        SPEC.split_shared(vector) if is_router else SPEC.split_experts(experts, h)
                    )
                    copies.append(pieces[entry.key][expert if is_router else place])
            if copies:
                got = mean.rows[entry.key][expert].double()
                torch.testing.assert_close(got, center(copies, trim), rtol=1e-5, atol=1e-6)
            else:
                assert expert not in mean.returned(layer).tolist()


def test_counts_are_those_of_the_plain_mean(tmp_path: Path) -> None:
    held = [((0, 1), (2,)), ((1, 2), (2, 3)), ((1,), ())]
    replies = [reply(h, i) for i, h in enumerate(held)]
    robust, plain = settled(replies, 0.5, tmp_path), HolderMean(SPEC)
    for each in replies:
        plain.fold(*each, 1.0)
    assert robust.missing_experts() == plain.missing_experts()
    assert torch.equal(robust.expert_count, plain.expert_count)
    assert torch.equal(robust.disagreement(), plain.disagreement())


@pytest.mark.parametrize(("trim", "liars"), [(0.25, 2), (0.5, 3)])
def test_liars_cannot_leave_the_range_of_the_honest(
    trim: float, liars: int, tmp_path: Path
) -> None:
    held: Residents = (tuple(range(EXPERTS)),) * LAYERS
    replies = [reply(held, i) for i in range(8)]
    honest = replies[liars:]
    false = [
        (1e20 * (-1) ** i * a.sign(), -1e20 * b.sign(), h) for i, (a, b, h) in enumerate(replies)
    ]
    mean = settled([*false[:liars], *honest], trim, tmp_path)
    stacked = torch.stack([shared for shared, _, _ in honest])
    assert bool((mean.shared >= stacked.amin(0)).all() and (mean.shared <= stacked.amax(0)).all())
    for entry in SPEC.expert:
        rows = torch.stack([SPEC.split_experts(e, h)[entry.key] for _, e, h in honest])
        assert bool((mean.rows[entry.key] >= rows.amin(0)).all())
        assert bool((mean.rows[entry.key] <= rows.amax(0)).all())


def test_vectors_longer_than_a_slab(tmp_path: Path) -> None:
    size = 2 * SLAB + 17
    spec = StateSpec(
        shared=(Entry("embed", (size,), None),), expert=(), num_layers=0, num_experts=0
    )
    mean = RobustMean(spec, "all", 0.5, tmp_path)
    vectors = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for vector in vectors:
        mean.fold(vector, torch.empty(0), (), 1.0)
    mean.settle()
    assert torch.equal(mean.shared, torch.stack(vectors).median(0).values)


def test_waiting_replies_lie_in_nameless_files(tmp_path: Path) -> None:
    mean = RobustMean(SPEC, "all", 0.5, tmp_path)
    mean.fold(*reply(((0,), (1,)), 0), 1.0)
    assert os.listdir(tmp_path) == []
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) in maps.read_text()
        mean.settle()
        assert str(tmp_path) not in maps.read_text()


def test_without_replies_nothing_changes(tmp_path: Path) -> None:
    mean = settled([], 0.5, tmp_path)
    assert mean.shared_means() == {}
    assert len(mean.missing_experts()) == LAYERS * EXPERTS


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["outer.robust=median"], ["outer.robust=median", "outer.weighting=tokens"]),
        (["outer.robust=krum"], ["outer.robust=krum", "trimmed_mean"]),
        (["outer.trim=0.5"], ["outer.trim=0.5", "< 0.5"]),
        (
            ["outer.robust=median", "outer.weighting=uniform", "privacy.clip_norm=1"],
            ["outer.robust=median", "privacy.clip_norm=1"],
        ),
    ],
)
def test_contradictions_are_refused(words: list[str], names: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(["preset=tiny", *words])
    assert all(name in str(error.value) for name in names)
