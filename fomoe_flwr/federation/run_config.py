"""Flower's run config: flat scalars that reach the same settings as the command line.

`[tool.flwr.app.config]` in pyproject.toml declares the everyday keys, empty by default, and
`overrides`, one string that takes any Hydra override.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from fomoe_flwr.config import Settings, SettingsError, load_settings, quoted
from fomoe_flwr.model.source import settle
from fomoe_flwr.run.directory import default_output_dir

EVERYDAY = {
    "preset": "preset",
    "experiment": "experiment",
    "rounds": "rounds",
    "seed": "seed",
    "output-dir": "output_dir",
    "resume": "resume",
    "num-workers": "layout.num_workers",
    "overlap": "layout.overlap",
    "routing": "model.routing",
    "local-steps": "local.steps",
}
"""Run-config key -> setting."""


def settings_of(run_config: Mapping[str, object]) -> Settings:
    """Compose the settings of a run config; unset keys are "" or -1.

    Without an output directory the run goes to `~/fomoe-runs`, because a ServerApp's working
    directory is that of whoever started the SuperLink.
    """
    overrides = [
        f"{setting}={quoted(run_config[key])}"
        for key, setting in EVERYDAY.items()
        if run_config.get(key, "") not in ("", -1)
    ]
    text = str(run_config.get("overrides", ""))
    try:
        overrides += shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"overrides={text!r} cannot be split into words: {error}") from error
    settings = load_settings(overrides, settle)
    if not settings.output_dir:
        settings.output_dir = str(default_output_dir(settings, Path.home() / "fomoe-runs"))
    settings.output_dir = str(Path(settings.output_dir).expanduser())
    return settings
