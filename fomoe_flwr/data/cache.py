"""Where this machine keeps what can be made again: tokenizers and tokenised text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fomoe_flwr.data import DataError
from fomoe_flwr.errors import one_line

_WAY_ON = "set XDG_CACHE_HOME to a folder that can be written and has room"


def cache_dir() -> Path:
    """Return the user's cache folder for this project (XDG), not yet created. Raises DataError."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise DataError(f"this user has no home folder to cache in: {_WAY_ON}") from None
    return Path(base) / "fomoe"


@contextmanager
def cached_at(path: Path) -> Iterator[None]:
    """Say in one line why something at `path` of the cache cannot be used. Raises DataError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise DataError(f"the cache {path} cannot be used: {reason}; {_WAY_ON}") from error
