"""Files that are whole or absent: every write goes to a temporary name first."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fomoe_flwr.errors import InputError

_MADE = ".made-by-fomoe"
"""In a folder that a command made: the names of all that it wrote there."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file under a temporary name, then give it its name, durably."""
    draft = _draft_of(path)
    try:
        with _naming(path, draft):
            write(draft)
            _flush(draft)
            os.replace(draft, path)
            _flush(path.parent)
    finally:
        with suppress(OSError):
            draft.unlink()


def save_text(text: str, path: Path) -> None:
    """Write a text file atomically and durably."""
    replace_file(path, lambda target: target.write_text(text, encoding="utf-8"))


def save_json(value: Any, path: Path) -> None:
    """Write JSON atomically and durably."""
    save_text(json.dumps(value, indent=2) + "\n", path)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, durably."""
    is_new = not path.exists()
    with _naming(path, path):
        with path.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(dict(value)) + "\n")
        _flush(path)
        if is_new:
            _flush(path.parent)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under a temporary name, then give it its name; replaces an older one."""
    remove_drafts(path.parent, path.name)
    draft = _draft_of(path)
    try:
        with _naming(path, draft):
            draft.mkdir(parents=True)
            fill(draft)
            may = draft.stat().st_mode & 0o666
            # Folders too: a file that is on the disk without its name is lost.
            for item in (*draft.rglob("*"), draft):
                if item.is_file():
                    item.chmod(may)  # safetensors lets nobody else read what it writes.
                _flush(item)
            old = _draft_of(path)
            if path.exists():
                path.rename(old)
            draft.rename(path)
            _flush(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_folder(path: Path, option: str, names: Iterable[str] | None = None) -> None:
    """Refuse a folder that a person gave, unless it is new, empty or made by the same command.

    It is the command's own if it holds nothing but `names`; without them its mark names them.
    Raises InputError.
    """
    reason = ""
    try:
        if path.is_symlink():
            reason = "is a symbolic link"
        elif path.exists() and not path.is_dir():
            reason = "is a file"
        elif path.is_dir():
            known = {*names} if names is not None else _marked(path)
            strange = sorted({item.name for item in path.iterdir()} - known)
            if strange:
                reason = f"holds {strange[0]}, which this command did not write"
            elif names is None and Path.cwd().is_relative_to(path.resolve()):
                reason = "is the current folder"
        else:
            reason = _refused(path)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    if reason:
        given = f"{option}{path}" if option.endswith("=") else f"{option} {path}"
        raise InputError(f"{given} {reason}: name a new or an empty folder")


def check_file(path: Path, option: str, start: str) -> None:
    """Refuse a file that exists, unless its text starts as this command's does.

    Raises InputError.
    """
    try:
        if not (path.exists() or path.is_symlink()):
            if reason := _refused(path):
                raise InputError(f"{option} {path} {reason}: name another place")
            return
        is_own = path.is_file() and not path.is_symlink()
        is_own = is_own and path.read_bytes().startswith(start.encode())
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read: {error.strerror}") from error
    if not is_own:
        raise InputError(f"{option} {path} is not this command's: name a new file")


def _refused(path: Path) -> str:
    """Say why something new cannot be made at `path`; nothing if it can."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir():
        return f"lies in {place}, which is a file"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"lies in {place}, which is read-only"


def is_marked(path: Path) -> bool:
    """Tell whether a command marked this folder as made by it."""
    return (path / _MADE).is_file()


def mark_folder(path: Path) -> None:
    """Write down what a command put into a folder, so that `check_folder` knows it."""
    names = sorted({item.name for item in path.iterdir()} | {_MADE})
    (path / _MADE).write_text(json.dumps(names) + "\n", encoding="utf-8")


def renew_folder(path: Path) -> None:
    """Make a folder anew that this command alone writes to; killed at any time, it is known again.

    Raises InputError, as `drop_folder` does.
    """
    drop_folder(path)
    replace_folder(path, mark_folder)


def drop_folder(path: Path) -> None:
    """Remove a folder that `renew_folder` made, if it is there, and what is left of it.

    Raises InputError for anything else in its place.
    """
    remove_drafts(path.parent, path.name)
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link: put the folder itself there, or remove it")
    if not path.exists():
        return
    # An empty folder is nobody's loss, and this is what older versions left when they were killed.
    if not is_marked(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} was not made by this run: move it away")
    remove_folder(path)


def _marked(path: Path) -> set[str]:
    try:
        return set(json.loads((path / _MADE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


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


def held_bytes(folder: Path, seen: set[int] | None = None) -> int:
    """Return the bytes of the files in a folder, each once whatever its names.

    Those in `seen` are left out, and the folder's own are added to it.
    """
    seen, total = set() if seen is None else seen, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # Another process may be at work here.
                found = (Path(parent) / name).lstat()
                total += 0 if found.st_ino in seen else found.st_size
                seen.add(found.st_ino)
    return total


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Remove all but the last `count` files, by name, of those that match."""
    for old in sorted(folder.glob(pattern))[: -count or None]:
        old.unlink(missing_ok=True)


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Remove what writers that were killed left of files of a name; for their only writer."""
    for draft in folder.glob(f".{name}.*.draft"):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path, draft: Path) -> Iterator[None]:
    """Let an OSError name `path`, not its draft; make one of what libraries in Rust raise."""
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        named = str(getattr(error, "filename", None) or draft)
        if number is None or not named.startswith(str(draft)):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.draft")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
