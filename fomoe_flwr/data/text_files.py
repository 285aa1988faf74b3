"""The user's files: which there are, what split and domain they are, and what text they hold."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fomoe_flwr.data import DataError, first_line
from fomoe_flwr.data.holdout import MANY_PIECES

KINDS = {
    ".txt": "text",
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".md": "text",
    ".markdown": "text",
    ".text": "text",
}
# Besides .gz after any of these but .parquet, and capitals in all of them.
SUFFIXES = tuple(KINDS)
PIECE_CHARS = 8_000
# A short file is split too, so its pieces may be as short as this.
SHORTEST_PIECE_CHARS = 1_000
# Files of a sort that a message names.
MOST_NAMED = 5

SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
# "train", "train-00000-of-00002" and "train_3" name a split; "test_results" does not.
SPLIT_STEM = re.compile(r"(train|validation|valid|val|test)([-_.]?\d+([-_]of[-_]\d+)?)?")


@dataclass(frozen=True)
class TextFile:
    """One file of the corpus; `split` is empty where nothing names one."""

    path: Path
    split: str
    domain: str

    @property
    def kind(self) -> str:
        """What is in it: text, parquet or json."""
        return _kind_of(self.path)


@dataclass(frozen=True)
class Survey:
    """What `data.path` stands for: the files to read, and why others are left out."""

    files: list[TextFile]
    left_out: dict[str, str]
    """{path inside the folder: reason}"""


def list_files(path: str) -> list[TextFile]:
    """Return the files that `data.path` stands for, as `survey_files` does."""
    return survey_files(path).files


def survey_files(path: str) -> Survey:
    """Return the files that `data.path` stands for, sorted by their path inside the folder.

    Where a file or sub-folder is named train, files that belong to no split are left out; where
    only held-out splits are named, the other files are the train split (with `split` empty).
    Raises DataError if the path does not exist or holds no file of a known kind.
    """
    root = Path(path).expanduser()
    kinds = " ".join(SUFFIXES)
    try:
        if root.is_file():
            if not _kind_of(root):
                raise DataError(f"data.path={path!r} must end in one of {kinds}; set data.path")
            return Survey([TextFile(root, "", _stem(root))], {})
        if not root.is_dir():
            raise DataError(f"data.path={path!r} does not exist; set it to a file or a folder")
        names, left_out = _walk(root)
    except OSError as error:
        raise DataError(f"data.path={path!r} cannot be read: {error.strerror}") from None
    if not names:
        raise DataError(
            f"data.path={path!r} holds no file that ends in one of {kinds}{told_left_out(left_out)}"
        )
    files = [
        TextFile(root / name, _split_of(name), _domain_of(name, root))
        for name in sorted(names, key=lambda name: name.as_posix())
    ]
    if any(file.split == "train" for file in files):
        reason = "others are named train, it is named after no split"
        left_out |= {f.path.relative_to(root).as_posix(): reason for f in files if not f.split}
        files = [file for file in files if file.split]
    return Survey(files, left_out)


def told_left_out(left_out: dict[str, str]) -> str:
    """Return the files that are left out, by reason, as the end of a sentence."""
    reasons: dict[str, list[str]] = {}
    for name in sorted(left_out):
        reasons.setdefault(left_out[name], []).append(name)
    told = [
        ", ".join(names[:MOST_NAMED])
        + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
        + f" ({reason})"
        for reason, names in sorted(reasons.items())
    ]
    return f"; left out: {'; '.join(told)}" if told else ""


def _walk(root: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the paths of readable kinds inside a folder, and why others are left out."""
    names: list[Path] = []
    left_out: dict[str, str] = {}

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root:
            raise error
        left_out[Path(error.filename).relative_to(root).as_posix()] = f"{error.strerror}"

    top, linked = root.resolve(), set[Path]()
    for place, folders, found in os.walk(root, onerror=unreadable, followlinks=True):
        here = Path(place)
        for folder in sorted(folders):
            inside, reason = here / folder, ""
            if folder.startswith("."):
                reason = "hidden"
            elif inside.is_symlink():
                target = inside.resolve()
                is_known = any(target.is_relative_to(t) for t in (top, *linked))
                if is_known or top.is_relative_to(target):
                    reason = "a link to a folder that is read already"
                linked.add(target)
            if reason:
                folders.remove(folder)
                left_out[inside.relative_to(root).as_posix()] = reason
        folders.sort()
        for name in found:
            if reason := _why_not(here / name):
                left_out[(here / name).relative_to(root).as_posix()] = reason
            else:
                names.append((here / name).relative_to(root))
    return names, left_out


