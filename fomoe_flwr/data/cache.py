"""Where this machine keeps what can be made again: tokenizers and tokenised text."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the user's cache folder for this project (XDG), not yet created."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fomoe"
