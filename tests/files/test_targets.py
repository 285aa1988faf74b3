"""Whatever a person names as a target is refused if it holds what the command did not write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.errors import InputError
from fomoe_flwr.files import check_file, check_folder, mark_folder, save_text
from fomoe_flwr.run.directory import RunDirectory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> RunDirectory:
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "run")
    words = ["engine=in_process", "preset=tiny", "rounds=1", "local.steps=1", "local.device=cpu"]
    words += [f"data.path={small_text}", "eval.max_tokens=512", f"output_dir={run.path}"]
    assert main(["run", *words]) == 0
    return run


def _folder(path: Path) -> None:
    path.mkdir()
    save_text("mine", path / "thesis.txt")


def _file(path: Path) -> None:
    save_text("mine", path)


def _link(path: Path) -> None:
    _folder(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _own_and_more(path: Path) -> None:
    path.mkdir()
    mark_folder(path)
    save_text("mine", path / "thesis.txt")


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


TARGETS = {"folder": _folder, "file": _file, "link": _link, "own and more": _own_and_more}
COMMANDS = {
    "export": ["export", "RUN", "--to"],
    "costs": ["costs", "preset=tiny", "--sweep"],
    "federation up": ["federation", "up", "--nodes=1"],
    "federation up, detached": ["federation", "up", "--nodes=1", "--detach"],
    "sweep": ["sweep", "preset=tiny", "seed=1,2", "--dir"],
}


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_command_writes_into_what_it_did_not_make(
    command: list[str],
    make: Callable[[Path], None],
    finished: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    make(target)
    before = _tree(tmp_path)
    words = [str(finished.path) if word == "RUN" else word for word in command]
    assert main([*words, str(target)]) == 2
    assert "name a new or an empty folder" in capsys.readouterr().err
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("where", [".", "checkpoints"])
def test_an_export_never_replaces_the_run(where: str, finished: RunDirectory) -> None:
    before = _tree(finished.path)
    assert main(["export", str(finished.path), "--to", str(finished.path / where)]) == 2
    assert _tree(finished.path) == before


def test_an_export_is_replaced_by_the_next(finished: RunDirectory, tmp_path: Path) -> None:
    for target in ([], ["--to", str(tmp_path / "copy")]):
        for _ in range(2):
            assert main(["export", str(finished.path), *target]) == 0


def test_the_current_folder_is_refused_though_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the current folder"):
        check_folder(Path(os.curdir), "--to")


@pytest.mark.parametrize("make", [_folder, _file, _link])
def test_a_file_that_is_not_the_commands_is_refused(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "plan.yaml")
    with pytest.raises(InputError, match="name a new file"):
        check_file(tmp_path / "plan.yaml", "--to", "# Written")


def test_a_file_of_the_commands_own_is_taken(tmp_path: Path) -> None:
    check_file(tmp_path / "plan.yaml", "--to", "# Written")
    save_text("# Written by us\n", tmp_path / "plan.yaml")
    check_file(tmp_path / "plan.yaml", "--to", "# Written")
