"""The folder in which a warm worker and those who hand it tasks meet.

    socket       where the worker listens
    token        what both must know, new with every start of the worker
    lock         held by the worker as long as it lives: there is one at most
    worker.log   what a worker says that was started on demand

Only its owner may look into it; a folder of anybody else is refused.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fomoe_flwr.errors import InputError, refusal
from fomoe_flwr.files import check_folder

_MOST_PATH_BYTES = 100
"""A socket's path must fit into the kernel's 108 bytes (104 on macOS), draft name included."""
MOST_FOLDER_BYTES = _MOST_PATH_BYTES - len("/socket")
_MOST_LOG_BYTES = 2**20
_LOCK, _DRAFT = "lock", ".token"


class Folder:
    """One worker's folder."""

    def __init__(self, path: str | Path) -> None:
        """Look at the folder; create nothing. Raises InputError for a path that cannot serve."""
        self.path = Path(path).expanduser()
        if not self.path.is_absolute():
            raise InputError(f"worker-dir={path} must be an absolute path")
        self.socket = self.path / "socket"
        self.token = self.path / "token"
        self.log = self.path / "worker.log"
        if len(os.fsencode(self.socket)) > _MOST_PATH_BYTES:
            raise InputError(
                f"worker-dir={path} is too long for a socket: at most {MOST_FOLDER_BYTES} bytes"
            )

    def create(self) -> None:
        """Make the folder if it is not there. Raises InputError if it is not ours alone."""
        try:
            self.path.mkdir(parents=True, mode=0o700, exist_ok=True)
        except OSError as error:
            raise InputError(f"worker-dir={refusal(error)}") from error
        self.check()
        names = (self.socket.name, self.token.name, _DRAFT, _LOCK, self.log.name)
        check_folder(self.path, "worker-dir=", {*names, f"{self.log.name}.1"})

    def check(self) -> None:
        """Raise InputError unless the folder is ours and nobody else can enter it."""
        try:
            found = self.path.lstat()
        except OSError as error:
            raise InputError(f"worker-dir={refusal(error)}") from error
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or mode & 0o077:
            raise InputError(
                f"worker-dir={self.path} must be a folder of user {os.getuid()} with mode 0700 "
                f"(it is of user {found.st_uid} with mode {mode:04o})"
            )

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Hold the worker's place. Raises InputError if one lives here already."""
        with open(self.path / _LOCK, "w") as place:  # closing it, or dying, gives the place up
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"a warm worker lives in {self.path} already") from None
            yield

    def open_log(self) -> IO[bytes]:
        """Open the log of workers started on demand; a long one becomes `.log.1` first."""
        if self.log.is_file() and self.log.stat().st_size > _MOST_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        return open(self.log, "ab")

    def new_token(self) -> bytes:
        """Write down a new token, readable for its owner only, and return it."""
        token = secrets.token_hex(32)
        draft = self.path / _DRAFT
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(token)
        draft.replace(self.token)
        return token.encode()

    def read_token(self) -> bytes:
        """Return the token. Raises OSError where no worker left one."""
        return self.token.read_bytes()

    def leave(self) -> None:
        """Remove what only a living worker needs."""
        for path in (self.socket, self.token):
            path.unlink(missing_ok=True)
