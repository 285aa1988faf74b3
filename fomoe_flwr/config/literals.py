"""Text as it is: OmegaConf takes `${name}` in any text for the value of another setting."""

from __future__ import annotations

import re
from typing import Any


def literal(value: Any) -> Any:
    """Return text, or text in nested dictionaries and lists, that OmegaConf reads as `value`."""
    if isinstance(value, str):
        # Only before `${` is a backslash more than itself.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [literal(each) for each in value]
    return value
