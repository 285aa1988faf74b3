"""The text of a run: a file, a folder, and text that is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    Start,
    refuse,
)

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import read_settings
from fomoe_flwr.run.directory import RunDirectory


def test_a_folder_of_text_and_json_lines_splits_by_domain(
    start: Start, small_text: Path, tmp_path: Path
) -> None:
    text = small_text.read_text(encoding="utf-8")
    folder = tmp_path / "texts"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "a.txt").write_text(text[:30_000], encoding="utf-8")
    lines = [
        json.dumps({"text": text[i : i + 1000], "domain": "notes"})
        for i in range(30_000, 60_000, 1000)
    ]
    (folder / "notes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = start(
        "run", f"data.path={folder}", "data.partition=by_domain", "data.holdout_fraction=0.1"
    )
    last = run.read_metrics()[-1]
    assert last["round/workers_ok"] == 2
    assert math.isfinite(last["eval/loss"])
    domains = {key for key in last if key.startswith("eval/bits_per_byte/")}
    assert domains <= {"eval/bits_per_byte/letters", "eval/bits_per_byte/notes"}
    assert domains


def test_a_relative_path_of_text_is_stored_absolute(
    words: list[str], small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_text.parent)
    out = tmp_path / "run"
    changed = [*words, f"data.path={small_text.name}", f"output_dir={out}", "rounds=1"]
    assert main(changed) == 0
    monkeypatch.chdir(tmp_path)
    assert read_settings(out / "config.yaml").data.path == str(small_text)
    assert main(["evaluate", str(out)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("no.parquet", b"PAR1 this is no parquet", "as Parquet"),
        ("no.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("no.jsonl", b'{"words": "a"}\n', "has no column 'text'"),
        ("no.txt", b"abc\xff\xfe", "is not UTF-8"),
        ("no.txt", b"", "documents"),
        ("no.pdf", b"%PDF", "must end in one of"),
    ],
)
def test_text_that_cannot_be_read_is_refused_before_anything_is_written(
    name: str,
    content: bytes,
    text: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = refuse(capsys, words, tmp_path / "run", f"data.path={path}")
    assert text in found
    assert name in found


def test_text_that_is_not_there_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = refuse(capsys, words, tmp_path / "run", f"data.path={tmp_path / 'nowhere'}")
    assert "does not exist" in found
    (tmp_path / "empty").mkdir()
    found = refuse(capsys, words, tmp_path / "run", f"data.path={tmp_path / 'empty'}")
    assert "holds no file that ends in one of" in found


def test_too_little_text_is_refused_with_what_one_step_needs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"line {i}"}) for i in range(10)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = refuse(capsys, words, tmp_path / "run", f"data.path={tmp_path / 'few.jsonl'}")
    assert found.startswith("too small corpus: ")
    assert "layout.num_workers=2 * local.batch_size=2 * data.sequence_length=32 = 128" in found


def test_text_that_turns_out_too_little_for_a_worker_ends_the_run_with_a_reason(
    words: list[str], small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Enough bytes for a step, but not enough tokens: that shows when the workers tokenise.
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("validation", "test"):
        (folder / f"{split}.txt").write_text(small_text.read_text("utf-8")[:9000], "utf-8")
    (folder / "train.txt").write_text("the quick brown fox jumps over the dog " * 5, "utf-8")
    out = f"output_dir={tmp_path / 'run'}"
    assert main([*words, f"data.path={folder}", out, "federation.node_wait_seconds=0"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: 2 of 2 workers cannot start: ")
    assert "data.sequence_length" in lines[0]
    assert RunDirectory(tmp_path / "run").read_summary()["status"] == "failed"


@pytest.mark.parametrize("split", ["validation", "train"])
def test_text_too_short_for_one_window_is_refused(
    split: str, words: list[str], small_text: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        text = "short " * 3 if name == split else small_text.read_text("utf-8")[:9000]
        (folder / f"{name}.txt").write_text(text, "utf-8")
    assert main([*words, f"data.path={folder}", f"output_dir={tmp_path / 'run'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "data.path" in line
    assert "data.sequence_length" in line


def test_the_start_tells_what_is_read_and_what_is_not(
    start: Start, small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "BOOK.TXT").write_text(small_text.read_text("utf-8"), "utf-8")
    (folder / "book.pdf").write_bytes(b"%PDF")
    capsys.readouterr()
    start("run", f"data.path={folder}", "rounds=1")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (text,) = [line for line in lines if line.startswith("text:")]
    assert text.endswith(f"{folder}, 1 file")
    for split in ("train:", "validation:", "test:"):
        (line,) = [line for line in lines if line.startswith(split)]
        assert "document" in line
        assert "tokens" in line
    (line,) = [line for line in lines if line.startswith("left out:")]
    assert "book.pdf (kind .pdf is not read)" in line
