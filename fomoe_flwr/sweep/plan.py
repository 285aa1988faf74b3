"""The plan of a sweep: its jobs, known and checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException

from fomoe_flwr.config import Settings, SettingsError, load_settings, parse_overrides
from fomoe_flwr.costs import layout_context
from fomoe_flwr.errors import InputError, one_line
from fomoe_flwr.files import save_json
from fomoe_flwr.layout import check_layout
from fomoe_flwr.model.source import settle
from fomoe_flwr.parameters.shapes import num_sparse_layers

_LONGEST_NAME = 120
_OWNED = ("output_dir", "resume")
"""Settings that every job gets from the sweep."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    """Folder under `jobs/`: what varies, and a digest of all settings."""
    overrides: tuple[str, ...]
    varied: Mapping[str, str]
    """Key -> value of what varies over the sweep."""
    refusal: str = ""
    """Why this combination cannot run; empty if it can."""

    @property
    def label(self) -> str:
        """What tells this job from the others, for people."""
        return ", ".join(f"{key}={value}" for key, value in self.varied.items()) or self.name

    def save(self, path: Path) -> None:
        """Write down a job that no plan foresaw."""
        save_json(asdict(self), path)

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Job:
        """Rebuild a job from JSON."""
        return Job(**{**fields, "overrides": tuple(fields["overrides"])})

    @staticmethod
    def load(path: Path) -> Job:
        """Read a job that no plan foresaw."""
        return Job.of(json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Plan:
    """All jobs of a sweep, in Hydra's order."""

    words: tuple[str, ...]
    """The overrides that gave the plan."""
    launcher: tuple[str, ...]
    """Overrides of Hydra itself: its launcher, its sweeper."""
    jobs: tuple[Job, ...]
    """Empty if a sweeper other than the basic one will draw them as it goes."""

    def save(self, path: Path) -> None:
        """Write the plan down."""
        save_json(asdict(self), path)

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a stored plan. Raises SettingsError."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            jobs = tuple(Job.of(fields) for fields in stored["jobs"])
            return Plan(tuple(stored["words"]), tuple(stored["launcher"]), jobs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{path.parent} is not a sweep: cannot read {path.name} ({one_line(error)})"
            ) from error


def plan_sweep(words: Sequence[str]) -> Plan:
    """Expand a sweep's overrides exactly as Hydra's basic sweeper will, and check every job.

    Raises SettingsError for words that no job could take; a combination that contradicts itself is
    a job with a refusal.
    """
    parsed = parse_overrides(words)
    launcher = [o for o in parsed if o.is_hydra_override()]
    settings = [o for o in parsed if not o.is_hydra_override()]
    for override in launcher:
        if not re.match(
            r"hydra[./](launcher|sweeper|verbose|hydra_logging|job_logging)\b",
            override.key_or_group,
        ):
            raise SettingsError(
                f"{override.input_line} is at odds with a sweep, which sets Hydra's folders and "
                "mode itself; hydra.launcher and hydra.sweeper are free, and --dir names the folder"
            )
    for override in settings:
        if override.key_or_group in _OWNED:
            raise SettingsError(
                f"{override.key_or_group} is not a setting of a sweep: every job has its own; "
                "--dir names the sweep's folder"
            )
    kept = tuple(str(o.input_line) for o in settings), tuple(str(o.input_line) for o in launcher)
    if any(override.key_or_group == "hydra/sweeper" for override in launcher):
        return Plan(*kept, ())
    try:
        combinations = BasicSweeper.split_arguments(settings, max_batch_size=None)[0]
    except HydraException as error:
        raise SettingsError(one_line(error)) from error
    varying = [o.get_key_element() for o in settings if o.is_sweep_override()]
    jobs = [_job(combination, varying) for combination in combinations]
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"{twice[0]} would be run twice: drop the value that is given twice")
    return Plan(*kept, tuple(jobs))


def drawn_job(overrides: Sequence[str]) -> Job:
    """Return the job for overrides that a sweeper drew; the run itself will check them."""
    values = dict(word.split("=", 1) for word in overrides)
    return Job(f"drawn-{_digest(sorted(overrides))}", tuple(overrides), values)


def job_name(settings: Settings, varied: Mapping[str, str]) -> str:
    """Name a job by what varies and by a digest of all its settings.

    So a sweep that goes on finds what it has done by content, whatever the order of its jobs, and
    never takes a run with other settings for its own.
    """
    fields = {k: v for k, v in settings.to_dict().items() if k not in (*_OWNED, "costs")}
    label = "_".join(f"{key.split('.')[-1]}-{value}" for key, value in varied.items()) or "job"
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", label)[:_LONGEST_NAME]
    return f"{clean}-{_digest(fields)}"


def _job(overrides: Sequence[str], varying: Sequence[str]) -> Job:
    values = dict(word.split("=", 1) for word in overrides)
    varied = {key: values[key] for key in varying}
    try:
        settings = load_settings(overrides, settle)
        model = settings.model
        layers, context = num_sparse_layers(model), layout_context(settings)
        check_layout(settings.layout, layers, model.num_experts, context)
    except InputError as error:
        return Job(f"refused-{_digest(list(overrides))}", tuple(overrides), varied, str(error))
    return Job(job_name(settings, varied), tuple(overrides), varied)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
