"""The two ways in which a command ends without success; both carry one line for people."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Input that cannot be used: nothing was started (exit status 2)."""


class RunError(RuntimeError):
    """A run that could not go on (exit status 1)."""


def one_line(error: object) -> str:
    """Fold an error's text into one line."""
    return re.sub(r"\s+", " ", str(error)).strip()
