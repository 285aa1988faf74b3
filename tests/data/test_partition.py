from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fomoe_flwr.data import DataError
from fomoe_flwr.data.partition import partition_blocks

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=9)
KINDS = st.sampled_from(["iid", "by_domain"])


def ids_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int16)


@given(sizes=SIZES, num_workers=st.integers(1, 14), kind=KINDS, seed=st.integers(0, 2**31 - 1))
def test_parts_are_disjoint_complete_and_deterministic(
    sizes: list[int], num_workers: int, kind: str, seed: int
) -> None:
    domain_ids = ids_of(sizes)
    if len(domain_ids) < num_workers:
        with pytest.raises(DataError, match=r"layout\.num_workers"):
            partition_blocks(domain_ids, num_workers, kind, seed)
        return
    parts = partition_blocks(domain_ids, num_workers, kind, seed)
    assert len(parts) == num_workers
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(domain_ids)))
    again = partition_blocks(domain_ids, num_workers, kind, seed)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


@given(sizes=SIZES, num_workers=st.integers(1, 9), seed=st.integers(0, 99))
def test_iid_is_equal_to_one_block(sizes: list[int], num_workers: int, seed: int) -> None:
    domain_ids = ids_of([size + 1 for size in sizes] + [9])
    lengths = [len(part) for part in partition_blocks(domain_ids, num_workers, "iid", seed)]
    assert max(lengths) - min(lengths) <= 1


def test_iid_depends_on_the_seed() -> None:
    first, second = (partition_blocks(ids_of([50]), 2, "iid", seed)[0] for seed in (0, 1))
    assert first.tolist() != second.tolist()


@given(sizes=SIZES, data=st.data())
def test_fewer_workers_than_domains_get_whole_domains(
    sizes: list[int], data: st.DataObject
) -> None:
    num_workers = data.draw(st.integers(1, len(sizes)))
    domain_ids = ids_of(sizes)
    parts = partition_blocks(domain_ids, num_workers, "by_domain", 0)
    owned = [set(domain_ids[part].tolist()) for part in parts]
    assert sum(map(len, owned)) == len(sizes)
    # Graham's bound for greedy, against the mean and the largest domain that no split can beat.
    largest = max(map(len, parts))
    assert largest <= sum(sizes) / num_workers + (1 - 1 / num_workers) * max(sizes)


def test_as_many_workers_as_domains_get_one_each() -> None:
    parts = partition_blocks(ids_of([5, 9, 2]), 3, "by_domain", 0)
    assert [len(part) for part in parts] == [9, 5, 2]


@given(sizes=SIZES, extra=st.integers(1, 8))
def test_more_workers_than_domains_have_one_domain_each(sizes: list[int], extra: int) -> None:
    domain_ids = ids_of([size + 8 for size in sizes])
    num_workers = len(sizes) + extra
    parts = partition_blocks(domain_ids, num_workers, "by_domain", 3)
    owners = [set(domain_ids[part].tolist()) for part in parts]
    assert all(len(owned) == 1 for owned in owners)
    for domain in range(len(sizes)):
        lengths = [len(p) for p, o in zip(parts, owners, strict=True) if o == {domain}]
        assert max(lengths) - min(lengths) <= 1
    # No other count of shares has a smaller largest part: every domain would need too many.
    largest = max(map(len, parts))
    needed = (
        sum(-(-(size + 8) // (largest - 1)) for size in sizes) if largest > 1 else num_workers + 1
    )
    assert needed > num_workers


def test_the_largest_domain_is_split() -> None:
    parts = partition_blocks(ids_of([30, 4]), 4, "by_domain", 0)
    assert [len(part) for part in parts] == [10, 10, 10, 4]


def test_domain_ids_need_not_be_dense() -> None:
    parts = partition_blocks(np.array([7, 7, 3, 3, 3]), 2, "by_domain", 0)
    assert [part.tolist() for part in parts] == [[2, 3, 4], [0, 1]]


@pytest.mark.parametrize(
    ("num_workers", "kind", "expected"),
    [
        (0, "iid", r"layout\.num_workers=0"),
        (4, "iid", r"layout\.num_workers=4 needs at least 4 blocks, the corpus has 3"),
        (4, "by_domain", r"needs at least 4 blocks"),
        (2, "dirichlet", r"data\.partition='dirichlet' is unknown"),
    ],
)
def test_impossible_partitions_are_refused(num_workers: int, kind: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        partition_blocks(ids_of([2, 1]), num_workers, kind, 0)
