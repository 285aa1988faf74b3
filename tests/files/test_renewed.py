"""A folder that one command writes to alone is made anew, whenever the one before was killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fomoe_flwr import files
from fomoe_flwr.errors import InputError
from fomoe_flwr.files import drop_folder, is_marked, mark_folder, renew_folder, replace_folder


class KilledError(BaseException):
    """Stands for the end of a process; what it would have tidied up stays."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """End the process at a change of the disk, counted from 0."""
    left = [step]

    def watched(inner: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:  # Nothing that comes later happens either.
                raise KilledError
            return inner(*arguments, **options)

        return instead

    for owner, name in (
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (os, "unlink"),
        (os, "rmdir"),
    ):
        patch.setattr(owner, name, watched(getattr(owner, name)))


@pytest.mark.parametrize("step", range(12))
def test_a_folder_is_known_again_wherever_the_process_was_killed(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "server"
    renew_folder(folder)
    (folder / "weights").mkdir()
    for name in ("a", "b"):
        (folder / "weights" / name).write_text(name)
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with suppress(KilledError):
            renew_folder(folder)
    renew_folder(folder)
    assert is_marked(folder)
    assert [each.name for each in folder.iterdir()] == [".made-by-fomoe"]
    assert [each.name for each in tmp_path.iterdir()] == ["server"]


def _elsewhere(path: Path) -> None:
    path.with_name("elsewhere").mkdir()
    mark_folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("all of it")


IN_THE_WAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda path: path.write_text("mine"), "was not made by this run: move it away"),
    "another folder": (_folder, "was not made by this run: move it away"),
    "a link": (_elsewhere, "is a symbolic link: "),
    "a link to nothing": (lambda path: path.symlink_to(path / "nowhere"), "is a symbolic link: "),
}


@pytest.mark.parametrize(("make", "told"), IN_THE_WAY.values(), ids=IN_THE_WAY)
@pytest.mark.parametrize("act", [renew_folder, drop_folder])
def test_what_the_command_did_not_make_stays(
    act: Callable[[Path], None], make: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "server"
    make(path)
    before = {each: each.is_file() and each.read_bytes() for each in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=f"^{path} {told}"):
        act(path)
    assert before == {each: each.is_file() and each.read_bytes() for each in tmp_path.rglob("*")}


def test_an_empty_folder_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    renew_folder(tmp_path / "server")
    assert is_marked(tmp_path / "server")


def test_a_folder_that_is_replaced_takes_the_drafts_of_killed_writers_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(ZeroDivisionError):
            replace_folder(tmp_path / "export", lambda draft: print(1 // 0))
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".draft")
    replace_folder(tmp_path / "export", lambda draft: None)
    assert [each.name for each in tmp_path.iterdir()] == ["export"]
    shutil.rmtree(tmp_path / "export")
