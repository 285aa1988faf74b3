"""The tensors of a checkpoint's folder, and which of them make one of ours.

Released checkpoints have other names than the class, experts one by one, or fused matrices.
transformers has a conversion for each family, and it is asked here, tensor by tensor: of an expert
that nobody wants, not one byte is read. Nothing is unpickled: safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fomoe_flwr.config import SettingsError
from fomoe_flwr.errors import one_line
from fomoe_flwr.model.families import config_class
from fomoe_flwr.parameters.keys import of_expert

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SCALE = "_scale_inv"
"""Ending of the tensor that has the scales of another one's blocks (DeepSeek's fp8)."""


@dataclass
class StoredTensors:
    """The tensors of a folder by name, read when asked for. Use as a context manager."""

    folder: Path
    setting: str = "model.pretrained"
    """The setting that gave the folder, for errors."""
    block: tuple[int, int] = (128, 128)
    """Rows and columns that have a scale in common, where numbers are stored in 8 bits."""
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

    def rows(self, name: str, wanted: Sequence[int] | None) -> Tensor:
        """Read `wanted` rows (None = all) of a tensor, as fp32.

        Raises SettingsError if the tensor is missing or not of floats.
        """
        shape = self.shape(name)
        if f"{name}{_SCALE}" in self._files:
            whole = self._scaled(name)
            return whole if wanted is None else whole[list(wanted)]
        with self._damage(name):
            view = self._file(name).get_slice(name)
            if wanted is None:
                read = view[:] if shape else self._file(name).get_tensor(name)
            else:
                parts = [view[start:stop] for start, stop in _runs(wanted)]
                read = torch.cat(parts) if parts else torch.empty(0, *shape[1:])
        if read.dtype is torch.int64:  # a table of ids, as the routers of some layers are
            return read.float()
        if not read.is_floating_point() or read.element_size() < 2:
            raise self.refusal(f"has {name} of {read.dtype}, too coarse to train")
        return read.float()

    def _scaled(self, name: str) -> Tensor:
        """Read numbers of 8 bits times the scales of their blocks."""
        with self._damage(name):
            read = self._file(name).get_tensor(name).float()
            scale = self._file(f"{name}{_SCALE}").get_tensor(f"{name}{_SCALE}").float()
        for dim, block in enumerate(self.block):
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, read.shape[dim])
        return read.mul_(scale)

    def _file(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            opened = safe_open(self.folder / file, framework="pt")
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]

    def refusal(self, what: str) -> SettingsError:
        """Return the error that names the folder and its setting."""
        return refusal(self.folder, what, self.setting)

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Tell what cannot be read in one line."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            raise self.refusal(f"cannot give {name}: {error}") from error


@dataclass
class _Recipe:
    """What is stored of some of our tensors, and how it becomes them."""

    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Stored names by the converter's pattern; of experts one by one, all of them in order."""

    @property
    def is_merged(self) -> bool:
        """Whether experts are stored one by one."""
        return self.converter is not None and any(
            isinstance(step, MergeModulelist) and step.dim == 0
            for step in self.converter.operations[:1]
        )


