"""A resume is the same run: it goes on with the text that the run began with, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Start, assert_same_end, only_error

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import read_settings
from fomoe_flwr.federation.server import Server
from fomoe_flwr.run.directory import RunDirectory


@pytest.fixture
def texts(small_text: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    text = small_text.read_text(encoding="utf-8")
    (folder / "a.txt").write_text(text[:40_000], encoding="utf-8")
    (folder / "b.txt").write_text(text[40_000:], encoding="utf-8")
    return folder


def stop(start: Start, monkeypatch: pytest.MonkeyPatch, texts: Path, name: str) -> None:
    """End a run after its first round."""
    with monkeypatch.context() as patch:
        inner = Server._close_round

        def instead(self: Any, record: Any) -> Any:
            if record.server_round == 2:
                raise KeyboardInterrupt
            return inner(self, record)

        patch.setattr(Server, "_close_round", instead)
        with pytest.raises((AssertionError, KeyboardInterrupt)):
            start(name, f"data.path={texts}", "rounds=2")


def test_other_text_is_refused_and_its_files_are_named(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop(start, monkeypatch, texts, "run")
    run, before = tmp_path / "run", (texts / "a.txt").read_text("utf-8")
    summary = RunDirectory(run).read_summary()
    (texts / "a.txt").write_text(before + "more", "utf-8")
    (texts / "c.txt").write_text("more", "utf-8")
    for command in (["run", f"resume={run}"], ["evaluate", str(run)]):
        capsys.readouterr()
        assert main(command) == 2
        assert "(changed a.txt; added c.txt)" in only_error(capsys)
    assert RunDirectory(run).read_summary() == summary
    (texts / "a.txt").write_text(before, "utf-8")
    (texts / "c.txt").unlink()
    assert main(["run", f"resume={run}"]) == 0


def test_the_same_text_may_lie_elsewhere(
    start: Start, monkeypatch: pytest.MonkeyPatch, texts: Path, tmp_path: Path
) -> None:
    whole = start("whole", f"data.path={texts}", "rounds=2")
    stop(start, monkeypatch, texts, "run")
    run, moved = tmp_path / "run", tmp_path / "moved"
    texts.rename(moved)
    assert main(["run", f"resume={run}", f"data.path={moved}"]) == 0
    assert_same_end(RunDirectory(run), whole)
    assert read_settings(run / "config.yaml").data.path == str(moved)


def test_a_run_without_an_inventory_goes_on_with_one_warning(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop(start, monkeypatch, texts, "run")
    kept = tmp_path / "run" / "text.json"
    kept.unlink()
    capsys.readouterr()
    assert main(["run", f"resume={kept.parent}"]) == 0
    assert capsys.readouterr().out.count("WARNING") == 1
    assert sorted(json.loads(kept.read_text())["files"]) == ["a.txt", "b.txt"]


def test_text_that_changes_while_a_run_goes_ends_it_with_a_reason(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    texts: Path,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inner = Server._close_round

    def instead(self: Any, record: Any) -> Any:
        (texts / "c.txt").write_text("more " * 1000, "utf-8")
        return inner(self, record)

    monkeypatch.setattr(Server, "_close_round", instead)
    out = f"output_dir={tmp_path / 'run'}"
    assert main([*words, f"data.path={texts}", out, "rounds=2"]) == 1
    assert "added c.txt" in capsys.readouterr().err
