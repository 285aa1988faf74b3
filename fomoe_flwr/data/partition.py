"""The partition: which blocks of the train split are whose."""

from __future__ import annotations

import numpy as np

from fomoe_flwr.data import DataError


def partition_blocks(
    domain_ids: np.ndarray, num_workers: int, kind: str, seed: int
) -> list[np.ndarray]:
    """Return each worker's block indices: int64, sorted, disjoint, together all blocks.

    `domain_ids` has one entry per block. What the parts guarantee:

    - `iid`: a random permutation cut in equal parts; sizes differ by at most one block.
    - `by_domain` with no more workers than domains: whole domains, the largest first, each to the
      worker with the least so far. The largest part is at most 4/3 - 1/(3 num_workers) times the
      best that whole domains allow. It is not bounded by the mean: one huge domain stays whole.
    - `by_domain` with more workers than domains: each worker has one domain, and the largest
      domains are shared by several. The largest part is the smallest that this allows; parts of
      one domain differ by at most one block, those of small domains may be much smaller.

    Raises DataError if there are fewer blocks than workers or the kind is unknown.
    """
    num_blocks = len(domain_ids)
    if num_workers < 1:
        raise DataError(f"layout.num_workers={num_workers} must be at least 1")
    if num_blocks < num_workers:
        raise DataError(
            f"layout.num_workers={num_workers} needs at least {num_workers} blocks, the corpus has "
            f"{num_blocks}; lower layout.num_workers or data.sequence_length, or extend data.path"
        )
    rng = np.random.default_rng(seed)
    if kind == "iid":
        return _shares(np.arange(num_blocks), num_workers, rng)
    if kind == "by_domain":
        return _by_domain(np.asarray(domain_ids), num_workers, rng)
    raise DataError(f"data.partition={kind!r} is unknown; set it to iid or by_domain")


def _shares(blocks: np.ndarray, num_shares: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [np.sort(share) for share in np.array_split(rng.permutation(blocks), num_shares)]


def _by_domain(
    domain_ids: np.ndarray, num_workers: int, rng: np.random.Generator
) -> list[np.ndarray]:
    _, domain_of_block, sizes = np.unique(domain_ids, return_inverse=True, return_counts=True)
    blocks_of = [np.flatnonzero(domain_of_block == domain) for domain in range(len(sizes))]
    if num_workers > len(sizes):
        num_shares = np.ones(len(sizes), dtype=np.int64)
        for _ in range(num_workers - len(sizes)):
            # There are at least as many blocks as workers, so the fullest domain has one to spare.
            num_shares[np.argmax(sizes / num_shares)] += 1
        return [
            share
            for blocks, count in zip(blocks_of, num_shares, strict=True)
            for share in _shares(blocks, int(count), rng)
        ]
    load = np.zeros(num_workers, dtype=np.int64)
    parts: list[list[np.ndarray]] = [[] for _ in range(num_workers)]
    for domain in np.argsort(-sizes, kind="stable"):
        worker = int(np.argmin(load))
        load[worker] += sizes[domain]
        parts[worker].append(blocks_of[domain])
    return [np.sort(np.concatenate(part)) for part in parts]
