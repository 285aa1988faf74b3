"""The step benchmark runs the real step, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import main

TINY = ["preset=tiny", "local.batch_size=2", "local.device=cpu", "local.threads=1"]


def test_every_variant_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    words = ["bench", "step", *TINY, "--share", "1", "--share", "0.5", "--share", "0"]
    assert main([*words, "--steps", "2", "--warmup", "1", "--json", "--to", str(path)]) == 0
    document = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == document
    rows = {row["variant"]: row for row in document["rows"]}
    assert list(rows) == [
        "stock grouped_mm",
        "plain Trainer step",
        "share 1",
        "share 0.5",
        "share 0",
    ]
    full, half, none = (rows[name] for name in ("share 1", "share 0.5", "share 0"))
    assert full["resident_share"] == 1.0
    assert 0.2 < half["resident_share"] < 0.8
    assert none["resident_share"] == 0.0
    assert none["parameters"] < half["parameters"] < full["parameters"]
    assert full["speedup"] == full["flop_limit"] == 1.0
    f = document["expert_flop_share"]
    assert half["flop_limit"] == pytest.approx(1 / (1 - f * (1 - half["resident_share"])))
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / row["seconds_per_step"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["flop_limit"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--share", "1.5"], "--share 1.5 is out of range: it must be >= 0 and <= 1"),
        (["--steps", "0"], "--steps 0 is out of range: it must be >= 1"),
        (["model=olmo"], "model=olmo is not one of "),
    ],
)
def test_wrong_values_are_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "step", *TINY, *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")
