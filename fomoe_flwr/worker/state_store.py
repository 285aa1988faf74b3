"""The state store: what workers keep from round to round, in memory or on the disk.

A process that outlives its tasks keeps the newest state of each worker where it is cheapest: on its
own device while there is room, else in host memory. Files are written when a resume may ask for
them, in the background. Every other process writes a file every round. What is read is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fomoe_flwr.errors import one_line
from fomoe_flwr.events import warn
from fomoe_flwr.files import remove_drafts
from fomoe_flwr.model.device_copy import copy, has_room, host_empty
from fomoe_flwr.model.tensor_files import save_tensors
from fomoe_flwr.worker.state_files import AHEAD, FEEDBACK, INNER, Tensors, state_file

_MOST_OF_FREE = 0.5
"""Share of the free memory that a state may take; steps and replies need the rest."""


class Stored(Tensors, Protocol):
    """Tensors by name, which nobody may change, and their metadata."""

    def metadata(self) -> Mapping[str, str] | None:
        """Return the metadata."""


@dataclass(frozen=True)
class _Kept:
    """A state in memory."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def metadata(self) -> Mapping[str, str]:
        return self.meta


class StateStore:
    """Saves and opens states under the paths that their files have."""

    def __init__(self) -> None:
        self.is_in_memory = False
        """Whether this process outlives its tasks and keeps what they leave."""
        self._kept: dict[Path, _Kept] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._writes: dict[Path, Future[None]] = {}
        self._swept: set[Path] = set()
        """Folders without what an earlier process left half written."""

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Keep states in memory; at the end forget them."""
        before, self.is_in_memory = self.is_in_memory, True
        try:
            yield
            if not before:
                self.settle()
        finally:
            self.is_in_memory = before
            if not before:
                self._kept.clear()
                # After an error this waits only: that error says more than one of a write.
                wait(self._writes.values())
                self._writes.clear()

    def save(
        self, path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str], on_disk: bool
    ) -> None:
        """Keep a state; with `on_disk` a file is written, which `settle` waits for.

        The tensors must not change afterwards. Without room in memory the file is written at once.
        """
        if path.parent not in self._swept:
            remove_drafts(path.parent, "*.safetensors")
            self._swept.add(path.parent)
        if not (self.is_in_memory and (placed := _placed(tensors))):
            self._kept.pop(path, None)
            _write(path, tensors, meta)
            return
        for older in [each for each in self._kept if _is_older(each, path)]:
            del self._kept[older]
        self._kept[path] = _Kept(placed, meta)
        if on_disk:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="states")
            self._writes[path] = self._pool.submit(_write, path, placed, meta)

    def has(self, path: Path) -> bool:
        """Tell whether a state is here."""
        return path in self._kept or path.exists()

    @contextmanager
    def open(self, path: Path) -> Iterator[Stored]:
        """Open a state. Raises OSError or SafetensorError if there is none to read."""
        if path in self._kept:
            yield self._kept[path]
            return
        if path in self._writes:
            # Waits only: a write that failed is no lost state, and `settle` has to tell it.
            wait([self._writes[path]])
        with safe_open(path, framework="pt") as stored:
            yield stored

    def newest_before(self, folder: Path, server_round: int, kind: str = INNER) -> Path | None:
        """Return what a worker stored last: in the round before, unless it missed that one."""
        limit = state_file(folder, server_round, kind).name
        names = {item.name for item in folder.glob(f"{kind}-*.safetensors")}
        names |= {path.name for path in self._kept if path.parent == folder}
        earlier = [name for name in names if name.startswith(f"{kind}-") and name < limit]
        return folder / max(earlier) if earlier else None

    def forget_rounds(self, folder: Path, keep: Collection[int]) -> None:
        """Remove the states of all rounds but these, and all that delays led to."""
        for kind in (INNER, FEEDBACK, AHEAD):
            kept = {state_file(folder, number, kind) for number in keep if kind != AHEAD}
            for path in [each for each in self._kept if _is_of(each, folder, kind)]:
                if path not in kept:
                    del self._kept[path]
            for stored in folder.glob(f"{kind}-*.safetensors"):
                if stored not in kept:
                    stored.unlink(missing_ok=True)

    def host_bytes(self) -> int:
        """Return the bytes of pageable host memory that states take."""
        kept = [value for each in self._kept.values() for value in each.tensors.values()]
        return sum(value.nbytes for value in kept if not (value.is_cuda or value.is_pinned()))

    def settle(self) -> None:
        """Wait until all files are written. Raises OSError if one could not be."""
        writes, self._writes = self._writes, {}
        for write in writes.values():
            write.result()

    def write_all(self) -> None:
        """Write down what is on no disk yet: another process goes on from there."""
        self.settle()
        for path, kept in self._kept.items():
            # What a delay led to can be made again.
            if not (path.exists() or path.name.startswith(f"{AHEAD}-")):
                _write(path, kept.tensors, kept.meta)


def _placed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Return the tensors where they may stay: as they are, in host memory, or nowhere."""
    device = next((value.device for value in tensors.values() if value.is_cuda), None)
    size = sum(value.nbytes for value in tensors.values())
    # They lie there already: what is free must do for everything else.
    if device is not None and has_room(device, size, _MOST_OF_FREE):
        return tensors
    if size > _MOST_OF_FREE * psutil.virtual_memory().available:
        return None
    return {name: _on_host(value) for name, value in tensors.items()}


def _on_host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value
    host = host_empty(*value.shape, dtype=value.dtype)
    copy(host, value.contiguous())
    return host


def _write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    host = {name: _on_host(value.detach()).contiguous() for name, value in tensors.items()}
    save_tensors(host, path, meta)


def _is_of(path: Path, folder: Path, kind: str) -> bool:
    return path.parent == folder and path.name.startswith(f"{kind}-")


def _is_older(path: Path, other: Path) -> bool:
    kind = other.name.partition("-")[0]
    return path != other and _is_of(path, other.parent, kind)


UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, TypeError)
"""What reading a stored state raises that is missing, cut off or changed."""


def tell_lost(path: Path, error: BaseException) -> None:
    """Warn that a state is there and cannot be read; that none is there is nothing to tell."""
    if path.exists():
        warn(f"{path} cannot be read ({one_line(error)}): this worker goes on without it")


STATES = StateStore()
"""This process's own."""
