"""Sites, read from a YAML file: memory, computing power and link of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fomoe_flwr.config import SettingsError
from fomoe_flwr.config.checks import did_you_mean
from fomoe_flwr.costs import Site
from fomoe_flwr.errors import one_line

_REQUIRED = ("memory_gib", "teraflops", "up_mbps", "down_mbps")
_OPTIONAL = {"latency_seconds": 0.05, "mfu": 0.4, "state_gb_per_second": math.inf}
_EXAMPLE = "{name: oslo, memory_gib: 80, teraflops: 400, up_mbps: 1000, down_mbps: 1000}"


@dataclass(frozen=True)
class NamedSite:
    """A site as its file describes it."""

    name: str
    memory_bytes: float
    site: Site


@dataclass(frozen=True)
class Sites:
    """All sites, and the server's link."""

    sites: tuple[NamedSite, ...]
    server_bits_per_second: float = math.inf


def read_sites(path: Path) -> Sites:
    """Read a sites file; raise SettingsError, one line, for anything that cannot be planned with.

    Its keys: `sites`, a list with `name`, `memory_gib`, `teraflops` (peak of all accelerators of
    the site, 10^12 FLOP/s), `up_mbps` and `down_mbps` (10^6 bit/s), and if need be
    `latency_seconds`, `mfu` and `state_gb_per_second` (the optimizer's pass over the training
    state); and `server_mbps`, if the server's link can hold anybody up.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read sites from {path}: {one_line(error)}") from error
    if not isinstance(document, dict) or not isinstance(document.get("sites"), list):
        raise SettingsError(f"{path} has no list `sites`; an entry of it: {_EXAMPLE}")
    _check_keys(document, ("sites", "server_mbps"), str(path))
    if not document["sites"]:
        raise SettingsError(f"{path}: the list `sites` is empty; an entry of it: {_EXAMPLE}")
    sites = tuple(_site(entry, index, path) for index, entry in enumerate(document["sites"]))
    names = [site.name for site in sites]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"{path}: two sites have the name {name}: names must differ")
    server = document.get("server_mbps")
    if server is None:
        return Sites(sites)
    return Sites(sites, 1e6 * _number(server, "server_mbps", str(path)))


def _site(entry: Any, index: int, path: Path) -> NamedSite:
    place = f"{path}: sites[{index}]"
    if not isinstance(entry, dict):
        raise SettingsError(f"{place} must be a mapping such as {_EXAMPLE}")
    _check_keys(entry, ("name", *_REQUIRED, *_OPTIONAL), place)
    for key in _REQUIRED:
        if key not in entry:
            raise SettingsError(f"{place} has no {key}; an entry has at least {_EXAMPLE}")
    values = {key: _number(entry[key], key, place) for key in _REQUIRED}
    for key, default in _OPTIONAL.items():
        values[key] = _number(entry[key], key, place) if key in entry else default
    return NamedSite(
        name=str(entry.get("name", f"site-{index}")),
        memory_bytes=values["memory_gib"] * 2**30,
        site=Site(
            values["teraflops"] * 1e12 * values["mfu"],
            values["up_mbps"] * 1e6,
            values["down_mbps"] * 1e6,
            values["latency_seconds"],
            values["state_gb_per_second"] * 1e9,
        ),
    )


def _check_keys(entry: Mapping[Any, Any], known: tuple[str, ...], place: str) -> None:
    for key in entry:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; it knows {', '.join(known)}"
            raise SettingsError(f"{place}: {key} is not a key{hint}")


def _number(value: Any, key: str, place: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise SettingsError(f"{place}: {key}={value} must be a finite number")
    if key == "latency_seconds":
        if value < 0:
            raise SettingsError(f"{place}: {key}={value} is out of range: it must be >= 0")
    elif value <= 0:
        raise SettingsError(f"{place}: {key}={value} is out of range: it must be > 0")
    if key == "mfu" and value > 1:
        raise SettingsError(f"{place}: {key}={value} is out of range: it must be > 0 and <= 1")
    return float(value)
