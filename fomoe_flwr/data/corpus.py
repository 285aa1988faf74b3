"""The corpus: documents with a domain, from inside the package or from the user's files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError, first_line
from fomoe_flwr.data.holdout import (
    HELDOUT_SPLITS,
    SPLITS,
    Sides,
    Split,
    TooFewTextsError,
    assign_sides,
)
from fomoe_flwr.data.text_files import (
    PIECE_CHARS,
    TextFile,
    cut_text,
    list_files,
    read_json,
    read_parquet,
    read_text,
)

# Part of the fingerprint: raise it whenever the same files give other documents.
READER_VERSION = 2


@dataclass(frozen=True)
class Document:
    """One text and the domain it belongs to."""

    text: str
    domain: str


def embedded_corpus_path() -> Path:
    """Return the path of the Parquet file that ships with the package."""
    beside = Path(__file__).with_name("corpus.parquet")
    if beside.is_file():
        return beside
    # Flower unpacks the app bundle elsewhere and leaves .parquet files out of it, so this module
    # may run from a copy without its corpus; the installed package is then still on sys.path.
    for entry in sys.path:
        candidate = Path(entry) / "fomoe_flwr" / "data" / "corpus.parquet"
        if candidate.is_file():
            return candidate.resolve()
    raise DataError(
        f"the embedded corpus is not at {beside} nor below any sys.path entry; "
        "reinstall the package (pip install .) or set data.path to your own text"
    )


def read_documents(data: DataSettings, split: Split) -> list[Document]:
    """Return the documents of one split, in a fixed order.

    Reads the embedded corpus, or `data.path`. Where the files name no splits themselves, test and
    validation take about `data.holdout_fraction` of the documents each (at least one), by the rule
    of `assign_sides`.
    Raises DataError if the data cannot be read or the split has no document.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    _refuse_stream(data)
    if not data.path:
        return _read_embedded(split)
    files = list_files(data.path)
    missing = missing_splits(files)
    if split in missing or (split == "train" and missing):
        return _cut_out(files, missing, data)[0][split]
    documents = _named(files, split, data)
    if not documents:
        raise DataError(f"data.path={data.path!r}: the {split} split has no text in it")
    return documents


def read_splits(data: DataSettings) -> tuple[dict[Split, list[Document]], tuple[Split, ...]]:
    """Return the documents of all splits, and which splits `assign_sides` had to top up."""
    _refuse_stream(data)
    if not data.path:
        return {split: _read_embedded(split) for split in SPLITS}, ()
    files = list_files(data.path)
    missing = missing_splits(files)
    parts: dict[Split, list[Document]] = {}
    topped_up: tuple[Split, ...] = ()
    if missing:
        parts, sides = _cut_out(files, missing, data)
        topped_up = sides.topped_up
    named = [split for split in SPLITS if not (split in missing or (split == "train" and missing))]
    return parts | {split: _named(files, split, data) for split in named}, topped_up


def _named(files: Sequence[TextFile], split: Split, data: DataSettings) -> list[Document]:
    wanted = ("", "train") if split == "train" else (split,)
    return [
        document
        for file in files
        if file.split in wanted
        for document in _documents(file, data, cut=False)
    ]


def missing_splits(files: Sequence[TextFile]) -> list[Split]:
    """Return the held-out splits that no file is named after, so that they are cut out."""
    named = {file.split for file in files}
    return [held for held in HELDOUT_SPLITS if held not in named]


def fingerprint(data: DataSettings) -> str:
    """Return the sha256 hex digest of the content and of every setting that shapes documents.

    Two calls agree exactly if `read_documents` gives the same; absolute paths and times of files
    play no part.
    """
    digest = hashlib.sha256(f"reader {READER_VERSION}".encode())
    _refuse_stream(data)
    if data.path:
        files = list_files(data.path)
        digest.update(f"{data.text_key}\0{data.domain_key}\0{data.holdout_fraction!r}".encode())
        parts = [(file.path, f"{file.split}/{file.domain}/{file.path.suffix}") for file in files]
    else:
        parts = [(embedded_corpus_path(), "embedded")]
    for path, role in parts:
        try:
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; check data.path") from None
        digest.update(f"\0{role}\0{content}".encode())
    return digest.hexdigest()


def signature(data: DataSettings) -> str:
    """Return paths, sizes and times of the files, which change when the text changes.

    Much cheaper than `fingerprint`. It has a meaning on one machine only, and it trusts the times.
    """
    _refuse_stream(data)
    files = list_files(data.path) if data.path else []
    paths = [file.path for file in files] or [embedded_corpus_path()]
    try:
        stats = [(str(path), path.stat()) for path in paths]
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}; check data.path"
        ) from None
    return repr([(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _refuse_stream(data: DataSettings) -> None:
    if data.dataset:
        raise DataError(
            f"data.dataset={data.dataset!r} is read as a stream; "
            "clear data.dataset to read files from data.path"
        )


def _read_embedded(split: Split) -> list[Document]:
    path = embedded_corpus_path()
    try:
        rows = pq.read_table(path).to_pylist()
        documents = [Document(row["text"], row["domain"]) for row in rows if row["split"] == split]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"the embedded corpus {path} is damaged ({first_line(error)}); reinstall the package"
        ) from None
    if not documents:
        raise DataError(f"the embedded corpus {path} has no {split} split; reinstall the package")
    return documents


def _documents(file: TextFile, data: DataSettings, cut: bool) -> list[Document]:
    """Return the rows of a file or its text, in pieces if `cut`; without empty ones."""
    rows: Iterable[tuple[str, str]]
    if file.kind == "parquet":
        rows = read_parquet(file.path, data.text_key, data.domain_key)
    elif file.kind == "json":
        rows = read_json(file.path, data.text_key, data.domain_key)
    else:
        text = read_text(file.path)
        pieces = cut_text(text, data.holdout_fraction) if cut else [text]
        rows = ((piece, "") for piece in pieces)
    return [Document(text, domain or file.domain) for text, domain in rows if text.strip()]


def _cut_out(
    files: Sequence[TextFile], missing: Sequence[Split], data: DataSettings
) -> tuple[dict[Split, list[Document]], Sides]:
    """Return the training text by split, where the `missing` ones are cut out of it."""
    groups: list[list[Document]] = []
    for file in files:
        if file.split in ("", "train"):
            documents = _documents(file, data, cut=True)
            is_one = file.kind == "text"
            groups += [documents] if is_one else [[document] for document in documents]
    texts = [[document.text for document in group] for group in groups]
    try:
        sides = assign_sides(texts, missing, data.holdout_fraction)
    except TooFewTextsError as error:
        found, needed = error.args
        raise DataError(
            f"data.path={data.path!r} has {found} different documents, {needed} "
            f"are needed to make train and {' and '.join(missing)} splits; add text to data.path"
        ) from None
    parts: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for group, splits in zip(groups, sides.splits, strict=True):
        before: Split | None = None
        for document, split in zip(group, splits, strict=True):
            kept = parts[split]
            # Neighbours on one side are one document again, as long as it is no longer than others.
            if split == before and len(kept[-1].text) + len(document.text) <= PIECE_CHARS:
                kept[-1] = Document(kept[-1].text + document.text, document.domain)
            else:
                kept.append(document)
            before = split
    return parts, sides
