"""Fields of settings: a number with its range, a word with its choices; `checks` reads both."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def number(
    default: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a number and its range; the default gives its type."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return field(default=default, metadata={"bounds": bounds})


def choice(default: str, *options: str) -> Any:
    """Declare a word and the words that it may be."""
    return field(default=default, metadata={"options": options})
