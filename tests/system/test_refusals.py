"""What is refused before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import (
    Start,
    only_error,
    refuse,
)

from fomoe_flwr.cli.main import main


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("layout.overlp=2", "layout.overlp is not a setting; did you mean layout.overlap?"),
        ("rounds=0", "rounds=0 is out of range: it must be >= 1"),
        ("local.lr=nan", "local.lr=nan is out of range: it must be > 0"),
        ("model.routing=all", "model.routing=all is not one of skip_token, partitioned"),
        ("outer=nestrov", "outer=nestrov is not one of "),
        ("layout.overlap=7", "layout.overlap=7 needs layout.num_workers >= 7 (got 2)"),
        ("layout.num_workers=7", "model.num_experts=12, layout.overlap=1 and layout.num_workers=7"),
        ("local=5", "local=5 is not one of adamw"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    override: str,
    text: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refuse(capsys, words, tmp_path / "run", override).startswith(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["local.device=cuda"], "local.device=cuda but torch sees no GPU: use auto or cpu"),
        (["eval.device=cuda"], "eval.device=cuda but torch sees no GPU: use auto or cpu"),
        (
            ["execution.cuda_graph=on", "local.precision=bfloat16", "local.device=auto"],
            "execution.cuda_graph=on needs a GPU, workers train on cpu (local.device=auto): use "
            "auto or off",
        ),
    ],
    ids=lambda given: given[0],
)
def test_a_missing_gpu_is_refused(
    overrides: list[str],
    text: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refuse(capsys, words, tmp_path / "run", *overrides) == text


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_directory_that_cannot_be_made_is_refused(
    place: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    out = tmp_path / place
    assert main([*words, f"output_dir={out}"]) == 2
    found = only_error(capsys)
    assert found.startswith(f"output_dir={out} ")
    assert found.endswith("is a file: name a new or an empty folder")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"


def test_an_output_directory_that_holds_a_run_is_refused(
    start: Start, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("run", "rounds=1")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*words, f"output_dir={run.path}"]) == 2
    assert only_error(capsys) == (
        f"output_dir={run.path} already holds a run: give another output_dir, or "
        f"resume={run.path} to go on with it"
    )
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert after == before
