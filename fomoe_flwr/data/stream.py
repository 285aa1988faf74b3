"""The stream: a hub data set, or local files through the same reader, never read as a whole."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError, first_line
from fomoe_flwr.data.corpus import Document
from fomoe_flwr.data.holdout import HELDOUT_SPLITS, SPLITS, Split
from fomoe_flwr.data.text_files import TextFile, list_files

LOCAL_BUILDERS = ("parquet", "json", "text")
SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev")}
STREAM_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError)


def open_stream(
    data: DataSettings, worker: int, num_workers: int, split: Split = "train"
) -> IterableDataset:
    """Open one worker's share of a split of `data.dataset`; shares are disjoint.

    `data.dataset` is a hub name, or parquet, json or text together with `data.path`.
    A data set without validation or test split gives each `data.holdout_fraction` of its train
    documents, chosen by the sha256 of the text; workers never see those. With fewer files than
    workers, or a number of files that num_workers does not divide, every worker reads all files
    and keeps its share of the rows.
    Raises DataError if the data set, its split or its text column is not there.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not 0 <= worker < num_workers:
        raise DataError(f"worker {worker} must lie in 0..{num_workers - 1}; see layout.num_workers")
    streams = _load(data)
    names = {held: _find(streams, held) for held in SPLITS}
    missing = [held for held in HELDOUT_SPLITS if names[held] is None]
    source = names[split] or names["train"]
    if source is None:
        raise DataError(
            f"data.dataset={data.dataset!r} has no train split (it has {', '.join(streams)}); "
            "set data.dataset or data.dataset_config"
        )
    stream = streams[source]
    if stream.column_names and data.text_key not in stream.column_names:
        raise DataError(
            f"data.dataset={data.dataset!r} has no column {data.text_key!r} "
            f"(columns: {', '.join(stream.column_names)}); set data.text_key"
        )
    if missing and source == names["train"]:
        # By content and not by take(n)/skip(n): split_dataset_by_node divides the n of a skip
        # among the nodes, so that workers would train on held-out documents.
        stream = stream.filter(
            _belongs, input_columns=data.text_key, fn_kwargs=_ranges(missing, split, data)
        )
    if num_workers > 1:
        stream = split_dataset_by_node(stream, rank=worker, world_size=num_workers)
    return stream


def heldout_documents(data: DataSettings, split: Split, num_documents: int) -> list[Document]:
    """Return the first documents of a held-out split of a stream, for `pack`.

    The domain is `data.domain_key` where a row has it, else the data set's name.
    Raises DataError if there is none.
    """
    documents = []
    try:
        for row in islice(open_stream(data, 0, 1, split), num_documents):
            documents.append(Document(row_text(row, data), _row_domain(row, data)))
    except DataError:
        raise
    except STREAM_ERRORS as error:
        raise stream_error(data, error) from None
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError(
            f"data.dataset={data.dataset!r} has no text in its {split} split; "
            "raise data.holdout_fraction or set data.dataset"
        )
    return documents


def row_text(row: dict[str, Any], data: DataSettings) -> str:
    """Return the text of a row, empty if it is null; raise DataError if the row has none."""
    if data.text_key not in row:
        raise DataError(
            f"data.dataset={data.dataset!r} has no column {data.text_key!r} "
            f"(columns: {', '.join(row)}); set data.text_key"
        )
    text = row[data.text_key]
    if not isinstance(text, str | None):
        raise DataError(
            f"data.dataset={data.dataset!r}: column {data.text_key!r} holds "
            f"{type(text).__name__}, text is needed; set data.text_key"
        )
    return text or ""


def stream_error(data: DataSettings, error: BaseException) -> DataError:
    """Return another library's error about the stream as a DataError."""
    return DataError(
        f"data.dataset={data.dataset!r} cannot be read ({first_line(error)}); "
        "check data.dataset, data.dataset_config, data.path and the network"
    )


def _load(data: DataSettings) -> dict[str, IterableDataset]:
    arguments: dict[str, Any] = {"streaming": True}
    if data.dataset in LOCAL_BUILDERS:
        arguments["data_files"] = _data_files(data)
        if data.dataset == "text":
            # By lines there would be an end-of-text after each; whole files may not fit memory.
            arguments["sample_by"] = "paragraph"
    else:
        arguments["name"] = data.dataset_config or None
        arguments["revision"] = data.dataset_revision or None
    try:
        return dict(load_dataset(data.dataset, **arguments))
    except STREAM_ERRORS as error:
        raise stream_error(data, error) from None


def files_to_stream(data: DataSettings) -> list[Path]:
    """Return the files that a stream of local files reads. Raises DataError."""
    return [file.path for file in _local_files(data)]


def _local_files(data: DataSettings) -> list[TextFile]:
    if not data.path:
        raise DataError(
            f"data.dataset={data.dataset!r} reads local files; set data.path to a file or folder"
        )
    files = [file for file in list_files(data.path) if file.kind == data.dataset]
    if not files:
        raise DataError(
            f"data.path={data.path!r} holds no {data.dataset} file; set data.path or data.dataset"
        )
    return files


def _data_files(data: DataSettings) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for file in _local_files(data):
        files.setdefault(file.split or "train", []).append(str(file.path.resolve()))
    return files


def _find(streams: dict[str, IterableDataset], split: str) -> str | None:
    names = SPLIT_ALIASES.get(split, (split,))
    return next((name for name in names if name in streams), None)


def _ranges(missing: list[Split], split: Split, data: DataSettings) -> dict[str, float]:
    """Return the half-open range of text hashes, in 0..1, that makes the split."""
    if split == "train":
        return {"lowest": len(missing) * data.holdout_fraction, "highest": 1.0}
    place = missing.index(split)
    return {
        "lowest": place * data.holdout_fraction,
        "highest": (place + 1) * data.holdout_fraction,
    }


def _belongs(text: str | None, lowest: float, highest: float) -> bool:
    digest = hashlib.sha256(str(text or "").encode("utf-8", "replace")).digest()
    # 48 bits: exact in a float, and never 1.0.
    return lowest <= int.from_bytes(digest[:6], "big") / 2**48 < highest


def _row_domain(row: dict[str, Any], data: DataSettings) -> str:
    domain = row.get(data.domain_key)
    return data.dataset if domain is None else str(domain)
