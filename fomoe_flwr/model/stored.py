"""A checkpoint's folder: its `config.json` and its tensors, each read when asked for.

Nothing is unpickled: safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import dot_natural_key

from fomoe_flwr.config import SettingsError
from fomoe_flwr.errors import one_line
from fomoe_flwr.events import warn
from fomoe_flwr.model.families import config_class

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SCALE = "_scale_inv"
"""Ending of the tensor that has the scales of another one's blocks (DeepSeek's fp8)."""

_FLOATS, _INTEGERS = ("F16", "BF16", "F32", "F64"), ("I32", "I64")
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
"""Kinds of numbers, as safetensors names them."""


@dataclass
class StoredTensors:
    """The tensors of a folder by name, read when asked for. Use as a context manager."""

    folder: Path
    setting: str = "model.pretrained"
    """The setting that gave the folder, for errors."""
    block: tuple[int, int] | None = (128, 128)
    """Rows and columns that have a scale in common, where numbers are stored in 8 bits; None = a
    whole matrix has one."""
    headers_only: bool = False
    """Give tensors of the right shape on the meta device; no number is read."""
    _files: dict[str, str] = field(init=False)
    _open: dict[str, Any] = field(init=False, default_factory=dict)
    _stack: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        self._files = _tensor_files(self.folder, self.setting)

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def names(self) -> list[str]:
        """List all tensors but scales, numbers in names in their order."""
        return sorted((n for n in self._files if not n.endswith(_SCALE)), key=dot_natural_key)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises SettingsError if it is missing."""
        if name not in self._files:
            raise self.refusal(f"has no tensor {name}")
        with self._damage(name):
            return tuple(self._file(name).get_slice(name).get_shape())

    def rows(
        self, name: str, wanted: Sequence[int] | None, *, are_integers: bool = False
    ) -> Tensor:
        """Read `wanted` rows (None = all) of a tensor, as fp32.

        Raises SettingsError if the tensor is missing, of another kind than floats (or integers,
        where the model has such), or holds NaN or infinite numbers.
        """
        shape, is_scaled = self.shape(name), f"{name}{_SCALE}" in self._files
        more = (*(_EIGHT_BITS if is_scaled else ()), *(_INTEGERS if are_integers else ()))
        self._check_kind(name, *_FLOATS, *more)
        if is_scaled:
            self._check_scale(name, shape)
        if self.headers_only:
            count = shape[:1] if wanted is None else (len(wanted),)
            return torch.empty(*count, *shape[1:], device="meta")
        read = self._scaled(name, wanted) if is_scaled else self._part(name, wanted).float()
        # A sum is much cheaper than a look at each number; it may be infinite by itself.
        if not torch.isfinite(read.sum()) and not torch.isfinite(read).all():
            raise self.refusal(f"holds NaN or infinite numbers in {name}")
        return read

    def _part(self, name: str, wanted: Sequence[int] | None) -> Tensor:
        shape = self.shape(name)
        with self._damage(name):
            view = self._file(name).get_slice(name)
            if wanted is None:
                return view[:] if shape else self._file(name).get_tensor(name)
            parts = [view[start:stop] for start, stop in _runs(wanted)]
            return torch.cat(parts) if parts else torch.empty(0, *shape[1:])

    def _scaled(self, name: str, wanted: Sequence[int] | None) -> Tensor:
        """Read numbers of 8 bits times the scales of their blocks."""
        is_stack, scales = len(self.shape(name)) > 2, self.shape(f"{name}{_SCALE}")
        cut = wanted if is_stack else None  # Rows of a matrix share scales.
        read = self._part(name, cut).float()
        scale = self._part(f"{name}{_SCALE}", cut if len(scales) > 1 else None).float()
        if len(scales) > 1:
            for dim, block in zip((-2, -1), self.block or read.shape[-2:], strict=True):
                scale = scale.repeat_interleave(block, dim).narrow(dim, 0, read.shape[dim])
        read = read.mul_(scale)
        return read if wanted is None or is_stack else read[list(wanted)]

    def _check_kind(self, name: str, *allowed: str) -> None:
        with self._damage(name):
            found = self._file(name).get_slice(name).get_dtype()
        if found not in allowed:
            lack = " (it has no scales)" if found in _EIGHT_BITS else ""
            raise self.refusal(f"has {name} of {found}{lack}, it must be of {', '.join(allowed)}")

    def _check_scale(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse scales that are neither one for all nor one for each block."""
        scale = f"{name}{_SCALE}"
        self._check_kind(scale, *_FLOATS, "F8_E8M0")
        found, last = self.shape(scale), shape[-2:]
        blocks = self.block or last
        want = [1]
        if len(shape) > 1:
            ends = (-(-n // max(1, b)) for n, b in zip(last, blocks, strict=True))
            want = [*shape[:-2], *ends]
        if found not in ((), (1,), tuple(want)):
            raise self.refusal(
                f"has {scale} of shape {list(found)}, {want} belongs to {list(shape)} with "
                f"weight_block_size={self.block and list(self.block)}"
            )

    def _file(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            opened = safe_open(self.folder / file, framework="pt")
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]

    def refusal(self, what: str) -> SettingsError:
        """Return the error that names the folder and its setting."""
        return refusal(self.folder, what, self.setting)

    def warn(self, what: str) -> None:
        """Tell what does not end the command, with the folder and its setting."""
        warn(f"{self.setting}={self.folder} {what}")

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Tell what cannot be read in one line."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self.refusal(f"cannot give {name}: {error}") from error


def refusal(folder: Path, what: str, setting: str = "model.pretrained") -> SettingsError:
    """Return the error that names a folder and the setting that gave it."""
    return SettingsError(f"{setting}={folder} {what}")


def config_words(folder: Path, setting: str = "model.pretrained") -> dict[str, Any]:
    """Read a folder's `config.json`. Raises SettingsError if it is none."""
    try:
        # It knows how infinity is written.
        words = PreTrainedConfig._dict_from_json_file(folder / "config.json")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise refusal(folder, f"has no readable config.json: {error}", setting) from error
    if not isinstance(words, dict):
        raise refusal(folder, "has a config.json without names and values", setting)
    return words


def made_config(
    folder: Path, words: Mapping[str, Any], setting: str = "model.pretrained"
) -> PreTrainedConfig:
    """Make the configuration of `config_words`. Raises SettingsError if its class refuses."""
    plain = {key: value for key, value in words.items() if key != "quantization_config"}
    try:
        return config_class(str(words["model_type"])).from_dict(plain)
    except Exception as error:  # each family refuses in its own way
        text = f"has a config.json that is none: {one_line(error)}"
        raise refusal(folder, text, setting) from error


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Join neighbouring row numbers into (start, stop) ranges, in the given order."""
    start = stop = -1
    for row in rows:
        if row != stop:
            if start >= 0:
                yield start, stop
            start = row
        stop = row + 1
    if start >= 0:
        yield start, stop


def _tensor_files(folder: Path, setting: str) -> dict[str, str]:
    """Return which file holds which tensor; every file must be there and whole.

    One file of all tensors goes before an index, as in transformers.
    """
    named: dict[str, str] = {}
    if not (folder / _WEIGHTS).is_file():
        named = _weight_map(folder, setting)
    files: dict[str, str] = {}
    for name in sorted(set(named.values())) or [_WEIGHTS]:
        if Path(name).name != name or not (folder / name).is_file():
            raise refusal(folder, f"has no file {name}, which its {_INDEX} names", setting)
        try:
            # Its header says how long it must be.
            with safe_open(folder / name, framework="pt") as stored:
                files |= dict.fromkeys(stored.keys(), name)
        except (OSError, SafetensorError) as error:
            raise refusal(folder, f"is damaged: {name}: {error}", setting) from error
    return {key: file for key, file in files.items() if not named or named.get(key) == file}


def _weight_map(folder: Path, setting: str) -> dict[str, str]:
    """Read the names of tensors and of their files from the index."""
    if not (folder / _INDEX).is_file():
        raise refusal(
            folder,
            f"has neither {_WEIGHTS} nor {_INDEX}: other formats are not read, convert it first",
            setting,
        )
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refusal(folder, f"is damaged: {_INDEX}: {error}", setting) from error
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise refusal(folder, f"is damaged: {_INDEX} has no weight_map of tensors", setting)
    for key, file in named.items():
        if not isinstance(file, str):
            raise refusal(folder, f"is damaged: {_INDEX} has {key}: {file!r}, no file", setting)
    return named
