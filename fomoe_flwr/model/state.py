"""The model's state as two flat vectors: what everybody has, and what only holders have.

The platform's cost is per object, so state travels as one vector of shared parameters and one of
the resident experts. `StateSpec` is the single description of their order; server and worker
derive it from the same settings and compare its digest.

Order: shared keys in model order; expert keys in model order, and inside a key the resident rows in
ascending expert id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fomoe_flwr.codecs.floats import Empty
from fomoe_flwr.config import ModelSettings
from fomoe_flwr.errors import InputError
from fomoe_flwr.model.blocks import BIAS_NAMES
from fomoe_flwr.model.device_copy import copy, host_empty
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.shards import fill
from fomoe_flwr.parameters.fragments import fragment_rows
from fomoe_flwr.parameters.keys import is_expert_key, layer_of, sparse_layers

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One state key, or some rows of a shared one, with its shape in the full model."""

    key: str
    shape: tuple[int, ...]
    layer: int | None
    """Sparse layer of an expert key, whose first axis enumerates experts; None if shared. Sparse
    layers are counted from 0: dense ones have no number here, and no row in a layout."""
    start: int = 0
    """First of `shape[0]` rows of a shared key; more than 0 only in a fragment."""
    is_parameter: bool = True
    """False for a buffer: it travels with the weights but has no optimizer state."""

    def of(self, state: State) -> Tensor:
        """View this entry's part of a full state."""
        whole = state[self.key]
        if not self.shape or whole.shape[0] == self.shape[0]:
            return whole
        return whole[self.start : self.start + self.shape[0]]

    @property
    def row_size(self) -> int:
        """Elements of one expert of this key (of the whole key if shared)."""
        return prod(self.shape[1:]) if self.layer is not None else prod(self.shape)


