"""Whatever a person names as a target is refused if it holds what the command did not write."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import command_parser, main
from fomoe_flwr.cli.paths import given_path
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


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sites") / "sites.yaml"
    site = "{name: NAME, memory_gib: 40, teraflops: 10, up_mbps: 100, down_mbps: 100}"
    text = "".join(f"  - {site.replace('NAME', name)}\n" for name in "ab")
    save_text(f"server_mbps: 1000\nsites:\n{text}", path)
    return path


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
    "export RUN --to": "name a new or an empty folder",
    "costs preset=tiny --sweep": "name a new or an empty folder",
    "federation up --nodes=1": "name a new or an empty folder",
    "federation up --nodes=1 --detach": "name a new or an empty folder",
    "federation run --nodes=1": "name a new or an empty folder",
    "sweep preset=tiny seed=1,2 --dir": "name a new or an empty folder",
    "worker": "worker-dir",
    "bench step preset=tiny --to": "name a new file",
    "federation down": "is no federation",
    "status": "is not a run directory",
    "report": "is not a run directory",
}


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_into_what_it_did_not_make(
    command: str,
    make: Callable[[Path], None],
    finished: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    make(target)
    before = _tree(tmp_path)
    words = [str(finished.path) if word == "RUN" else word for word in command.split()]
    assert main([*words, str(target)]) == 2
    assert COMMANDS[command] in capsys.readouterr().err
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("make", [_folder, _file, _link])
def test_no_run_goes_into_what_no_run_made(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "target")
    before = _tree(tmp_path)
    assert main(["run", "preset=tiny", f"output_dir={tmp_path / 'target'}"]) == 2
    assert "name a new or an empty folder" in capsys.readouterr().err
    assert _tree(tmp_path) == before


FILES = {
    "federation credentials --host=localhost FOLDER": "ca.key",
    "federation node-key FOLDER berlin": "berlin",
    "plan SITES preset=tiny costs.tokens=1e6 --to FOLDER/plan.yaml": "plan.yaml",
    "plan SITES preset=tiny costs.tokens=1e6 --to FOLDER/plan.yml": "plan.toml",
    "bench step preset=tiny --to FOLDER/speed.json": "speed.json",
}
"""Commands that add files to a folder: none of these names is ever overwritten."""


@pytest.mark.parametrize("make", [_file, _link])
@pytest.mark.parametrize("command", FILES)
def test_no_command_overwrites_a_file_that_it_did_not_write(
    command: str, make: Callable[[Path], None], tmp_path: Path, sites: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / FILES[command])
    before = _tree(tmp_path)
    text = command.replace("FOLDER", str(folder)).replace("SITES", str(sites))
    assert main(text.split()) == 2
    assert _tree(tmp_path).items() >= before.items()
    assert (folder / FILES[command]).is_symlink() == (make is _link)


READ_ONLY = {"federation submit", "plan SITES.yaml", "evaluate RUN", "sample RUN", "sweep --resume"}
"""Paths on the command line to which nothing is written, or only what is a sweep already."""


def test_every_path_of_the_command_line_is_in_a_table() -> None:
    tables = [*COMMANDS, *FILES, *READ_ONLY]
    paths = [
        (name, action.option_strings[0] if action.option_strings else "")
        for name, parser in _parsers("", command_parser())
        for action in parser._actions
        if action.type in (Path, given_path) or action.metavar == "FOLDER"
    ]
    assert len(paths) > 15
    for command, option in paths:
        assert any(t.startswith(command) and option in t for t in tables), (command, option)


def _parsers(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from _parsers(f"{name} {word}".strip(), inner)


@pytest.mark.parametrize("where", [".", "checkpoints", ".."])
def test_an_export_never_replaces_the_run(where: str, finished: RunDirectory) -> None:
    before = _tree(finished.path)
    assert main(["export", str(finished.path), "--to", str(finished.path / where)]) == 2
    assert _tree(finished.path) == before


def test_an_export_is_replaced_by_the_next(finished: RunDirectory, tmp_path: Path) -> None:
    for target in ([], ["--to", str(tmp_path / "copy")]):
        for _ in range(2):
            assert main(["export", str(finished.path), *target]) == 0


def test_an_export_in_the_run_s_own_folder_keeps_what_a_person_put_there(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    note = finished.export / "notes.md"
    save_text("mine", note)
    assert main(["export", str(finished.path)]) == 2
    assert "holds notes.md" in capsys.readouterr().err
    assert main(["run", f"resume={finished.path}", "rounds=2"]) == 0
    assert "not exported: " in capsys.readouterr().out
    assert note.read_text(encoding="utf-8") == "mine"
    assert RunDirectory(finished.path).read_summary()["status"] == "completed"
    note.unlink()


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
