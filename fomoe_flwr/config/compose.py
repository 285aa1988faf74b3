"""From `conf/` and Hydra overrides, or from a stored run, to checked settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from fomoe_flwr.config.checks import check, did_you_mean
from fomoe_flwr.config.kinds import kind_of
from fomoe_flwr.config.literals import literal
from fomoe_flwr.config.overrides import check_paths, parse_values, refuse_reference
from fomoe_flwr.config.paper_rows import ROWS
from fomoe_flwr.config.schema import Settings
from fomoe_flwr.errors import SettingsError, one_line

RESUMABLE_KEYS = (
    "rounds",
    "engine",
    "resume",
    "tracker",
    "checkpoint",
    "federation",
    "costs",
    "eval",
    "execution",
    "local.device",
    "local.threads",
    "local.parallel",
    "local.processes",
    "data.path",
)
"""What may change when a run is resumed; everything else is the run's identity. Text may move, but
`data/inventory.py` sees to it that it is the same."""


Settle = Callable[[Settings, set[str]], Settings]

_MOST_NAMED = 20
"""Choices of a group that an error lists."""


def conf_dir() -> Path:
    """Return the folder of Hydra groups: beside the package (checkout, bundle), else inside it."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "conf", package / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise SettingsError(f"no conf/config.yaml beside {package}: reinstall fomoe-flwr")


def load_settings(overrides: Iterable[str] = (), settle: Settle | None = None) -> Settings:
    """Compose `conf/` with Hydra overrides and return checked settings.

    `settle` takes new settings and the names of those that were given one by one, and may complete
    them before they are checked: `model.source` does, where a model is described elsewhere.
    Raises SettingsError, one line, for an unknown key, a wrong type, a value out of range or
    values that contradict each other. With `resume=RUN_DIR` the stored settings of that run are
    taken and only `RESUMABLE_KEYS` may be overridden.
    """
    overrides = list(overrides)
    parsed = parse_values(overrides)
    targets = [override.value() for override in parsed if override.key_or_group == "resume"]
    resume = OmegaConf.create({"resume": targets[-1] if targets else ""})
    check_paths(parsed)
    if resume.resume:
        settings = _stored(str(resume.resume), parsed)
    else:
        settings = _composed(parsed)
        if settle is not None:
            settings = settle(settings, {override.key_or_group for override in parsed})
    check(settings)
    return settings


def is_resumable(key: str) -> bool:
    """Tell whether a setting may change when a run is resumed."""
    return any(key == k or key.startswith(k + ".") for k in RESUMABLE_KEYS)


