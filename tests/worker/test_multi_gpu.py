"""A round in two processes is the round of one, up to the order of sums."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from rounds import UNEVEN, Rounds, assert_close

from fomoe_flwr.data import DataError
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.multi_gpu import NodeProcesses, num_node_processes
from fomoe_flwr.worker.round import LostStateError, RoundResult
from fomoe_flwr.worker.trainer import TrainingError

WHOLE_MICRO_BATCHES = "local.accumulate=2"
NONE_IN_A_LAYER: Residents = ((), (0, 3, 5))


@pytest.fixture(scope="module")
def processes() -> Iterator[NodeProcesses]:
    """Return processes for all tests that do not end them: their start takes seconds."""
    made = NodeProcesses()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    CACHE.clear()
    yield
    CACHE.clear()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("overrides", "residents"),
    [
        (("model=olmoe-tiny", "local.weight_decay=0.1", "local.grad_clip=0.1"), UNEVEN),
        (("model=olmoe-tiny", "model.tie_embeddings=true"), NONE_IN_A_LAYER),
        (("model=olmoe-tiny", "execution.loss=chunked", "balance.z_loss=0.001"), UNEVEN),
        (("model=olmoe-tiny", "model.routing=partitioned"), UNEVEN),
        (("model=fomoe-tiny",), UNEVEN),
        (("model=fomoe-tiny", "model.routing=partitioned", "local.optimizer=sgd"), UNEVEN),
        (("model=deepseek-v3-tiny", "balance=loss_free"), UNEVEN),
        (("model=glm4-moe-tiny", "execution.checkpoint_activations=true"), UNEVEN),
        (("local.accumulate=6",), UNEVEN),
    ],
    ids=str,
)
def test_two_processes_give_what_one_gives(
    overrides: tuple[str, ...],
    residents: Residents,
    parallel: str,
    processes: NodeProcesses,
    small_text: Path,
    tmp_path: Path,
) -> None:
    settings = (f"local.parallel={parallel}", WHOLE_MICRO_BATCHES, *overrides)
    one = Rounds(tmp_path / "one", small_text, settings, residents)
    two = Rounds(tmp_path / "two", small_text, settings, residents)
    # Two rounds: the second goes on from moments, ages and cursor on the disk.
    for server_round in (1, 2):
        got = two.together(two.task(server_round), processes)
        assert_close(got, one.alone(one.task(server_round)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_parted_micro_batch_is_one_of_fewer_windows(
    parallel: str, processes: NodeProcesses, small_text: Path, tmp_path: Path
) -> None:
    """Its balance loss is that of the part, so a lone process takes smaller ones, and more."""
    settings = (f"local.parallel={parallel}", "balance.loss=0.1")
    parted = Rounds(tmp_path / "two", small_text, (*settings, "local.batch_size=4"))
    smaller = ("local.batch_size=2", "local.accumulate=2")
    small = Rounds(tmp_path / "one", small_text, (*settings, *smaller))
    assert_close(parted.together(parted.task(1), processes), small.alone(small.task(1)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_unequal_parts_weigh_by_their_windows(
    parallel: str, processes: NodeProcesses, small_text: Path, tmp_path: Path
) -> None:
    settings = (f"local.parallel={parallel}", "local.batch_size=5", "balance=off")
    one = Rounds(tmp_path / "one", small_text, settings)
    two = Rounds(tmp_path / "two", small_text, settings)
    got, want = two.together(two.task(1), processes), one.alone(one.task(1))
    # Without its coefficient the balance loss is still reported, of smaller micro-batches.
    report = replace(got.report, balance_loss=want.report.balance_loss)
    assert_close(replace(got, report=report), want)


@pytest.mark.parametrize("order", ["one two", "two one"])
@pytest.mark.parametrize("outer", ["average", "local_adamw"])
def test_the_number_of_processes_may_change_between_rounds(
    order: str, outer: str, processes: NodeProcesses, small_text: Path, tmp_path: Path
) -> None:
    """The layout moves too: kept experts keep their moments, fresh ones are young."""
    settings = ("local.parallel=fsdp", WHOLE_MICRO_BATCHES, f"outer={outer}")
    moved: Residents = ((1, 2, 3), (0, 3, 4))
    alone = Rounds(tmp_path / "alone", small_text, settings)
    mixed = Rounds(tmp_path / "mixed", small_text, settings)

    def second(rounds: Rounds, first: RoundResult) -> object:
        rounds.residents = moved
        more = {}
        if first.moments:
            sizes = rounds.spec.parameters()
            more["moments"] = {
                name: (shared, torch.full((sizes.experts_size(moved),), 1e-4))
                for name, (shared, _) in first.moments.items()
            }
        return rounds.task(2, **more)

    want = alone.alone(second(alone, alone.alone(alone.task(1))))  # type: ignore[arg-type]
    if order == "one two":
        first = mixed.alone(mixed.task(1))
        got = mixed.together(second(mixed, first), processes)  # type: ignore[arg-type]
    else:
        first = mixed.together(mixed.task(1), processes)
        got = mixed.alone(second(mixed, first))  # type: ignore[arg-type]
    assert got.num_fresh_experts == 3
    assert_close(got, want)


def test_fragments_go_on_from_weights_that_two_processes_left(
    processes: NodeProcesses, small_text: Path, tmp_path: Path
) -> None:
    settings = ("local.parallel=fsdp", WHOLE_MICRO_BATCHES, "outer.fragments=2")
    one = Rounds(tmp_path / "one", small_text, settings)
    two = Rounds(tmp_path / "two", small_text, settings)
    first = one.spec.fragment(0, 2)
    more = {
        "fragment": 0,
        "shared": first.pack_shared(one.state),
        "experts": first.pack_experts(one.state, UNEVEN),
    }
    assert_close(two.together(two.task(1), processes), one.alone(one.task(1)))
    assert_close(two.together(two.task(2, **more), processes), one.alone(one.task(2, **more)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_choices_and_pooled_shares_reach_all_processes(
    parallel: str, processes: NodeProcesses, small_text: Path, tmp_path: Path
) -> None:
    settings = (f"local.parallel={parallel}", WHOLE_MICRO_BATCHES, "balance=pooled")
    one = Rounds(tmp_path / "one", small_text, settings)
    two = Rounds(tmp_path / "two", small_text, settings)
    torch.manual_seed(0)
    more = {
        "probe": torch.randint(0, 256, (5, 8)),
        "pooled_share": torch.softmax(torch.randn(2, 6), -1),
    }
    got = two.together(two.task(1, **more), processes)
    want = one.alone(one.task(1, **more))
    assert_close(got, want)
    assert got.choices is not None
    assert want.choices is not None
    assert got.choices.shape == (2, 40, 2)
    assert float((got.choices == want.choices).float().mean()) > 0.98


def test_the_processes_are_kept_from_round_to_round(
    processes: NodeProcesses, small_text: Path, tmp_path: Path
) -> None:
    rounds = Rounds(tmp_path, small_text, ("local.parallel=ddp",))
    rounds.together(rounds.task(1), processes)
    pids = processes.pids
    rounds.together(rounds.task(2), processes)
    assert processes.pids == pids
    assert len(pids) == 2
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_without_gpus_a_round_stays_in_one_process(small_text: Path, tmp_path: Path) -> None:
    assert num_node_processes(Rounds(tmp_path, small_text).task(1)) == 1
    assert num_node_processes(Rounds(tmp_path, small_text, ("local.processes=2",)).task(1)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "server_round", "error"),
    [
        (("local.lr=1e30", "local.grad_clip=0"), 1, TrainingError),
        (("outer.fragments=2",), 2, LostStateError),
        (("local.batch_size=100000",), 1, DataError),
    ],
)
def test_errors_of_a_round_keep_their_class_and_text(
    overrides: tuple[str, ...],
    server_round: int,
    error: type[Exception],
    small_text: Path,
    tmp_path: Path,
) -> None:
    processes = NodeProcesses()
    rounds = Rounds(tmp_path, small_text, ("local.parallel=ddp", *overrides))
    more: dict[str, object] = {}
    if error is LostStateError:
        part = rounds.spec.fragment(0, 2)
        more = {
            "fragment": 0,
            "shared": part.pack_shared(rounds.state),
            "experts": part.pack_experts(rounds.state, UNEVEN),
        }
    with pytest.raises(error, match=f"process [01] of 2 raised {error.__name__}: "):
        rounds.together(rounds.task(server_round, **more), processes)
    assert processes.pids == []


@pytest.mark.slow
def test_the_round_after_a_killed_process_starts_new_ones(small_text: Path, tmp_path: Path) -> None:
    processes = NodeProcesses()
    rounds = Rounds(tmp_path, small_text, ("local.parallel=ddp",))
    try:
        rounds.together(rounds.task(1), processes)
        first = processes.pids
        os.kill(first[1], signal.SIGKILL)
        psutil.Process(first[1]).wait(10)
        rounds.together(rounds.task(2), processes)
        assert not set(first) & set(processes.pids)
    finally:
        processes.close()
