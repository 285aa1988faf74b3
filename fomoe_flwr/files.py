"""Files that are whole or absent: every write goes to a temporary name first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file under a temporary name, then give it its name, durably."""
    draft = _draft_of(path)
    try:
        write(draft)
        _flush(draft)
        os.replace(draft, path)
        _flush(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def save_text(text: str, path: Path) -> None:
    """Write a text file atomically and durably."""
    replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))


def save_json(value: Any, path: Path) -> None:
    """Write JSON atomically and durably."""
    save_text(json.dumps(value, indent=2) + "\n", path)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, durably."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(dict(value)) + "\n")
    _flush(path)
    if is_new:
        _flush(path.parent)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then give it its name; replaces an older one."""
    draft = _draft_of(path)
    draft.mkdir(parents=True)
    try:
        fill(draft)
        # Folders too: a file that is on the disk without its name is lost.
        for item in (*draft.rglob("*"), draft):
            _flush(item)
        old = _draft_of(path)
        if path.exists():
            path.rename(old)
        draft.rename(path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder that is there after a power cut."""
    if not path.is_dir():
        path.mkdir()
        _flush(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder; killed in the middle, it leaves a draft and no half of a folder."""
    draft = _draft_of(path)
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Remove all but the last `count` files, by name, of those that match."""
    for old in sorted(folder.glob(pattern))[: -count or None]:
        old.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove what writers that were killed left behind; for the folder's only writer."""
    for draft in folder.glob(".*.draft"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.draft")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
