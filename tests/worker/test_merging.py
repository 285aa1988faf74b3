"""Merging: alpha of a worker's own weights, the rest of what it is given."""

from __future__ import annotations

import pytest
import torch
from micro import SEQUENCE, micro_model
from torch import Tensor

from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.worker.merging import merge, merged

MODEL = micro_model(num_experts=6)
SPEC = StateSpec.of(MODEL, transformers_config(MODEL, SEQUENCE))
BEFORE: Residents = ((0, 2, 4), (1, 2, 3))


def slice_of(residents: Residents, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def shape(entry: Entry) -> tuple[int, ...]:
        rows = entry.shape[:1] if entry.layer is None else (len(residents[entry.layer]),)
        return (*rows, *entry.shape[1:])

    entries = (*SPEC.shared, *SPEC.expert)
    return {entry.key: torch.randn(shape(entry), generator=generator) for entry in entries}


@pytest.mark.parametrize("own_share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(
    "now", [BEFORE, ((0, 1, 4), (1, 2, 3)), ((1, 3, 5), (2, 4)), ((4, 5), (0, 1, 2, 3, 4, 5))]
)
def test_every_row_is_mixed_with_the_same_experts_row(now: Residents, own_share: float) -> None:
    own, given = slice_of(BEFORE, 1), slice_of(now, 2)
    found = merged(own, BEFORE, SPEC, given, now, own_share)
    for entry in (*SPEC.shared, *SPEC.expert):
        key = entry.key
        if entry.layer is None:
            want = own_share * own[key] + (1 - own_share) * given[key]
            torch.testing.assert_close(found[key], want)
            continue
        for row, expert in enumerate(now[entry.layer]):
            want = given[key][row]
            if expert in BEFORE[entry.layer]:
                mine = own[key][list(BEFORE[entry.layer]).index(expert)]
                want = own_share * mine + (1 - own_share) * want
            torch.testing.assert_close(found[key][row], want)


@pytest.mark.parametrize("fragment", [0, 1])
def test_the_rest_of_a_fragment_stays(fragment: int) -> None:
    part = SPEC.fragment(fragment, 2)
    current, before, given = slice_of(BEFORE, 1), slice_of(BEFORE, 1), slice_of(BEFORE, 2)
    pieces = {e.key: e.of(given) for e in (*part.shared, *part.expert)}
    merge(current, part, pieces, 0.5)
    touched = 0
    for entry in (*part.shared, *part.expert):
        want = 0.5 * entry.of(before) + 0.5 * entry.of(given)
        torch.testing.assert_close(entry.of(current), want)
        touched += want.numel()
    changed = sum(int((current[key] != before[key]).sum()) for key in current)
    assert changed == touched < sum(value.numel() for value in current.values())


def test_without_an_own_share_the_bits_are_those_given() -> None:
    own, given = slice_of(BEFORE, 1), slice_of(BEFORE, 2)
    for value in own.values():
        value.fill_(float("inf"))
    found = merged(own, BEFORE, SPEC, given, BEFORE, 0.0)
    assert all(torch.equal(found[key], given[key]) for key in given)
