"""A checkpoint survives a power cut at every moment of its writing.

Two worst cases of what a disk may hold after a cut are built at every step. In both a file has the
content of its last flush, or none. In the first a folder has the names of its last flush; in the
second every rename and removal reached the disk at once, before any content.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fomoe_flwr import files
from fomoe_flwr.files import append_line
from fomoe_flwr.run.checkpoint import Checkpoint, load_latest, save_checkpoint

REMOVE = shutil.rmtree


def checkpoint_of(server_round: int) -> Checkpoint:
    return Checkpoint(
        server_round,
        {"weight": torch.full((64,), float(server_round))},
        {"momentum/weight": torch.full((64,), float(-server_round))},
        {"totals": {"tokens": server_round}},
    )


class Disk:
    """What of a folder would be there after a power cut."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.content: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {root.stat().st_ino: {}}
        self.at_every_step: Callable[[], None] = lambda: None
        patch.setattr(files, "_flush", self._flush)
        for owner, name in (
            (Path, "rename"),
            (Path, "unlink"),
            (files.os, "replace"),
            (files.shutil, "rmtree"),
        ):
            patch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            self.at_every_step()
            result = inner(*arguments, **options)
            self.at_every_step()
            return result

        return instead

    def _flush(self, path: Path) -> None:
        self.at_every_step()
        if path.is_dir():
            self.names[path.stat().st_ino] = self._now(path)
        else:
            self.content[path.stat().st_ino] = path.read_bytes()
        self.at_every_step()

    @staticmethod
    def _now(folder: Path) -> dict[str, tuple[int, bool]]:
        return {item.name: (item.stat().st_ino, item.is_dir()) for item in folder.iterdir()}

    def after_cut(self, target: Path, names_at_once: bool) -> None:
        """Write what is left to `target`."""
        live = {p.stat().st_ino: p for p in (self.root, *self.root.rglob("*")) if p.is_dir()}
        pending = [(self.root.stat().st_ino, target)]
        while pending:
            inode, folder = pending.pop()
            folder.mkdir()
            names = self.names.get(inode, {})
            if names_at_once and inode in live:
                names = self._now(live[inode])
            for name, (child, is_folder) in names.items():
                if is_folder:
                    pending.append((child, folder / name))
                else:
                    (folder / name).write_bytes(self.content.get(child, b""))


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.server_round == other.server_round and all(
        torch.equal(mine[key], theirs[key])
        for mine, theirs in ((one.weights, other.weights), (one.outer, other.outer))
        for key in theirs
    )


@pytest.mark.parametrize("names_at_once", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_cut_there_is_the_old_checkpoint_or_the_new_one(
    keep: int, names_at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    steps: list[int] = []
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        for server_round in (1, 2, 3):
            allowed = [checkpoint_of(r) for r in (server_round - 1, server_round) if r]

            def look(allowed: list[Checkpoint] = allowed) -> None:
                watch, disk.at_every_step = disk.at_every_step, lambda: None
                target = tmp_path / f"cut-{len(steps)}"
                disk.after_cut(target, names_at_once)
                if len(allowed) == 2:
                    found = load_latest(target / "checkpoints")
                    assert any(same(found, one) for one in allowed)
                    steps.append(found.server_round)
                REMOVE(target)
                disk.at_every_step = watch

            disk.at_every_step = look
            save_checkpoint(root / "checkpoints", checkpoint_of(server_round), keep)
            disk.at_every_step = lambda: None
            disk.after_cut(tmp_path / "done", names_at_once)
            # Once it has returned, nothing takes it away.
            assert same(load_latest(tmp_path / "done" / "checkpoints"), checkpoint_of(server_round))
            REMOVE(tmp_path / "done")
    assert len(steps) > 20
    assert set(steps) == {1, 2, 3}


@pytest.mark.parametrize("names_at_once", [False, True])
def test_a_line_that_was_added_stays(
    names_at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    for number in range(3):
        append_line(root / "metrics.jsonl", {"round": number})
        disk.after_cut(tmp_path / f"cut-{number}", names_at_once)
        lines = (tmp_path / f"cut-{number}" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == number + 1


def test_the_test_notices_a_missing_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    disk = Disk(root, monkeypatch)
    flush = files._flush
    monkeypatch.setattr(files, "_flush", lambda path: None if path.suffix else flush(path))
    save_checkpoint(root / "checkpoints", checkpoint_of(1), keep=1)
    disk.after_cut(tmp_path / "cut", names_at_once=True)
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        load_latest(tmp_path / "cut" / "checkpoints")
