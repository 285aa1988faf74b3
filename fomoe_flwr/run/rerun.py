"""A run that is asked for again, by the same command: what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fomoe_flwr.config import Settings, SettingsError, is_resumable, quoted, read_settings
from fomoe_flwr.run.directory import RunDirectory, stored_rounds

_MOVED = ("output_dir", "resume")
"""Settings that say where a run is, not what it is."""


def words_to_go_on(settings: Settings) -> list[str]:
    """Return the overrides that resume the run in `output_dir`; none if no checkpoint is there.

    What may change in a resume is taken from `settings`. Raises SettingsError that names every
    other setting in which the two differ.
    """
    run = RunDirectory(Path(settings.output_dir))
    if settings.resume or not stored_rounds(run.checkpoints):
        return []
    stored = dict(_flat(read_settings(run.config).to_dict()))
    changed = {
        key: value
        for key, value in _flat(settings.to_dict())
        if key not in _MOVED and value != stored[key]
    }
    others = [f"{k}={v} (there {stored[k]})" for k, v in changed.items() if not is_resumable(k)]
    if others:
        raise SettingsError(
            f"output_dir={run.path} holds a run with other settings: {', '.join(others)}; "
            "give another output_dir, or that run's settings"
        )
    return [f"resume={quoted(str(run.path))}", *(f"{k}={quoted(v)}" for k, v in changed.items())]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
