"""Explicit layouts: read from a file that a person or another program wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fomoe_flwr.config import LayoutSettings, SettingsError
from fomoe_flwr.errors import one_line
from fomoe_flwr.layout.table import Layout

_FORM = "[layer][worker] -> expert ids, or one layer for all"


def read_layout(settings: LayoutSettings, num_layers: int, num_experts: int) -> Layout:
    """Read `layout.path`: lists in the form of `Layout.to_json`, of all layers or one for all.

    Experts may have different numbers of holders, but each has one, and no worker is without an
    expert. Raises SettingsError, one line that names the place, for anything else.
    """
    data = _parse(settings.path)
    where = f"layout.path={settings.path}"
    if not _is_list(data) or not data:
        raise SettingsError(f"{where} must hold lists: {_FORM}")
    if len(data) not in (1, num_layers):
        raise SettingsError(
            f"{where} has {len(data)} layers, model.num_layers={num_layers} needs {num_layers} "
            "(or 1 for all layers)"
        )
    layers = []
    for layer, workers in enumerate(data):
        if not _is_list(workers) or len(workers) != settings.num_workers:
            found = f"{len(workers)} workers" if _is_list(workers) else "no list of workers"
            raise SettingsError(
                f"{where}: layer {layer} has {found}, layout.num_workers={settings.num_workers} "
                f"needs {settings.num_workers}"
            )
        layers.append(
            tuple(
                _checked(experts, num_experts, f"{where}: worker {worker} of layer {layer}")
                for worker, experts in enumerate(workers)
            )
        )
        held = {expert for experts in layers[-1] for expert in experts}
        if missing := [expert for expert in range(num_experts) if expert not in held]:
            raise SettingsError(
                f"{where}: expert {missing[0]} of layer {layer} has no holder; every expert from 0 "
                f"to model.num_experts-1={num_experts - 1} needs one"
            )
    return Layout(num_experts, tuple(layers) * (num_layers if len(layers) == 1 else 1))


def _parse(path: str) -> Any:
    if not path:
        raise SettingsError(
            f"layout.kind=explicit needs layout.path: a .json or .yaml file, {_FORM}"
        )
    file = Path(path).expanduser()
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise SettingsError(f"layout.path={path} is not a .json, .yaml or .yml file")
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"layout.path={path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"layout.path={path} cannot be read: {one_line(error)}") from error


def _checked(experts: Any, num_experts: int, where: str) -> tuple[int, ...]:
    if not _is_list(experts) or not experts:
        raise SettingsError(f"{where} must be a list of at least one expert id")
    for expert in experts:
        if type(expert) is not int or not 0 <= expert < num_experts:
            raise SettingsError(
                f"{where} holds expert {expert}: it must be an integer from 0 to "
                f"model.num_experts-1={num_experts - 1}"
            )
    for first, second in zip(sorted(experts), sorted(experts)[1:], strict=False):
        if first == second:
            raise SettingsError(f"{where} holds expert {first} twice")
    return tuple(sorted(experts))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
