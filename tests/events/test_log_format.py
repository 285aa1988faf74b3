"""`--log-format json`: every line of stdout is an event, and every kind of event is there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest

from fomoe_flwr import events

RUN = (
    *("run", "preset=tiny", "rounds=2", "local.threads=1", "local.steps=1"),
    *("local.batch_size=2", "eval.max_tokens=512", "eval.sample_tokens=2", "--log-format", "json"),
)


def told(*words: str, code: str = "") -> tuple[int, list[dict[str, Any]]]:
    """Run a command after some code; return its exit status and its events."""
    script = f"{code}\nimport sys\nfrom fomoe_flwr.cli.main import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row.keys() > {"event", "time"}
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    return done.returncode, rows


def kinds(rows: list[dict[str, Any]]) -> list[str]:
    return [row["event"] for row in rows]


def test_a_run_tells_its_banner_its_rounds_its_warnings_and_its_end(tmp_path: Any) -> None:
    code = (
        "import warnings\n"
        "from fomoe_flwr.report import live\n"
        "def draw(run): raise OSError('no ink')\n"
        "live.draw_beside = draw"
    )
    status, rows = told(*RUN, f"output_dir={tmp_path}", code=code)
    assert status == 0
    found = kinds(rows)
    assert [kind for kind in found if kind not in ("log", "warning")] == [
        *("start", "before", "round", "round", "summary", "run_directory", "end")
    ]
    by_kind = {row["event"]: row for row in rows}
    assert by_kind["start"]["run_directory"] == str(tmp_path)
    assert by_kind["start"]["params/total"] > 0
    assert by_kind["round"]["round"] == by_kind["round"]["rounds"] == 2
    assert by_kind["round"]["eval/loss"] > 0
    assert "no ink" in by_kind["warning"]["text"]
    assert by_kind["summary"]["status"] == "completed"
    assert by_kind["end"]["exit_status"] == 0
    assert any("Starting" in row["text"] for row in rows if row["event"] == "log")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("run", "rounds=0"), 2),
        (("run", "nothing=1"), 2),
        (("sweep",), 2),
        (("run", "--nonsense"), 2),
        (("sweep", "--invalid", "maybe"), 2),
        (("federation", "run"), 2),
    ],
)
def test_a_refusal_is_an_event_and_the_last_line_has_the_exit_status(
    words: tuple[str, ...], status: int
) -> None:
    ended, rows = told(*words, "--log-format", "json")
    assert (ended, kinds(rows)) == (status, ["error", "end"])
    assert rows[-1]["exit_status"] == status


@pytest.mark.slow
def test_a_run_on_flowers_engine_and_a_sweep_tell_events(tmp_path: Any) -> None:
    status, rows = told(*RUN, f"output_dir={tmp_path / 'run'}", "engine=flower")
    assert status == 0
    assert {"command", "start", "round", "summary", "end"} <= set(kinds(rows))
    assert "\x1b" not in (tmp_path / "run" / "flower" / "superlink.log").read_text("utf-8")
    words = ("sweep", "seed=0,1", *RUN[1:], "--dir", str(tmp_path / "sweep"))
    status, rows = told(*words)
    assert (status, kinds(rows)) == (0, ["sweep", "job", "job", "summary", "end"])
    assert {row["status"] for row in rows if row["event"] == "job"} == {"completed"}


@pytest.mark.slow
@pytest.mark.flower
def test_a_federation_tells_events_and_its_logs_have_no_colours(tmp_path: Any) -> None:
    folder, out = str(tmp_path / "f"), f"output_dir={tmp_path / 'run'}"
    status, rows = told("federation", "run", folder, "--nodes", "2", *RUN[1:], out)
    assert (status, kinds(rows)) == (0, ["submission", "submission", "summary", "end"])
    assert [worker["counted"] for worker in rows[2]["workers"]] == [2, 2]
    logs = list((tmp_path / "f" / "logs").glob("*.log"))
    assert len(logs) == 4
    assert not any("\x1b" in log.read_text("utf-8") for log in logs)


@pytest.fixture
def in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell JSON for one test, and leave logging and warnings as they were."""
    monkeypatch.setattr(events, "_format", "text")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("flwr"), "filters", [])
    monkeypatch.setenv(events.VARIABLE, "")
    events.use_format("json")


@pytest.mark.usefixtures("in_json")
@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("\x1b[92mINFO \x1b[0m:  hello", "log"),
        ("\x1b[93mWARNING \x1b[0m:  oh", "warning"),
        ('{"event": "round", "time": 1.0, "round": 3}', "round"),
        ("[1, 2]", "log"),
        ("", None),
    ],
)
def test_a_line_of_another_process_becomes_an_event(
    line: str, event: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    events.pass_on(line)
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert kinds(rows) == [event] * (event is not None)
    assert "\x1b" not in str(rows)


@pytest.mark.usefixtures("in_json")
def test_what_json_lacks_is_null_and_any_text_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events.tell("round", loss=float("nan"), parts=[float("inf"), {"a": 1}], text="é\n\udcff")
    logging.getLogger("flwr").warning("too %s", "late")
    warnings.warn("no report", stacklevel=1)
    round_row, log_row, warning = [
        json.loads(line, parse_constant=pytest.fail)
        for line in capsys.readouterr().out.splitlines()
    ]
    assert (round_row["loss"], round_row["parts"]) == (None, [None, {"a": 1}])
    assert round_row["text"] == "é\n\udcff"
    assert (log_row["event"], log_row["text"]) == ("warning", "too late")
    assert (warning["event"], warning["category"]) == ("warning", "UserWarning")
    assert os.environ[events.VARIABLE] == "json"
