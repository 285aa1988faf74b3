"""The state store: where a state lies changes nothing of what is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federated import Federation, assert_identical, use_made_up_data
from micro import micro
from safetensors import SafetensorError
from torch import Tensor

from fomoe_flwr.worker import state_store
from fomoe_flwr.worker.state_files import FEEDBACK, INNER, state_file
from fomoe_flwr.worker.state_store import STATES, StateStore


@pytest.fixture
def store() -> Iterator[StateStore]:
    store = StateStore()
    with store.in_memory():
        yield store


def state(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((3,), value), "b": torch.arange(4)}


def read(store: StateStore, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with store.open(path) as stored:
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        return tensors, dict(stored.metadata() or {})


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("is_forgotten", [False, True])
def test_what_is_read_is_what_was_saved(
    store: StateStore, tmp_path: Path, on_disk: bool, is_forgotten: bool
) -> None:
    path = state_file(tmp_path / "worker", 3)
    store.save(path, state(1.0), {"steps": "3"}, on_disk)
    store.settle()
    assert path.exists() == on_disk
    if is_forgotten:
        store = StateStore()
    if is_forgotten and not on_disk:
        with pytest.raises((OSError, SafetensorError)):
            read(store, path)
        return
    tensors, meta = read(store, path)
    assert_identical(tensors, state(1.0))
    assert meta == {"steps": "3"}


def test_a_process_that_ends_after_its_task_writes_at_once(tmp_path: Path) -> None:
    path = state_file(tmp_path, 1)
    StateStore().save(path, state(1.0), {}, on_disk=False)
    assert path.exists()


def test_a_state_without_room_in_memory_goes_to_the_disk(
    store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_store, "_MOST_OF_FREE", 0.0)
    path = state_file(tmp_path, 1)
    store.save(path, state(1.0), {}, on_disk=False)
    assert path.exists()
    assert not store._kept


def test_memory_holds_the_newest_state_of_each_worker_and_kind(
    store: StateStore, tmp_path: Path
) -> None:
    for server_round in (1, 2, 3):
        for worker in ("one", "other"):
            for kind in (INNER, FEEDBACK):
                path = state_file(tmp_path / worker, server_round, kind)
                store.save(path, state(server_round), {}, on_disk=server_round == 2)
    assert len(store._kept) == 4
    assert {path.name[-18:-12] for path in store._kept} == {"000003"}
    store.settle()
    folder = tmp_path / "one"
    assert store.newest_before(folder, 4) == state_file(folder, 3)
    assert store.newest_before(folder, 3) == state_file(folder, 2)
    assert store.newest_before(folder, 2) is None
    assert store.newest_before(folder, 3, FEEDBACK) == state_file(folder, 2, FEEDBACK)
    store.forget_rounds(folder, {2})
    assert store.newest_before(folder, 9) == state_file(folder, 2)
    assert store.newest_before(tmp_path / "other", 9) == state_file(tmp_path / "other", 3)


def test_a_write_that_fails_is_told_when_it_is_waited_for(
    store: StateStore, tmp_path: Path
) -> None:
    (tmp_path / "worker").write_text("in the way")
    store.save(state_file(tmp_path / "worker", 1), state(1.0), {}, on_disk=True)
    with pytest.raises(OSError, match="worker"):
        store.settle()


def test_a_write_that_fails_is_not_taken_for_a_lost_state(
    store: StateStore, tmp_path: Path
) -> None:
    other = state_file(tmp_path / "other", 1)
    StateStore().save(other, state(2.0), {}, on_disk=True)
    (tmp_path / "worker").write_text("in the way")
    store.save(state_file(tmp_path / "worker", 1), state(1.0), {}, on_disk=True)
    # Whoever reads meanwhile neither fails nor takes the failure away from `settle`.
    assert_identical(read(store, other)[0], state(2.0))
    with pytest.raises(OSError, match="worker"):
        store.settle()


def test_what_ended_the_work_is_told_rather_than_a_write_that_failed(tmp_path: Path) -> None:
    (tmp_path / "worker").write_text("in the way")
    path = state_file(tmp_path / "worker", 1)
    store = StateStore()

    def work() -> None:
        with store.in_memory():
            store.save(path, state(1.0), {}, on_disk=True)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        work()
    with pytest.raises(OSError, match="worker"), store.in_memory():
        store.save(path, state(1.0), {}, on_disk=True)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    path, draft = state_file(tmp_path, 2), tmp_path / ".round-000001.safetensors.12345678.draft"
    draft.write_bytes(b"half")
    StateStore().save(path, state(1.0), {}, on_disk=True)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_another_process_goes_on_from_what_was_in_memory(store: StateStore, tmp_path: Path) -> None:
    path = state_file(tmp_path, 5)
    store.save(path, state(5.0), {}, on_disk=False)
    assert not path.exists()
    store.write_all()
    assert_identical(read(StateStore(), path)[0], state(5.0))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("layout.kind=random", "layout.overlap=1"),
        ("layout.kind=random", "outer=local_adamw"),
        ("outer.fragments=2",),
        ("outer.fragments=2", "wire=int4"),
        ("wire=int4", "layout.kind=random"),
        ("local.keep_inner_state=false",),
        ("local.optimizer=sgd",),
    ],
    ids=lambda words: " ".join(words),
)
def test_rounds_are_the_same_bit_by_bit_in_memory_and_on_the_disk(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_data(monkeypatch)
    settings = micro("rounds=4", "checkpoint.every=3", *overrides)
    on_disk = Federation(settings, tmp_path / "disk").run()
    with STATES.in_memory():
        in_memory = Federation(settings, tmp_path / "memory").run()
        STATES.settle()
    for got, want in zip(in_memory.rounds, on_disk.rounds, strict=True):
        assert_identical(got.state, want.state)
        assert_identical(got.outer, want.outer)
    written = {name for _, _, names in os.walk(tmp_path / "memory") for name in names}
    rounds = {name[-18:-12] for name in written if name.endswith(".safetensors")}
    assert rounds <= {"000003", "000004"}
    assert "000004" in rounds
