"""The paper's numbers: vectors of section 6 of the research, to the digits that it gives."""

from __future__ import annotations

import pytest

from fomoe_flwr import costs
from fomoe_flwr.costs import ParameterCounts

PAPER = {
    "54M": (256, 4, 8, 128, 2, 200_019),
    "150M": (512, 16, 16, 128, 4, 200_019),
    "2B": (1024, 128, 32, 128, 8, 200_019),
    "13B": (2048, 256, 64, 128, 16, 200_019),
    "100B": (4096, 512, 128, 128, 32, 200_019),
}


def counted(name: str) -> ParameterCounts:
    return costs.paper_counts(*PAPER[name])


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("54M", "1.020 1.030 1.035"),
        ("150M", "1.124 1.198 1.239"),
        ("2B", "1.421 1.800 2.076"),
        ("13B", "1.478 1.943 2.305"),
        ("100B", "1.495 1.987 2.378"),
    ],
)
@pytest.mark.parametrize("workers", [8, 16, 64])
def test_star_ratios_depend_on_the_share_of_holders_alone(
    name: str, ratios: str, workers: int
) -> None:
    counts = counted(name)
    found = [
        costs.star_ratio_full_replica(counts.shared, counts.expert, workers, workers // part)
        for part in (2, 4, 8)
    ]
    assert " ".join(f"{ratio:.3f}" for ratio in found) == ratios


@pytest.mark.parametrize(
    ("name", "total", "sparse_share"),
    [("Fig. 9", 415_029_157_888, 0.6649), ("Fig. 10", 3_639_252_992, 0.5924)],
)
def test_the_shapes_of_the_figures(name: str, total: int, sparse_share: float) -> None:
    shape = {"Fig. 9": (8192, 512, 256, 128, 64), "Fig. 10": (2048, 64, 64, 128, 16)}[name]
    counts = costs.paper_counts(*shape, vocab_size=200_019)
    assert round(counts.expert / counts.total, 4) == sparse_share
    assert counts.total == total


@pytest.mark.parametrize(("workers", "gigabytes"), [(2, 139.2), (4, 208.7), (8, 243.5)])
def test_data_parallel_bytes_of_the_proxy_s_whole_run(workers: int, gigabytes: float) -> None:
    counts = counted("54M")
    step = 4 * costs.ring_round(counts.shared, counts.expert, workers, workers)
    assert round(640 * step / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("local_steps", "diloco", "local_adamw"),
    [(32, 7.61, 22.83), (64, 3.81, 11.42), (128, 1.90, 5.71)],
)
def test_diloco_bytes_of_the_proxy_s_whole_run(
    local_steps: int, diloco: float, local_adamw: float
) -> None:
    counts = counted("54M")
    sent = 640 / local_steps * 4 * costs.ring_round(counts.shared, counts.expert, 8, 8) / 1e9
    assert round(sent, 2) == diloco
    assert round(3 * sent, 2) == local_adamw


@pytest.mark.parametrize(
    ("name", "gigabytes", "digits"),
    [
        ("2B", (32.8, 23.1, 18.2, 15.8), 1),
        ("13B", (239.9, 162.3, 123.5, 104.1), 1),
        ("100B", (1875, 1254, 944, 788), None),
    ],
)
def test_memory(name: str, gigabytes: tuple[float, ...], digits: int | None) -> None:
    counts = counted(name)
    found = [
        costs.paper_memory_bytes(counts.shared, counts.expert, 8, overlap) / 1e9
        for overlap in (8, 4, 2, 1)
    ]
    assert [round(size, digits) for size in found] == list(gigabytes)


@pytest.mark.parametrize(("experts", "exaflops"), [(2, 4.589), (1, 4.568), (0, 4.546)])
def test_flops_of_the_proxy_s_whole_run(experts: int, exaflops: float) -> None:
    counts = costs.paper_counts(256, 4, 8, 128, experts, 200_019)
    token = costs.paper_token_flops(counts.active, 4, 256, 2048)
    if experts == 2:
        assert token == pytest.approx(3.4188e8, rel=5e-6)
    # 1.3422e9 tokens: 640 steps of 1024 windows of 2048.
    assert round(token * 640 * 1024 * 2048 / 1e17, 3) == exaflops


def test_bandwidth_seconds_and_bytes_per_token_of_the_worked_example() -> None:
    counts = counted("2B")
    full = 2 * costs.ring_round(counts.shared, counts.expert, 4, 4)
    part = 2 * costs.ring_round(counts.shared, counts.expert, 4, 2, 1.0)
    # Four workers share a step of 2,097,152 tokens; 32 steps a round.
    tokens = 32 * 2_097_152 / 4
    assert (round(full / tokens), round(part / tokens)) == (325, 229)
    seconds = [round(costs.transfer_seconds(size, 1e9, 0), 1) for size in (full, part)]
    assert seconds == [43.7, 30.7]
    assert round(32 * full / 1e9, 1) == 174.7
