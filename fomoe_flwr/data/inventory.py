"""The inventory: what files a run reads, so that nobody goes on with other text unawares."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.corpus import READER_VERSION, embedded_corpus_path, signature
from fomoe_flwr.data.stream import LOCAL_BUILDERS, files_to_stream
from fomoe_flwr.data.text_files import MOST_NAMED, list_files
from fomoe_flwr.events import tell
from fomoe_flwr.files import save_json

# Files of a stream may not be read as a whole; of them the size and both ends count.
ENDS_BYTES = 2**20


def keep_inventory(kept: Path, data: DataSettings, *, resumed: bool) -> None:
    """Write the inventory of a run that begins to `kept`, or of an older run that has none."""
    before = _read(kept) if resumed else None
    if resumed and (before is None or before["reader"] != READER_VERSION) and data.path:
        tell(
            "warning",
            "WARNING: an older version began this run: whether its text is the same is not known, "
            "and text that was held out then may be trained on now",
        )
    if before is None:
        save_json(_take(data), kept)


def check_inventory(kept: Path, data: DataSettings) -> None:
    """Refuse text that is not what `kept` lists; all is well if there is no such file.

    Where the files lie makes no difference. Raises DataError, which names them.
    """
    before = _read(kept)
    if before is not None:
        _compare(before["files"], _take(data)["files"], data)


def check_worker_text(folder: Path, data: DataSettings) -> None:
    """Refuse text that is not what this worker read before in its run; `folder` is its state's.

    Cheap as long as nobody touches the files. Streams are not looked at. Raises DataError.
    """
    if data.dataset:
        return
    kept, mark = folder / "text.json", signature(data)
    before = _read(kept)
    if before is None or before.get("signature") != mark:
        now = _take(data)
        if before is not None:
            _compare(before["files"], now["files"], data)
        folder.mkdir(parents=True, exist_ok=True)
        save_json(now | {"signature": mark}, kept)


def _take(data: DataSettings) -> dict[str, Any]:
    """Return {name: digest} of every file; names are relative. Of a hub data set there is none."""
    root = Path(data.path).expanduser()
    if data.dataset in LOCAL_BUILDERS:
        paths: Iterable[Path] = files_to_stream(data)
    elif data.dataset:
        paths = ()
    else:
        paths = [file.path for file in list_files(data.path)] if data.path else ()
    is_file = root.is_file()
    files = {
        path.name if is_file else path.relative_to(root).as_posix(): _digest(
            path, whole=not data.dataset
        )
        for path in paths
    }
    if not data.path and not data.dataset:
        files["(embedded corpus)"] = _digest(embedded_corpus_path(), whole=True)
    return {"reader": READER_VERSION, "files": files}


def _digest(path: Path, whole: bool) -> str:
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if whole or size <= 2 * ENDS_BYTES:
                return hashlib.file_digest(stream, "sha256").hexdigest()
            digest = hashlib.sha256(str(size).encode() + stream.read(ENDS_BYTES))
            stream.seek(size - ENDS_BYTES)
            digest.update(stream.read())
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check data.path") from None


def _compare(before: dict[str, str], now: dict[str, str], data: DataSettings) -> None:
    told = [
        f"{what} {', '.join(names[:MOST_NAMED])}"
        + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
        for what, names in (
            ("changed", sorted(n for n in before.keys() & now.keys() if before[n] != now[n])),
            ("added", sorted(now.keys() - before.keys())),
            ("removed", sorted(before.keys() - now.keys())),
        )
        if names
    ]
    if told:
        raise DataError(
            f"data.path={data.path or '(embedded corpus)'} is not the text that this run began "
            f"with ({'; '.join(told)}): put it back, set data.path to it, or begin a new run"
        )


def _read(kept: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(found, dict) and "reader" in found
    return found if is_ours and isinstance(found.get("files"), dict) else None
