"""Checkpoints and files: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fomoe_flwr import files
from fomoe_flwr.files import replace_folder, save_json, save_text
from fomoe_flwr.model import tensor_files
from fomoe_flwr.model.tensor_files import save_tensors
from fomoe_flwr.run import checkpoint as checkpoint_module
from fomoe_flwr.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_latest,
    save_checkpoint,
    stored_rounds,
)


class KilledError(BaseException):
    """Stands for the end of the process: nothing after it may count."""


def checkpoint_of(server_round: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(server_round)
    return Checkpoint(
        server_round=server_round,
        weights={"a.weight": torch.randn(3, 2, generator=generator), "b": torch.ones(2)},
        outer={"momentum/a.weight": torch.randn(3, 2, generator=generator)},
        state={"spec_digest": "abc", "totals": {"bytes_up": 7 * server_round}},
    )


def assert_same(got: Checkpoint, want: Checkpoint) -> None:
    assert got.server_round == want.server_round
    for mine, theirs in ((got.weights, want.weights), (got.outer, want.outer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert got.state == {"round": want.server_round, **want.state}


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def error_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_latest(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_survives_the_disk(tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path, checkpoint_of(3), keep=2)
    assert written == tmp_path / "round-000003"
    assert names(written) == ["outer.safetensors", "state.json", "weights.safetensors"]
    assert_same(load_latest(tmp_path), checkpoint_of(3))


def test_no_outer_state_survives_too(tmp_path: Path) -> None:
    plain = Checkpoint(1, {"a": torch.zeros(1)}, {}, {})
    save_checkpoint(tmp_path, plain, keep=1)
    assert_same(load_latest(tmp_path), plain)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept_and_latest_names_the_last(keep: int, tmp_path: Path) -> None:
    for server_round in range(1, 5):
        save_checkpoint(tmp_path, checkpoint_of(server_round), keep)
        newest = f"round-{server_round:06d}"
        assert (tmp_path / "latest").read_text() == newest + "\n"
        assert_same(load_latest(tmp_path), checkpoint_of(server_round))
    assert stored_rounds(tmp_path) == [1, 2, 3, 4][-keep:]
    assert names(tmp_path) == ["latest", *(f"round-{r:06d}" for r in stored_rounds(tmp_path))]


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    for server_round in (9, 10, 100):
        save_checkpoint(tmp_path, checkpoint_of(server_round), keep=3)
    assert stored_rounds(tmp_path) == [9, 10, 100]


def test_a_round_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_of(2), keep=2)
    again = Checkpoint(2, {"a": torch.full((1,), 5.0)}, {}, {})
    save_checkpoint(tmp_path, again, keep=2)
    assert_same(load_latest(tmp_path), again)


@pytest.mark.parametrize("call", [1, 2])
def test_a_write_killed_in_the_middle_leaves_the_good_checkpoint(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint_of(1), keep=1)
    calls = 0

    def dies(tensors: dict[str, Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        path.write_bytes(b"half a")
        if calls == call:
            raise KilledError

    monkeypatch.setattr(checkpoint_module, "save_file", dies)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KilledError):
        save_checkpoint(tmp_path, checkpoint_of(2), keep=1)
    monkeypatch.undo()
    assert [name for name in names(tmp_path) if name.endswith(".draft")]
    assert stored_rounds(tmp_path) == [1]
    assert (tmp_path / "latest").read_text() == "round-000001\n"
    assert_same(load_latest(tmp_path), checkpoint_of(1))
    save_checkpoint(tmp_path, checkpoint_of(2), keep=1)
    assert_same(load_latest(tmp_path), checkpoint_of(2))


def test_a_kill_before_latest_is_moved_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint_of(1), keep=1)

    def dies(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr(checkpoint_module, "save_text", dies)
    with pytest.raises(KilledError):
        save_checkpoint(tmp_path, checkpoint_of(2), keep=1)
    assert stored_rounds(tmp_path) == [1, 2]
    assert_same(load_latest(tmp_path), checkpoint_of(2))


def test_an_empty_folder_says_that_there_is_nothing(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"{tmp_path} holds no checkpoint: nothing to resume from"
    assert "holds no checkpoint" in error_of(tmp_path / "absent")


@pytest.mark.parametrize("name", ["weights.safetensors", "outer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
def test_a_damaged_file_is_one_clear_line(name: str, damage: str, tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, checkpoint_of(4), keep=1) / name
    whole = target.read_bytes()
    target.unlink()
    if damage != "missing":
        content = {"truncated": whole[:-3], "empty": b"", "garbage": b"\x80\xff" * 40}
        target.write_bytes(content[damage])
    assert f"cannot read the checkpoint {target.parent}: " in error_of(tmp_path)


@pytest.mark.parametrize("state", ["[]", "{}", '{"round": "x"}', '{"round": null}', "null"])
def test_a_state_file_of_something_else_is_one_clear_line(state: str, tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, checkpoint_of(4), keep=1)
    (target / "state.json").write_text(state)
    assert f"cannot read the checkpoint {target}: " in error_of(tmp_path)


@pytest.mark.parametrize("kind", ["text", "json", "tensors"])
def test_files_are_written_and_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for value in (1, 2):
        if kind == "text":
            save_text(f"größe {value}", path)
            assert path.read_text(encoding="utf-8") == f"größe {value}"
        elif kind == "json":
            save_json({"value": value}, path)
            assert json.loads(path.read_text()) == {"value": value}
        else:
            save_tensors({"t": torch.tensor([value])}, path, {"about": "it"})
            assert load_file(path)["t"].tolist() == [value]
        assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KilledError()], ids=repr)
def test_an_error_while_writing_leaves_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    save_tensors({"t": torch.ones(1)}, path, {})
    old = path.read_bytes()

    def fails(_: object, target: Path, **__: object) -> None:
        target.write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensor_files, "save_file", fails)
    with pytest.raises(type(error)):
        save_tensors({"t": torch.zeros(1)}, path, {})
    assert path.read_bytes() == old
    assert names(tmp_path) == ["file"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_json([1], path)
    with pytest.raises(TypeError):
        save_json([object()], path)
    assert json.loads(path.read_text()) == [1]
    assert names(tmp_path) == ["file"]


def test_the_name_appears_only_when_the_file_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed = tmp_path / "file", []
    monkeypatch.setattr(files, "_flush", lambda target: flushed.append((target, path.exists())))
    save_text("content", path)
    assert [exists for _, exists in flushed] == [False, True]
    assert flushed[1][0] == tmp_path


def test_an_error_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    replace_folder(path, lambda draft: save_text("old", draft / "a"))

    def fails(draft: Path) -> None:
        save_text("new", draft / "a")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(path, fails)
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_replaced_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    replace_folder(path, lambda draft: save_text("old", draft / "a"))
    replace_folder(path, lambda draft: save_text("new", draft / "b"))
    assert names(path) == ["b"]
    assert names(tmp_path) == ["folder"]