def _why_not(path: Path) -> str:
    """Return why a file in a folder is not read; nothing if it is."""
    if path.name.startswith("."):
        return "hidden"
    if not _kind_of(path):
        return f"kind {path.suffix or 'without suffix'} is not read"
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "no file"
    # A data set brings a card of this name.
    return "says what is in a folder" if path.name.lower() == "readme.md" else ""


def _kind_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = KINDS.get(Path(path.stem).suffix.lower(), "")
        return "" if inner == "parquet" else inner
    return KINDS.get(suffix, "")


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _split_of(relative: Path) -> str:
    for folder in relative.parts[:-1]:
        if folder.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.lower()]
    match = SPLIT_STEM.fullmatch(_stem(relative).lower())
    return SPLIT_NAMES[match[1]] if match else ""


def _domain_of(relative: Path, root: Path) -> str:
    for folder in relative.parts[:-1]:
        if folder.lower() not in SPLIT_NAMES:
            return folder
    if SPLIT_STEM.fullmatch(_stem(relative).lower()):
        return root.resolve().name
    return _stem(relative)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raise DataError if it is none or cannot be read."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it or take it out of data.path"
        ) from None
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three.
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"cannot read {path}: {reason}; check data.path") from None


def read_parquet(path: Path, text_key: str, domain_key: str) -> Iterator[tuple[str, str]]:
    """Yield (text, domain) of each row; the domain is empty where the file names none."""
    try:
        # ParquetFile and not read_table: the latter would take a folder name like train=1 as data.
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _need_key(path, text_key, names)
            columns = [text_key] + [domain_key] * (domain_key in names and domain_key != text_key)
            table = file.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot read {path} as Parquet ({first_line(error)}); check data.path"
        ) from None
    for row in table.to_pylist():
        yield _text_and_domain(path, row, text_key, domain_key)


def read_json(path: Path, text_key: str, domain_key: str) -> Iterator[tuple[str, str]]:
    """Yield (text, domain) of each object: one a line, or a .json file that is one list."""
    content = read_text(path)
    for place, row in _json_rows(path, content):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} {place} is no JSON object with the key {text_key!r}; check data.path"
            )
        _need_key(path, text_key, list(row), f" {place}")
        yield _text_and_domain(path, row, text_key, domain_key)


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    if ".json" in (path.suffix.lower(), Path(path.stem).suffix.lower()):
        try:
            whole = json.loads(content)
        except (json.JSONDecodeError, RecursionError):
            pass  # Many .json files hold one object a line: read them so.
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"item {number}", row) for number, row in enumerate(rows, 1))
            return
    # Not splitlines(): that also cuts at the Unicode line separators JSON strings may hold.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{path} line {number} is not JSON ({first_line(error)}); check data.path"
                ) from None


def _need_key(path: Path, text_key: str, names: list[str], place: str = "") -> None:
    if text_key not in names:
        known = ", ".join(map(str, names[:12])) or "none"
        raise DataError(
            f"{path}{place} has no column {text_key!r} (columns: {known}); set data.text_key"
        )


def _text_and_domain(
    path: Path, row: dict[str, Any], text_key: str, domain_key: str
) -> tuple[str, str]:
    text, domain = row[text_key], row.get(domain_key)
    if not isinstance(text, str | None):
        raise DataError(
            f"{path}: column {text_key!r} holds {type(text).__name__}, text is needed; "
            "set data.text_key"
        )
    # A JSON escape can smuggle in half a surrogate pair, which no UTF-8 text has.
    text = (text or "").encode("utf-8", "replace").decode("utf-8")
    return text, "" if domain is None else str(domain)


def cut_text(text: str, fraction: float) -> list[str]:
    """Return the text in pieces, cut at paragraphs, lines or blanks; joined they are the text.

    A piece is about `fraction` of the text, and a sixteenth at most; but 1,000 characters at
    least and 8,000 at most. Nothing but the text itself says where it is cut.
    """
    share = int(len(text) * min(fraction, 1 / MANY_PIECES))
    size = min(PIECE_CHARS, max(SHORTEST_PIECE_CHARS, share))
    pieces: list[str] = []
    start = 0
    while len(text) - start > size + size // 2:
        end = _cut_at(text, start + size // 2, start + size)
        pieces.append(text[start:end])
        start = end
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _cut_at(text: str, lowest: int, highest: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, lowest, highest)
        if found >= 0:
            return found + len(mark)
    return highest
