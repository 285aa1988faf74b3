"""Trackers: the same numbers everywhere, and nothing imported that was not asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fomoe_flwr.cli.main import main
from fomoe_flwr.config import Settings, SettingsError, load_settings
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.tracking import Tracker

ROWS = [
    {"round": 1, "eval/loss": 5.0, "round/participants": [0, 1], "layout/digest": "ab"},
    {"round": 2, "eval/loss": 4.5, "comm/bytes_up": 7},
]


class Fake(ModuleType):
    """Stands for wandb or trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **where: Any) -> None:
        self.calls.append(("init", where))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, numbers)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def track(folder: Path, tracker: str) -> tuple[RunDirectory, Settings]:
    run = RunDirectory(folder / "run-7")
    run.path.mkdir()
    settings = load_settings(["preset=tiny", f"tracker={tracker}"])
    tracking = Tracker(run, settings)
    for row in ROWS:
        tracking.log(row)
    tracking.close()
    assert run.read_metrics() == ROWS
    return run, settings


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_tracker_gets_settings_once_and_numbers_by_round(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    _, settings = track(tmp_path, name)
    (begin, where), *logs, (end, _) = fake.calls
    assert (begin, end) == ("init", "finish")
    assert where["config"] == settings.to_dict()
    assert (where["project"], where["name"], where["resume"]) == ("fomoe", "run-7", "allow")
    assert logs == [
        ("log", (1, {"eval/loss": 5.0})),
        ("log", (2, {"eval/loss": 4.5, "comm/bytes_up": 7.0})),
    ]


def test_tensorboard_is_the_default_and_has_the_numbers(tmp_path: Path) -> None:
    assert load_settings(["preset=tiny"]).tracker == "tensorboard"
    run, _ = track(tmp_path, "tensorboard")
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(1, 5.0), (2, 4.5)]


def test_no_tracker_leaves_the_lines_alone(tmp_path: Path) -> None:
    run, _ = track(tmp_path, "none")
    assert [item.name for item in run.path.iterdir()] == ["metrics.jsonl"]


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match=r"pip install 'fomoe-flwr\[wandb\]'"):
        track(tmp_path, "wandb")
    out = tmp_path / "out"
    assert main(["run", "preset=tiny", "tracker=wandb", f"output_dir={out}"]) == 2
    assert "tracker=wandb is not installed" in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(SettingsError, match="tracker=wandbb is not one of"):
        load_settings(["preset=tiny", "tracker=wandbb"])
