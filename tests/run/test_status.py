"""`fomoe status`: what a person on call reads."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import load_settings
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.heartbeat import Heartbeat
from fomoe_flwr.run.status import run_status, show_status
from fomoe_flwr.run.turnout import Turnout, turnout

NOW = 1_000_000.0


def row(server_round: int, *participants: int, **failures: str) -> dict[str, object]:
    return {
        "round": server_round,
        "round/seconds": 20.0,
        "round/receive_seconds": 18.0,
        "round/eval_seconds": 2.0,
        "round/participants": list(participants),
        "round/failures": {key.removeprefix("w"): why for key, why in failures.items()},
        "round/late_replies": 1,
        "round/ended_unix_seconds": NOW - 600 + 60 * server_round,
        "comm/bytes_up": 2**20,
        "comm/bytes_down": 2**21,
        "eval/loss": 6.0 - server_round / 10,
    }


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    load_settings(["preset=tiny", "rounds=8", "layout.num_workers=3"]).save(run.config)
    for number in (1, 2):
        run.append_metrics(row(number, 0, 1, 2))
    run.append_metrics(row(3, 0, 2, w1="no reply before the round's deadline"))
    run.append_metrics(row(4, 0, 2, w1="no node plays this worker"))
    (run.checkpoints / "round-000004").mkdir(parents=True)
    (run.checkpoints / "round-000004" / "weights").write_bytes(b"x" * 2**20)
    run.write_summary({"status": "running", "start/import_seconds": 6.0, "start/text_seconds": 1.5})
    beat(run, 5.0)
    return run


def beat(run: RunDirectory, seconds_ago: float, *awaited: dict[str, object]) -> None:
    told = {"time": NOW - seconds_ago, "phase": "train", "round": 5, "pid": 7, "host": "berlin"}
    run.heartbeat.write_text(json.dumps({**told, "awaited": awaited}))


def test_a_running_run_says_where_it_is_and_who_is_missing(run: RunDirectory) -> None:
    status = run_status(run.path, NOW)
    assert (status["state"], status["round"], status["rounds"]) == ("running", 4, 8)
    assert status["seconds_left"] == 4 * 20.0
    assert status["seconds_since_heartbeat"] == 5.0
    assert status["missing"] == [
        {
            "worker": 1,
            "since_round": 3,
            "seconds": 600 - 120,
            "reason": "no node plays this worker",
        }
    ]
    assert (status["bytes_up"], status["bytes_down"]) == (4 * 2**20, 8 * 2**20)
    assert status["disk_bytes"] == {"checkpoints": 2**20}
    assert status["late_replies"] == 4
    text = show_status(status)
    for part in (
        "state        running, round 4 of 8, 1.3 min to go",
        "heartbeat    5 s ago, at `train`, pid 7 on berlin",
        "missing      worker 1 since round 3 (8.0 min): no node plays this worker",
        "took part    all others in every round",
        "took part    worker 1 in 2 of 4 rounds, not in the others mostly because: no reply before "
        "the round's deadline",
        "start        7.5 s: import 6.0, text 1.5",
        "last round   20.0 s: receive 18.0, eval 2.0",
        "sent         4.0 MiB up, 8.0 MiB down, 4 replies too late",
        "disk         1.0 MiB: checkpoints 1.0 MiB",
        "checkpoints  round-000004",
    ):
        assert part in text.splitlines()
    assert "go on with" not in text


def test_a_file_with_two_names_counts_once(run: RunDirectory) -> None:
    server = run.path / "server"
    server.mkdir()
    (server / "weights").hardlink_to(run.checkpoints / "round-000004" / "weights")
    (server / "more").write_bytes(b"x" * 100)
    assert run_status(run.path, NOW)["disk_bytes"] == {"checkpoints": 2**20, "server": 100}


def test_a_round_says_whom_it_waits_for(run: RunDirectory) -> None:
    reply = {"worker": 1, "for": "reply", "since": NOW - 252}
    node = {"worker": 2, "for": "node", "since": NOW - 30}
    beat(run, 5.0, reply, node)
    status = run_status(run.path, NOW)
    assert status["awaited"] == [
        {"worker": 1, "for": "reply", "seconds": 252.0},
        {"worker": 2, "for": "node", "seconds": 30.0},
    ]
    lines = show_status(status).splitlines()
    assert "waits for    the reply of worker 1, for 4.2 min" in lines
    assert "waits for    a node of worker 2, for 30 s" in lines


def test_the_heartbeat_says_soon_whom_the_process_waits_for(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat.json"

    def told() -> list[int]:
        return [each["worker"] for each in json.loads(path.read_text("utf-8"))["awaited"]]

    with Heartbeat(path) as heartbeat:
        for workers in ([1, 2], [2], []):
            found = [{"worker": each, "for": "reply", "since": NOW} for each in workers]
            heartbeat.awaited = partial(list, found)
            deadline = time.monotonic() + 20
            while told() != workers:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        heartbeat.awaited = partial(list, [{"worker": 1, "for": "reply", "since": NOW}])
    assert told() == []


@pytest.mark.parametrize("state", ["completed", "failed", "silent"])
def test_a_run_that_is_over_says_nothing_of_the_present(state: str, run: RunDirectory) -> None:
    run.write_summary({"status": "running" if state == "silent" else state})
    beat(run, 600.0, {"worker": 1, "for": "reply", "since": NOW - 700})
    status = run_status(run.path, NOW)
    assert (status["state"], status["missing"], status["awaited"]) == (state, [], [])
    assert status["seconds_left"] is None
    text = show_status(status)
    assert "worker 1 in 2 of 4 rounds" in text
    for word in ("missing", "waits for", "to go", *(["heartbeat"] * (state != "silent"))):
        assert word not in text


@pytest.mark.parametrize(
    ("reasons", "counted", "reason"),
    [
        ([None, None], 2, ""),
        (["no node", "late", "no node"], 0, "no node"),
        (["still at round 3", None, "still at round 4", "no node"], 1, "still at round 4"),
        (["a", "b"], 0, "a"),
        ([], 0, ""),
    ],
)
def test_the_chief_reason_is_the_most_frequent_as_last_told(
    reasons: list[str | None], counted: int, reason: str
) -> None:
    rows = [
        {"round/participants": [1] if why is None else [], "round/failures": {"1": why}}
        for why in reasons
    ]
    _, found = turnout(rows, 2)
    assert found == Turnout(1, counted, len(reasons) - counted, reason)


@pytest.mark.parametrize("seconds_ago", [61.0, 1e6])
def test_a_run_without_a_heartbeat_is_silent_and_can_be_resumed(
    seconds_ago: float, run: RunDirectory
) -> None:
    beat(run, seconds_ago)
    status = run_status(run.path, NOW)
    assert status["state"] == "silent"
    assert f"go on with   fomoe run resume={run.path}" in show_status(status)
    run.heartbeat.unlink()
    assert run_status(run.path, NOW)["state"] == "silent"


def test_a_failed_run_says_why(run: RunDirectory) -> None:
    run.write_summary({"status": "failed", "error": "FederationError: nobody came"})
    assert "error        FederationError: nobody came" in show_status(run_status(run.path, NOW))


def test_a_run_before_its_first_round_has_a_state(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    load_settings(["preset=tiny"]).save(run.config)
    status = run_status(run.path, NOW)
    assert (status["state"], status["round"], status["missing"]) == ("unknown", 0, [])
    assert show_status(status)


def test_the_command_prints_text_or_json_and_refuses_other_folders(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["round"] == 4
    assert main(["status", str(run.path)]) == 0
    assert capsys.readouterr().out.startswith(f"run          {run.path}\n")
    assert main(["status", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
