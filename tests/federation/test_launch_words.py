"""The settings that are handed to Flower, and those that it hands back."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from command_line import (
    Start,
)

from fomoe_flwr.config import load_settings
from fomoe_flwr.federation.deployment.launch import words_for
from fomoe_flwr.federation.run_config import settings_of

ROOT = Path(__file__).resolve().parents[2]


def test_words_for_flower_hold_in_any_working_directory(tmp_path: Path) -> None:
    given = ["preset=tiny", "engine=flower", "output_dir=here", "data.path=text", "rounds=3"]
    settings = load_settings(given)
    settings.output_dir = f"{tmp_path}/it's, (new)=1"
    settings.data.path = f"{tmp_path}/a b"
    again = load_settings(words_for(settings, given))
    assert again == settings


def test_words_for_flower_resume_the_same_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start("run", "rounds=1")
    monkeypatch.chdir(run.path.parent)
    given = ["resume=run", "rounds=3", "engine=flower"]
    settings = load_settings(given)
    monkeypatch.chdir("/")
    assert load_settings(words_for(settings, given)) == settings


def test_a_run_config_as_declared_resumes_a_run(start: Start) -> None:
    run = start("run", "rounds=2", "local.schedule=constant")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    config = declared["tool"]["flwr"]["app"]["config"]
    assert settings_of(config | {"resume": str(run.path)}).rounds == 2
    overrides = f"resume={run.path} rounds=3 engine=flower"
    settings = settings_of(config | {"overrides": overrides})
    assert (settings.rounds, settings.output_dir) == (3, str(run.path))
    # What it declares changes nothing where nothing is asked for.
    assert settings_of(config).preset == load_settings([]).preset
