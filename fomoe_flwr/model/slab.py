"""A slab: one tensor that lives in a file of its own, mapped into memory.

The file is a safetensors file, so anything that reads those reads it. Its pages belong to the file:
they are no anonymous memory, and the system takes them back when it needs room. A slab may have a
second name in a checkpoint. Before it is written to again it moves to a fresh copy of its file, so
what has a name in a checkpoint never changes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fomoe_flwr.errors import InputError

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGN = 64
_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What a file system answers that cannot give a file a second name."""


class SlabError(InputError):
    """A slab that is missing or damaged."""


class Slab:
    """A mapped tensor. `tensor` stays the same object when the file under it changes."""

    def __init__(self, path: Path, name: str, like: Tensor) -> None:
        self.path, self.name = path, name
        self._header = _header(name, like)
        self._shape, self._dtype = like.shape, like.dtype
        self.tensor: Tensor
        self._is_parameter = isinstance(like, nn.Parameter)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._shape.numel() * self._dtype.itemsize

    def create(self) -> Tensor:
        """Make the file, all zeros, and map it. Raises OSError where the disk has no room."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        allocate(self.path, self.num_bytes)
        with self.path.open("r+b") as file:
            file.write(self._header)
        return self._map()

    def adopt(self, source: Path) -> Tensor:
        """Take over the file of a checkpoint without a copy, and map it.

        Raises SlabError if it does not hold this tensor.
        """
        check_slab(source, self.name, self.num_bytes, tuple(self._shape))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        give_name(source, self.path)
        return self._map()

    def before_write(self) -> None:
        """Leave the file to the checkpoints that name it, and go on in a copy of it."""
        if self.path.stat().st_nlink == 1:
            return
        draft = self.path.with_name(f".{uuid4().hex[:8]}.draft")
        try:
            allocate(draft, self.num_bytes)
            copy_file(self.path, draft)
            draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)
        self._map()

    def _map(self) -> Tensor:
        mapped = map_file(self.path, len(self._header), self._shape, self._dtype)
        if not hasattr(self, "tensor"):
            parameter = nn.Parameter(mapped, requires_grad=False)
            self.tensor = parameter if self._is_parameter else mapped
        else:
            self.tensor.data = mapped
        return self.tensor


def map_file(path: Path, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """View a file's bytes from `start` on as a tensor; what is written to it goes to the file."""
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    end = start + shape.numel() * dtype.itemsize
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=end)
    flat = torch.empty(0, dtype=dtype)
    # Offsets count numbers, and headers are a whole number of any of them.
    flat.set_(storage, start // dtype.itemsize, (shape.numel(),))  # type: ignore[call-overload]
    return flat.view(shape)


def scratch(folder: Path, shape: torch.Size) -> Tensor:
    """Return fp32 zeros in a file without a name, which goes with the tensor."""
    if not shape.numel():
        return torch.zeros(shape)
    path = folder / f".{uuid4().hex}.scratch"
    try:
        allocate(path, 4 * shape.numel())
        return map_file(path, 0, shape, torch.float32)
    finally:
        path.unlink(missing_ok=True)


def allocate(path: Path, num_bytes: int) -> None:
    """Make a file of zeros whose room on the disk is taken. Raises OSError, naming the file.

    Without it a full disk would end the process in the middle of a write to mapped memory.
    """
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes into one that is as long, inside the kernel where it can."""
    with source.open("rb") as reader, target.open("r+b") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= done
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
        if left:
            reader.seek(0)
            writer.seek(0)
            shutil.copyfileobj(reader, writer, 2**20)


def give_name(source: Path, target: Path) -> None:
    """Give a file a second name; where the file system has no such thing, copy it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        allocate(target, source.stat().st_size)
        copy_file(source, target)


def check_slab(path: Path, name: str, num_bytes: int, shape: tuple[int, ...] | None = None) -> None:
    """Refuse a slab that is not there, was cut off, or holds something else. Raises SlabError."""
    try:
        found = path.stat().st_size
        if found != num_bytes:
            raise SlabError(f"slab {path} has {found} bytes, {num_bytes} are expected")
        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            if names != [name]:
                raise SlabError(f"slab {path} holds {names}, {name} is expected")
            held = tuple(stored.get_slice(name).get_shape())
    except FileNotFoundError as error:
        raise SlabError(f"slab {path} is missing") from error
    except (OSError, SafetensorError) as error:
        raise SlabError(f"slab {path} is damaged: {error}") from error
    if shape is not None and held != shape:
        raise SlabError(f"slab {path} has shape {list(held)}, {list(shape)} is expected")


def _header(name: str, like: Tensor) -> bytes:
    size = like.numel() * like.element_size()
    entry = {"dtype": _DTYPES[like.dtype], "shape": list(like.shape), "data_offsets": [0, size]}
    text = json.dumps({name: entry}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text
