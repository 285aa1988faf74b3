"""Which stored tensors make one of ours, and how.

Released checkpoints have other names than the class, experts one by one, or fused matrices.
transformers has a conversion for each family, and it is asked here, tensor by tensor: of an expert
that nobody wants, not one byte is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from fomoe_flwr.errors import one_line
from fomoe_flwr.model.state import state_of
from fomoe_flwr.model.stored import StoredTensors
from fomoe_flwr.parameters.keys import has_layer, layer_of, of_expert

_NEVER_READ = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that old checkpoints hold and classes compute; transformers passes over them, too."""

_NEXT_TOKEN = "eh_proj"
"""Tensor of every layer that predicts a token further on (mtp); it follows the model's layers."""


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
        self._state = state = model.state_dict()
        self._of: dict[str, _Recipe] = {}
        for name in stored.names():
            key, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, state
            )
            if key not in state and name in state:
                key, pattern = name, None
            made = self._of.setdefault(key, _Recipe(by_pattern.get(pattern or "")))
            made.sources.setdefault(pattern or "", []).append(name)

    def check(self) -> None:
        """Refuse a folder whose tensors are not the model's; warn of tensors that it lacks.

        Raises SettingsError, naming the first. Cheap with `stored` of headers only.
        """
        self._refuse_more_layers()
        for key, own in state_of(self.model).items():
            self.read(key, None, tuple(own.shape))
        if unread := self._unread():
            first = next(iter(unread))
            self.stored.warn(
                f"holds {len(unread)} tensors that its class does not read: {first}, …"
            )

    def read(self, key: str, rows: Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
        """Read `rows` (None = all) of a tensor whose full shape must be `shape`, as fp32.

        Raises SettingsError, naming what is missing or does not fit.
        """
        made = self._of.get(key)
        if made is None:
            return self._other_part(key, rows, shape)
        if made.converter is not None:
            return self._converted(key, key, made, rows, shape)
        (name,) = made.sources[""][:1]
        self._expect(name, self.stored.shape(name), shape)
        are_integers = not self._state[key].is_floating_point()
        return self.stored.rows(name, rows, are_integers=are_integers)

    def _converted(
        self,
        key: str,
        first: str,
        made: _Recipe,
        rows: Sequence[int] | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Read `key` of the tensors that the recipe of `first` makes."""
        assert made.converter is not None
        converter: Any = deepcopy(made.converter)
        names = [name for each in made.sources.values() for name in each]
        is_cut = made.is_merged or all(self.stored.shape(n)[:1] == shape[:1] for n in names)
        if made.is_merged:
            wanted = range(shape[0]) if rows is None else rows
            for pattern in converter.source_patterns:
                converter.collected_tensors[pattern] = self._experts(made, pattern, wanted, shape)
        else:
            for pattern, sources in made.sources.items():
                parts = [self.stored.rows(name, rows if is_cut else None) for name in sources]
                converter.collected_tensors[pattern] = parts
        try:
            found = converter.convert(first, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self.stored.refusal(f"cannot give {key}: {one_line(error)}") from error
        if key not in found:
            raise self.stored.refusal(f"has no tensor {key}")
        value: Tensor = found[key]
        count = shape[:1] if rows is None or not is_cut else (len(rows),)
        self._expect(key, tuple(value.shape), (*count, *shape[1:]))
        return value if rows is None or is_cut else value[list(rows)]

    def _experts(
        self, made: _Recipe, pattern: str, wanted: Sequence[int], shape: tuple[int, ...]
    ) -> list[Tensor]:
        """Read one matrix of the wanted experts, whose stack's full shape is `shape`."""
        assert made.converter is not None
        names = made.sources.get(pattern)
        if names is None:  # The name that it would have, from one that is there.
            (there, (name, *_)), *_ = made.sources.items()
            part, other = (p.rpartition("*.")[2] for p in (there, pattern))
            raise self.stored.refusal(f"has no tensor {name.replace(part, other)}")
        if len(names) > shape[0]:
            raise self.stored.refusal(f"has {names[shape[0]]}, config.json says {shape[0]} experts")
        # Several matrices are joined at their rows.
        one = (shape[1] // len(made.converter.source_patterns), *shape[2:])
        chosen = [of_expert(names[0], expert) for expert in wanted]
        for name in chosen:
            self._expect(name, self.stored.shape(name), one)
        return [self.stored.rows(name, None) for name in chosen]

    def _other_part(self, key: str, rows: Sequence[int] | None, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor that is stored together with another one."""
        layer = key.rpartition(".layers.")[2].partition(".")[0]
        for first, made in self._of.items():
            same = first.rpartition(".layers.")[2].partition(".")[0] == layer
            if same and made.converter is not None and len(made.converter.target_patterns) > 1:
                return self._converted(key, first, made, rows, shape)
        raise self.stored.refusal(f"has no tensor {key}")

    def _unread(self) -> dict[str, str]:
        """Return what the model lacks and its class does not pass over: stored names, our keys."""
        passed = re.compile(
            "|".join((*_NEVER_READ, *(self.model._keys_to_ignore_on_load_unexpected or ())))
        )
        return {
            name: key
            for key, made in self._of.items()
            if key not in self._state and not passed.search(key)
            for names in made.sources.values()
            for name in names
        }

    def _refuse_more_layers(self) -> None:
        known = [key for key in self._state if has_layer(key)]
        stems = {key.partition(".layers.")[0] for key in known}
        count = 1 + max(map(layer_of, known))
        more = {
            name: layer_of(key)
            for name, key in self._unread().items()
            if has_layer(key) and key.partition(".layers.")[0] in stems and layer_of(key) >= count
        }
        further = {layer for name, layer in more.items() if f".{_NEXT_TOKEN}." in name}
        for name, layer in more.items():
            if layer not in further:
                raise self.stored.refusal(f"has {name}, config.json says {count} layers")

    def _expect(self, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
        if found != shape:
            raise self.stored.refusal(
                f"has {name} of shape {list(found)}, config.json says {list(shape)}"
            )