@contextmanager
def paper_rows_known(words: Iterable[str]) -> Iterator[None]:
    """Make `paper=<row>` known to Hydra for a while, if a word asks for one.

    Hydra copies all presets that it knows whenever it composes, and 180 of them take longer than
    everything else.
    """
    known = ConfigStore.instance()
    asked = any(word.lstrip("+").startswith("paper=") for word in words)
    if not asked or "paper" in known.repo:
        yield
        return
    for row in ROWS:
        known.store(group="paper", name=row.name, package="_global_", node=row.node())
    try:
        yield
    finally:
        del known.repo["paper"]


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run directory: a run stores its settings before anything else."""
    return (folder / "config.yaml").is_file()


def find_run(given: str | Path, key: str = "") -> Path:
    """Return the absolute path of a run directory, as a person gave it with the setting `key`.

    Raises SettingsError, one line, for a folder that is no run directory.
    """
    path = Path(given).expanduser().resolve()
    if not is_run(path):
        name = f"{key}={given}" if key else given
        raise SettingsError(f"{name} is not a run directory: it has no config.yaml")
    return path


def read_settings(path: Path) -> Settings:
    """Read the settings that a run stored as `config.yaml`."""
    try:
        stored = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise SettingsError(f"cannot read settings from {path}: {one_line(error)}") from error
    try:
        return _typed(stored)
    except SettingsError as error:
        raise SettingsError(f"{path} is not the config.yaml of a run: {error}") from error


def settings_from_dict(fields: Mapping[str, Any]) -> Settings:
    """Rebuild settings that travelled as JSON, with the same checks."""
    settings = _typed(OmegaConf.create(literal(dict(fields))))
    check(settings)
    return settings


def _known_keys(node: Any, prefix: str = "") -> Iterable[str]:
    for item in fields(node):
        key = prefix + item.name
        yield key
        value = getattr(node, item.name)
        if is_dataclass(value):
            yield from _known_keys(value, key + ".")


def _unknown_key(key: str) -> SettingsError:
    # A group is no answer to who looks for a key in it.
    known = [each for each in _known_keys(Settings()) if not key.startswith(f"{each}.")]
    hint = did_you_mean(key, known) or _neighbours(key, known) or "; see conf/ for all settings"
    return SettingsError(f"{key} is not a setting{hint}")


def _neighbours(key: str, known: Iterable[str]) -> str:
    group = key.rpartition(".")[0]
    names = [each.rpartition(".")[2] for each in known if group == each.rpartition(".")[0]]
    if not group or not names:
        return ""
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMED else ""
    return f"; {group} has {', '.join(names[:_MOST_NAMED])}{more}"


def _typed(node: Any, overrides: Iterable[Override] = ()) -> Settings:
    """Merge a plain config into the schema: unknown keys and wrong types are refused."""
    try:
        # A composed config already carries the schema and would wave `+extra` keys through.
        plain = OmegaConf.to_container(node, resolve=True)
        merged = OmegaConf.merge(_schema(), OmegaConf.create(literal(_respelt(plain))))
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, overrides) from error
    assert isinstance(settings, Settings)
    return settings


def _respelt(plain: Any) -> Any:
    """Read true and false where a word took their place."""
    execution = plain.get("execution") if isinstance(plain, dict) else None
    if isinstance(execution, dict):
        words = {"true": "on", "false": "off"}
        given = execution.get("cuda_graph")
        respelt = words.get(str(given).lower(), given)
        plain = plain | {"execution": execution | {"cuda_graph": respelt}}
    return plain


@cache
def _schema() -> Any:
    # Making it takes longer than a merge, which copies it.
    return OmegaConf.structured(Settings)


def _explain(error: OmegaConfBaseException, overrides: Iterable[Override] = ()) -> SettingsError:
    key = str(getattr(error, "full_key", "") or "")
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        for override in overrides:
            if "${" in str(override.input_line) and key in ("", override.key_or_group):
                return refuse_reference(override)
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        longer = [each.key_or_group for each in overrides]
        return _unknown_key(next((each for each in longer if each.startswith(f"{key}.")), key))
    if isinstance(error, ValidationError) and (kind := kind_of(key)):
        return SettingsError(
            f"{key}{_given(key, error, overrides)} is of the wrong kind: it must be {kind}"
        )
    reason = one_line(str(error).splitlines()[0])
    return SettingsError(f"{key}: {reason}" if key else reason)


def _given(key: str, error: ValidationError, overrides: Iterable[Override]) -> str:
    """Return `=VALUE` as the last override of a key wrote it, else as the error names it."""
    words = [str(each.input_line) for each in overrides if each.key_or_group == key]
    if words:
        return f"={words[-1].partition('=')[2]}"
    named = re.match(r"Value '(.*)' of type", one_line(error))
    return f"={named[1]}" if named else ""


def _composed(overrides: Sequence[Override]) -> Settings:
    for override in overrides:
        _check_choice(override)
    words = [str(override.input_line) for override in overrides if not _is_entry(override)]
    # Flower's simulation actors and in-process runs reuse processes, and Hydra's state is global.
    GlobalHydra.instance().clear()
    try:
        folder = initialize_config_dir(str(conf_dir()), version_base="1.3")
        with folder, paper_rows_known(words):
            composed = compose("config", overrides=words)
    except MissingConfigException as error:
        group, _, choice = str(error.missing_cfg_file).partition("/")
        raise _unknown_choice(group, choice, error.options or []) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _override_error(error, overrides) from error
    finally:
        GlobalHydra.instance().clear()
    for override in filter(_is_entry, overrides):
        try:
            OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)
        except OmegaConfBaseException as error:
            raise SettingsError(
                f"{override.input_line}: model.entries must be names with values, e.g. "
                "model.entries={n_group:1}"
            ) from error
    return _typed(composed, overrides)


def _is_entry(override: Override) -> bool:
    """Tell an override of `model.entries`, whose names Hydra cannot know."""
    return f"{override.key_or_group}.".startswith("model.entries.")


def _check_choice(override: Override) -> None:
    """Refuse what is no name where a group takes the name of one of its files."""
    group, value = override.key_or_group, override.value()
    is_name = isinstance(value, str | dict) and "${" not in value
    if group in _groups() and not is_name:
        word = str(override.input_line).partition("=")[2]
        raise _unknown_choice(group, word, _groups()[group])


@cache
def _groups() -> Mapping[str, Sequence[str]]:
    """Return the choices of every group."""
    groups = {
        folder.name: [file.stem for file in folder.glob("*.yaml")]
        for folder in conf_dir().iterdir()
        if folder.is_dir()
    }
    return groups | {"paper": [row.name for row in ROWS]}


def _unknown_choice(group: str, choice: str, known: Iterable[str]) -> SettingsError:
    options = sorted(map(str, known))
    near = did_you_mean(choice, options)
    if len(options) > _MOST_NAMED:
        options = [*options[:_MOST_NAMED], f"... ({len(options)} in all)"]
    return SettingsError(f"{group}={choice} is not one of {', '.join(options)}{near}")


def _override_error(error: Exception, overrides: Iterable[Override]) -> SettingsError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return _explain(cause, overrides)
        cause = cause.__cause__
    found = re.match(r"Could not override '([^']+)'", str(error))
    if found:
        return _unknown_key(found[1])
    return SettingsError(one_line(str(error).split("See https://")[0]))


def _stored(resume: str, overrides: Iterable[Override]) -> Settings:
    run_dir = find_run(resume, "resume")
    overrides = list(overrides)
    node = OmegaConf.create(literal(read_settings(run_dir / "config.yaml").to_dict()))
    for override in overrides:
        key = override.key_or_group
        if not is_resumable(key):
            before = OmegaConf.select(node, key, throw_on_resolution_failure=False)
            if before is not None and before == override.value():
                continue
            raise SettingsError(
                f"{key} cannot change when a run is resumed; these can: {', '.join(RESUMABLE_KEYS)}"
            )
        OmegaConf.update(node, key, override.value(), force_add=False)
    node.resume = node.output_dir = literal(str(run_dir))
    return _typed(node, overrides)


ConfigStore.instance().store(name="settings", node=Settings)
