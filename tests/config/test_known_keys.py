"""The same keys everywhere: dataclasses, `conf/`, and the run config of Flower."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from refusals import known_keys

from fomoe_flwr.config import (
    RESUMABLE_KEYS,
    Settings,
    SettingsError,
    conf_dir,
    load_settings,
)
from fomoe_flwr.federation.run_config import EVERYDAY, settings_of

ROOT = Path(__file__).resolve().parents[2]


def test_conf_and_dataclasses_know_the_same_keys() -> None:
    known = set(known_keys(Settings()))
    for path in conf_dir().rglob("*.yaml"):
        group = path.parent.relative_to(conf_dir()).as_posix()
        is_global = group in ("preset", "experiment", "paper", ".")
        content = OmegaConf.to_container(OmegaConf.load(path)) or {}
        assert isinstance(content, dict)
        content.pop("defaults", None)
        # Hydra's own part, in `conf/sweep.yaml`.
        content.pop("hydra", None)
        prefix = "" if is_global else f"{group}."

        def leaves(node: dict[Any, Any], prefix: str) -> Iterable[str]:
            for key, value in node.items():
                yield f"{prefix}{key}"
                if isinstance(value, dict):
                    yield from leaves(value, f"{prefix}{key}.")

        assert set(leaves(content, prefix)) - known == set(), path


def test_every_resumable_key_is_a_setting() -> None:
    assert set(RESUMABLE_KEYS) <= set(known_keys(Settings()))


def test_pyproject_declares_exactly_the_keys_that_the_apps_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = project["tool"]["flwr"]["app"]["config"]
    assert set(declared) == set(EVERYDAY) | {"state-dir", "overrides"}
    assert set(EVERYDAY.values()) <= set(known_keys(Settings()))
    settings = settings_of(declared | {"output-dir": "/somewhere"})
    assert settings == load_settings(["output_dir=/somewhere"])


def test_run_config_and_command_line_give_the_same_settings() -> None:
    run_config = {
        "preset": "tiny",
        "rounds": 3,
        "seed": -1,
        "resume": "",
        "num-workers": 4,
        "overlap": 2,
        "output-dir": "/some where",
        "overrides": "layout.kind=random data.path='/a b' outer=nesterov",
    }
    assert settings_of(run_config) == load_settings(
        [
            "preset=tiny",
            "rounds=3",
            "layout.num_workers=4",
            "layout.overlap=2",
            "output_dir='/some where'",
            "layout.kind=random",
            "data.path='/a b'",
            "outer=nesterov",
        ]
    )


def test_overrides_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(SettingsError, match="cannot be split into words"):
        settings_of({"overrides": "data.path='/a"})
