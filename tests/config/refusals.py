"""What tests of settings ask for: the choices of a group, the line of a refusal, all keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from fomoe_flwr.config import (
    SettingsError,
    conf_dir,
    load_settings,
)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def refusal(*overrides: str) -> str:
    """Return the one line that `overrides` are refused with."""
    with pytest.raises(SettingsError) as caught:
        load_settings(overrides)
    text = str(caught.value)
    assert text == text.strip()
    assert "\n" not in text
    return text


def known_keys(node: Any, prefix: str = "") -> Iterable[str]:
    for item in fields(node):
        value = getattr(node, item.name)
        yield prefix + item.name
        if is_dataclass(value):
            yield from known_keys(value, f"{prefix}{item.name}.")