@dataclass(frozen=True)
class StateSpec:
    """Keys, shapes and order of a model's state."""

    shared: tuple[Entry, ...]
    expert: tuple[Entry, ...]
    num_layers: int
    """Sparse layers."""
    num_experts: int
    sparse: tuple[int, ...] = ()
    """Numbers of the sparse layers among all decoder layers; empty if all are sparse."""

    @classmethod
    def of(cls, settings: ModelSettings, config: PreTrainedConfig) -> StateSpec:
        """Read the spec off the full model, built on the meta device."""
        return cls.of_model(build_model(settings, config, device="meta"), settings)

    @classmethod
    def of_model(cls, model: nn.Module, settings: ModelSettings) -> StateSpec:
        """Read the spec off a model that has all experts."""
        shared: list[Entry] = []
        expert: list[Entry] = []
        parameters = {name for name, _ in model.named_parameters()}
        state = state_of(model)
        sparse = sparse_layers(state)
        for key, value in state.items():
            is_expert = is_expert_key(key, settings.routing_mode)
            layer = sparse.index(layer_of(key)) if is_expert else None
            entry = Entry(key, tuple(value.shape), layer, is_parameter=key in parameters)
            (expert if is_expert else shared).append(entry)
        return cls(tuple(shared), tuple(expert), len(sparse), settings.num_experts, sparse)

    def layer_of(self, key: str) -> int:
        """Return the sparse layer of an expert's or a router's key."""
        return self.sparse.index(layer_of(key)) if self.sparse else layer_of(key)

    def fragment(self, fragment: int, num_fragments: int) -> StateSpec:
        """Return what one fragment carries, -1 being the whole; see `parameters.fragments`."""
        if num_fragments == 1 or fragment < 0:
            return self
        shared = []
        for entry in self.shared:
            start, stop = fragment_rows(entry.key, entry.shape[0], fragment, num_fragments)
            if stop > start:
                shared.append(replace(entry, shape=(stop - start, *entry.shape[1:]), start=start))
        expert = [
            entry
            for entry in self.expert
            if fragment_rows(entry.key, 1, fragment, num_fragments) == (0, 1)
        ]
        return replace(self, shared=tuple(shared), expert=tuple(expert))

    def parameters(self) -> StateSpec:
        """Return the part of the state that an optimizer keeps state for."""
        return replace(
            self,
            shared=tuple(entry for entry in self.shared if entry.is_parameter),
            expert=tuple(entry for entry in self.expert if entry.is_parameter),
        )

    @property
    def shared_size(self) -> int:
        """Elements of the shared vector."""
        return sum(entry.row_size for entry in self.shared)

    def experts_size(self, residents: Residents) -> int:
        """Elements of the expert vector of a worker with these residents."""
        return sum(entry.row_size * len(residents[_layer(entry)]) for entry in self.expert)

    def digest(self) -> str:
        """Identify the spec: two sides with the same digest agree on every offset."""
        text = repr([(e.key, e.shape, e.layer, e.start) for e in (*self.shared, *self.expert)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pack_shared(self, state: State, empty: Empty | None = None) -> Tensor:
        """Concatenate the shared keys into one fp32 vector, which `empty` makes."""
        return _packed([(entry.of(state), None) for entry in self.shared], empty)

    def pack_experts(
        self, state: State, residents: Residents | None = None, empty: Empty | None = None
    ) -> Tensor:
        """Concatenate expert rows into one fp32 vector, which `empty` makes.

        With `residents`, `state` is a full one and those rows are taken; without, it is a
        worker's, whose rows are its residents already.
        """
        return _packed(
            [
                (state[entry.key], None if residents is None else residents[_layer(entry)])
                for entry in self.expert
            ],
            empty,
        )

    def split_shared(self, vector: Tensor) -> dict[str, Tensor]:
        """View a shared vector as its keys. Raises ValueError if the size is wrong."""
        _expect(vector, self.shared_size, "shared")
        sizes = [entry.row_size for entry in self.shared]
        pieces = vector.split(sizes) if sizes else ()
        return {e.key: p.view(e.shape) for e, p in zip(self.shared, pieces, strict=True)}

    def split_experts(self, vector: Tensor, residents: Residents) -> dict[str, Tensor]:
        """View an expert vector as `[R, ...]` keys. Raises ValueError if the size is wrong."""
        _expect(vector, self.experts_size(residents), "expert")
        counts = [len(residents[_layer(entry)]) for entry in self.expert]
        sizes = [entry.row_size * count for entry, count in zip(self.expert, counts, strict=True)]
        pieces = vector.split(sizes) if sizes else ()
        return {
            entry.key: piece.view(count, *entry.shape[1:])
            for entry, piece, count in zip(self.expert, pieces, counts, strict=True)
        }


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that make up a model, each once, in model order.

    Parameters and persistent buffers; a tied weight appears under its first name only.
    """
    return {name: value.detach() for name, value in _named(model).items()}


class StateError(InputError):
    """Tensors that are not those of a model."""


def check_state(model: nn.Module, state: State) -> None:
    """Refuse a state that lacks a tensor of the model, or has one of another kind.

    Raises StateError.
    """
    for key, own in _named(model).items():
        if key not in state:
            raise StateError(f"{key} is missing")
        check_kind(key, state[key], own)


def check_kind(name: str, value: Tensor, like: Tensor) -> None:
    """Refuse a tensor of another type or shape. Raises StateError."""
    found, expected = (f"{str(t.dtype)[6:]} {list(t.shape)}" for t in (value, like))
    if found != expected:
        raise StateError(f"{name} is {found}, {expected} is expected")


def hold(model: nn.Module, state: State) -> None:
    """Make a model hold these very tensors, as one without memory of its own must.

    Raises StateError.
    """
    check_state(model, state)
    places: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                places.setdefault(id(value), []).append((kind, name))
    for key, own in _named(model).items():
        value = state[key]
        if isinstance(own, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for kind, name in places[id(own)]:
            kind[name] = value


def _named(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    return state | {name: b for name, b in model.named_buffers() if name in persistent}


def cast_parameters(model: PreTrainedModel, precision: str) -> None:
    """Hold a model in bfloat16 if `local.precision` says so, but for what must stay in fp32.

    That is what its class names, and what routers add when they choose.
    """
    if precision != "bfloat16_parameters":
        return
    strict = sorted(model._keep_in_fp32_modules_strict or ())
    kept = re.compile(rf"(^|\.)({'|'.join((*strict, *BIAS_NAMES))})(\.|$)")
    for key, value in _named(model).items():
        if value.is_floating_point() and not kept.search(key):
            value.data = value.data.to(torch.bfloat16)


def load_state(model: nn.Module, state: State) -> None:
    """Copy a state into a model of the same residents, or into its shards."""
    for key, target in state_of(model).items():
        fill(target, state[key])


def _packed(parts: Sequence[tuple[Tensor, Sequence[int] | None]], empty: Empty | None) -> Tensor:
    """Copy tensors, or some rows of them, one behind the other into one vector."""
    shapes = [
        tensor.shape if rows is None else torch.Size((len(rows), *tensor.shape[1:]))
        for tensor, rows in parts
    ]
    sizes = [shape.numel() for shape in shapes]
    vector = (empty or host_empty)(sum(sizes))
    pieces = vector.split(sizes) if sizes else ()
    for piece, shape, (tensor, rows) in zip(pieces, shapes, parts, strict=True):
        target, source = piece.view(shape), tensor.detach()
        if rows is None:
            copy(target, source)
        elif source.dtype == target.dtype and source.device == target.device:
            torch.index_select(source, 0, torch.tensor(rows, dtype=torch.long), out=target)
        else:
            copy(target, source[torch.tensor(rows, dtype=torch.long)])
    return vector


def _layer(entry: Entry) -> int:
    assert entry.layer is not None
    return entry.layer


def _expect(vector: Tensor, size: int, kind: str) -> None:
    if vector.dim() != 1 or vector.numel() != size:
        raise ValueError(
            f"{kind} vector has shape {list(vector.shape)}, the model's layout needs [{size}]"
        )
