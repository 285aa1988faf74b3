"""Settings that come back: from a run that is resumed, from JSON and from YAML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import choices, refusal

from fomoe_flwr.config import (
    RESUMABLE_KEYS,
    Settings,
    SettingsError,
    load_settings,
    read_settings,
    settings_from_dict,
)


@pytest.fixture
def stored_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    load_settings(["preset=tiny", f"output_dir={run}", "seed=5"]).save(run / "config.yaml")
    return run


@pytest.mark.parametrize(
    "override",
    ["seed=3", "outer=nesterov", "local.lr=1", "preset=demo", "output_dir=/x", "++a=1", "seed.x=5"],
)
def test_resume_refuses_to_change_what_the_run_is(stored_run: Path, override: str) -> None:
    key = override.lstrip("+").partition("=")[0]
    assert refusal(f"resume={stored_run}", override) == (
        f"{key} cannot change when a run is resumed; these can: {', '.join(RESUMABLE_KEYS)}"
    )


def test_resume_refuses_unknown_keys_and_wrong_values(stored_run: Path) -> None:
    assert refusal(f"resume={stored_run}", "checkpoint.evry=3").startswith(
        "checkpoint.evry is not a setting"
    )
    assert refusal(f"resume={stored_run}", "rounds=0") == (
        "rounds=0 is out of range: it must be >= 1"
    )
    assert refusal(f"resume={stored_run}", "rounds=x").startswith("rounds=x is of the wrong kind")


def test_resume_takes_everything_else_from_the_run(stored_run: Path) -> None:
    before = read_settings(stored_run / "config.yaml")
    settings = load_settings(
        [f"resume={stored_run}", "rounds=9", "checkpoint.keep=5", "local.threads=1", "seed=5"]
    )
    before.rounds, before.checkpoint.keep, before.local.threads = 9, 5, 1
    before.resume = str(stored_run)
    assert settings == before


def test_resume_of_something_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert refusal(f"resume={tmp_path}") == (
        f"resume={tmp_path} is not a run directory: it has no config.yaml"
    )


def test_resume_of_a_run_with_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rounds: [1", encoding="utf-8")
    assert refusal(f"resume={tmp_path}").startswith(
        f"cannot read settings from {tmp_path / 'config.yaml'}: "
    )


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_settings_survive_json_and_yaml(experiment: str, tmp_path: Path) -> None:
    settings = load_settings(
        ["preset=tiny", f"experiment={experiment}", "local.lr=1e-05", "data.text_key='a: #b'"]
    )
    assert settings_from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    settings.save(tmp_path / "config.yaml")
    assert read_settings(tmp_path / "config.yaml") == settings


def test_settings_that_travelled_are_checked_again() -> None:
    settings = Settings().to_dict()
    with pytest.raises(SettingsError, match=r"^stranger is not a setting"):
        settings_from_dict(settings | {"stranger": 1})
    with pytest.raises(SettingsError, match=r"^rounds=0 is out of range"):
        settings_from_dict(settings | {"rounds": 0})
    with pytest.raises(SettingsError, match=r"^layout.overlap=9 needs"):
        settings_from_dict(settings | {"layout": settings["layout"] | {"overlap": 9}})
