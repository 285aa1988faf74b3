"""Paths among the words of a command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def given_path(text: str) -> Path:
    """Return a path that a person gave; for argparse, which names the argument if it is refused."""
    if not text.strip():
        # An empty variable of a shell; `Path` would take it for the current folder.
        raise argparse.ArgumentTypeError(f"{text!r} is empty: name a path")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text}: ~ stands for no folder that is known: write it out"
        ) from None
    return Path(text)
