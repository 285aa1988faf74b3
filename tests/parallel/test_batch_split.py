"""Who computes what of a step, and how many processes a node starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro

from fomoe_flwr.config import LocalSettings, SettingsError, check
from fomoe_flwr.parallel.batch_split import BatchSplit, most_processes
from fomoe_flwr.parallel.choice import choose, num_processes
from fomoe_flwr.run.preflight import preflight

sizes = st.integers(1, 12)


def local(batch_size: int, accumulate: int, **more: object) -> LocalSettings:
    return LocalSettings(batch_size=batch_size, accumulate=accumulate, **more)  # type: ignore[arg-type]


@given(sizes, sizes, sizes)
def test_every_window_of_a_step_is_computed_once(
    batch_size: int, accumulate: int, count: int
) -> None:
    count = most_processes(local(batch_size, accumulate), count)
    deal = BatchSplit.of(local(batch_size, accumulate), count)
    seen = Counter(
        (number * deal.together + index, row)
        for number in range(deal.passes)
        for rank in range(count)
        for index, rows in [deal.place(rank)]
        for row in range(rows.start, rows.stop)
    )
    every = {(micro, row) for micro in range(accumulate) for row in range(batch_size)}
    assert seen == Counter(every)


@given(sizes, sizes, sizes)
def test_the_plain_mean_of_weighted_losses_is_the_mean_over_all_windows(
    batch_size: int, accumulate: int, count: int
) -> None:
    count = most_processes(local(batch_size, accumulate), count)
    deal = BatchSplit.of(local(batch_size, accumulate), count)
    losses = torch.rand(accumulate, batch_size, dtype=torch.float64)
    total = 0.0
    for rank in range(count):
        index, rows = deal.place(rank)
        for number in range(deal.passes):
            mean = losses[number * deal.together + index, rows].mean()
            total += float(mean) * deal.share(rank) / deal.passes / count
    assert total == pytest.approx(float(losses.mean()))


@given(sizes, sizes, sizes)
def test_micro_batches_are_whole_where_their_number_allows_it(
    batch_size: int, times: int, count: int
) -> None:
    deal = BatchSplit.of(local(batch_size, times * count), count)
    assert deal.sharing == 1
    assert all(deal.share(rank) == 1.0 for rank in range(count))


def test_a_step_that_is_too_small_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        SettingsError, match=r"local\.processes=6.*at most 4.*local\.batch_size to 3"
    ):
        BatchSplit.of(local(2, 2), 6)


@given(sizes, sizes, sizes)
def test_no_larger_number_of_processes_would_do(
    batch_size: int, accumulate: int, limit: int
) -> None:
    most = most_processes(local(batch_size, accumulate), limit)
    assert 1 <= most <= limit
    for count in range(most + 1, limit + 1):
        with pytest.raises(SettingsError):
            BatchSplit.of(local(batch_size, accumulate), count)


@pytest.mark.parametrize(
    ("overrides", "device", "gpus", "expected"),
    [
        ((), "cuda", 2, 2),
        ((), "cuda", 1, 1),
        ((), "cuda", 8, 4),  # four windows
        (("local.accumulate=2",), "cuda", 8, 8),
        ((), "cpu", 8, 1),
        (("local.parallel=none",), "cuda", 8, 1),
        (("local.parallel=ddp",), "cuda", 1, 1),
        (("local.processes=2",), "cpu", 0, 2),
        (("local.processes=2",), "cuda", 8, 2),
        (("execution.cuda_graph=on", "local.precision=bfloat16"), "cuda", 8, 1),
    ],
)
def test_a_node_uses_all_gpus_that_get_something_to_do(
    overrides: tuple[str, ...], device: str, gpus: int, expected: int
) -> None:
    assert num_processes(micro(*overrides), device, gpus) == expected


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"local\.processes=4 needs as many GPUs.*shows 2"):
        num_processes(micro("local.processes=4"), "cuda", 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("local.parallel=none", "local.processes=2"), r"local\.processes=2 contradicts"),
        (
            ("local.processes=2", "execution.cuda_graph=on", "local.precision=bfloat16"),
            "belongs to one process",
        ),
        (
            ("local.parallel=fsdp", "execution.cuda_graph=on", "local.precision=bfloat16"),
            "belongs to one process",
        ),
        (("local.parallel=tensor",), r"local\.parallel=tensor is not one of auto, none, ddp, fsdp"),
        (("local.processes=-1",), r"local\.processes=-1 is out of range"),
    ],
)
def test_settings_at_odds_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        micro(*overrides)


def test_a_run_whose_steps_cannot_be_dealt_out_does_not_start() -> None:
    settings = micro("local.processes=3", "local.batch_size=2", "engine=flower")
    check(settings)
    with pytest.raises(SettingsError, match=r"local\.processes=3 cannot share"):
        preflight(replace(settings, output_dir=""))


def test_replicas_are_parted_once_their_state_fills_half_of_a_gpu() -> None:
    assert choose(40, 80) == "ddp"
    assert choose(41, 80) == "fsdp"
