"""What kind of value a setting takes, in words."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from fomoe_flwr.config.schema import Settings

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def kind_of(key: str) -> str:
    """Say what kind of value the setting `key` takes; nothing for what is no setting."""
    kind: Any = Settings
    for name in key.partition("[")[0].split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return "" if kind is None else _in_words(kind)


def _in_words(kind: Any) -> str:
    if is_dataclass(kind):
        return "a group of settings: set one of them"
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        named = [_in_words(each) for each in parts if each is not type(None)]
        return " or ".join([*named, "null"])
    if origin is list:
        return f"a list, each item {_in_words(parts[0])}"
    if origin is dict:
        return f"a mapping, each value {_in_words(parts[1])}"
    return _WORDS.get(kind, "another kind of value")