class Recipes:
    """How a model's tensors come from stored ones.

    Parameters
    ----------
    model
        The whole model, on the meta device.
    stored
        The folder's tensors.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredTensors) -> None:
        self.model, self.stored = model, stored
        steps = get_model_conversion_mapping(model)
        renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        self._of: dict[str, _Recipe] = {}
        for name in stored.names():
            key, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if key not in state and name in state:
                key, pattern = name, None
            made = self._of.setdefault(key, _Recipe(by_pattern.get(pattern or "")))
            made.sources.setdefault(pattern or "", []).append(name)

    def check(self, keys: Iterable[str]) -> None:
        """Refuse a folder that lacks a tensor. Raises SettingsError, naming the first."""
        together = any(
            made.converter is not None and len(made.converter.target_patterns) > 1
            for made in self._of.values()
        )
        missing = [key for key in keys if key not in self._of]
        # What is stored in one piece with another tensor is known once that is read.
        if missing and not together:
            raise self.stored.refusal(f"has no tensor {missing[0]}")

    def read(self, key: str, rows: Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
        """Read `rows` (None = all) of a tensor whose full shape must be `shape`, as fp32.

        Raises SettingsError, naming what is missing or does not fit.
        """
        made = self._of.get(key)
        if made is None:
            return self._other_part(key, rows, shape)
        if made.converter is None:
            (name,) = made.sources[""][:1]
            found = self.stored.shape(name)
            if found != shape:
                raise self._misfit(name, found, shape)
            return self.stored.rows(name, rows)
        return self._converted(key, made, rows, shape)[key]

    def _converted(
        self, key: str, made: _Recipe, rows: Sequence[int] | None, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        assert made.converter is not None
        converter: Any = deepcopy(made.converter)
        for pattern, names in made.sources.items():
            if made.is_merged:
                wanted = range(shape[0]) if rows is None else rows
                converter.collected_tensors[pattern] = self._experts(names, wanted)
                continue
            are_stacked = all(self.stored.shape(name)[:1] == shape[:1] for name in names)
            cut = rows if are_stacked else None
            converter.collected_tensors[pattern] = [self.stored.rows(n, cut) for n in names]
            rows = None if are_stacked else rows
        try:
            parts = converter.convert(key, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self.stored.refusal(f"cannot give {key}: {error}") from error
        for name, value in parts.items():
            if name == key and value.shape[1:] != shape[1:]:
                raise self._misfit(key, tuple(value.shape), shape)
        if made.is_merged or rows is None:
            return parts
        return {name: value[list(rows)] for name, value in parts.items()}

    def _experts(self, names: list[str], wanted: Sequence[int]) -> list[Tensor]:
        found = [of_expert(names[0], expert) for expert in wanted]
        shapes = {self.stored.shape(name): name for name in found}
        if len(shapes) > 1:
            (first, _), (other, name) = list(shapes.items())[:2]
            raise self._misfit(name, other, first)
        return [self.stored.rows(name, None) for name in found]

    def _other_part(self, key: str, rows: Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor that is stored together with another one."""
        layer = key.rpartition(".layers.")[2].partition(".")[0]
        for first, made in self._of.items():
            same = first.rpartition(".layers.")[2].partition(".")[0] == layer
            if same and made.converter is not None and len(made.converter.target_patterns) > 1:
                parts = self._converted(first, made, rows, shape)
                if key in parts:
                    return parts[key]
        raise self.stored.refusal(f"has no tensor {key}")

    def _misfit(self, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> SettingsError:
        return self.stored.refusal(
            f"has {name} of shape {list(found)}, the settings expect {list(shape)}",
        )


def refusal(folder: Path, what: str, setting: str = "model.pretrained") -> SettingsError:
    """Return the error that names a folder and the setting that gave it."""
    return SettingsError(f"{setting}={folder} {what}")


def config_words(folder: Path, setting: str = "model.pretrained") -> dict[str, Any]:
    """Read a folder's `config.json`. Raises SettingsError if it is none."""
    try:
        # It knows how infinity is written.
        words = PreTrainedConfig._dict_from_json_file(folder / "config.json")
        return dict(words.items())
    except (OSError, ValueError, AttributeError) as error:
        raise refusal(folder, f"has no readable config.json: {error}", setting) from error


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
    """Return which file holds which tensor; every file must be there and whole."""
    named: dict[str, str] = {}
    if (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            named = dict(index["weight_map"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise refusal(folder, f"is damaged: {_INDEX}: {error}", setting) from error
    elif not (folder / _WEIGHTS).is_file():
        raise refusal(
            folder,
            f"has neither {_WEIGHTS} nor {_INDEX}: other formats are not read, convert it first",
            setting,
        )
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
