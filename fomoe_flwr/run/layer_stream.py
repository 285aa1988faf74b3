"""The layer stream: a model computes on a device that need not hold it.

All windows go through a layer before the next one is needed. Hidden states stay on the device;
a layer's weights come while the layer before it computes, and go afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.model.device_copy import copy
from fomoe_flwr.model.state import State

HIDDEN_BYTES = 2**30
"""Of the hidden states of one pass through the layers, at most."""

_Arrival = tuple[dict[str, Tensor], "torch.cuda.Event | None"]


class LayerStream:
    """A model without memory that takes its weights from `weights` when it is called.

    Parameters
    ----------
    skeleton
        The whole model, its parameters on the meta device, its computed buffers on `device`.
    weights
        The state, by key, in host memory; read anew whenever `open` is entered.
    batch_size
        Windows that go through a layer at once.
    """

    def __init__(
        self, skeleton: PreTrainedModel, weights: State, device: torch.device, batch_size: int
    ) -> None:
        self.skeleton, self.weights = skeleton, weights
        self.device, self.batch_size = device, batch_size
        self._layers: list[Any] = list(skeleton.base_model.layers)  # type: ignore[arg-type]
        self._places = _places(skeleton, weights)
        owners = {id(part): i for i, layer in enumerate(self._layers) for part in layer.modules()}
        self._keys: dict[int, list[str]] = {}
        for key, places in self._places.items():
            self._keys.setdefault(owners.get(id(places[0][0]), -1), []).append(key)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Future[_Arrival]

    def rows(self, num_tokens: int) -> int:
        """Return how many windows of so many tokens one call may take."""
        width = int(self.skeleton.config.hidden_size)
        rows = max(1, HIDDEN_BYTES // (4 * width * num_tokens), self.batch_size)
        # A layer's inputs are cut where their first axis counts windows: nothing else may be as
        # long.
        return rows - 1 if rows == num_tokens > 1 else rows

    def resident_bytes(self, num_windows: int, num_tokens: int) -> int:
        """Estimate the device memory of a call: two layers, the rest, hidden states, logits."""
        sizes = {i: sum(self.weights[k].nbytes for k in keys) for i, keys in self._keys.items()}
        layers = [size for index, size in sizes.items() if index >= 0]
        windows = min(num_windows, self.rows(num_tokens))
        config = self.skeleton.config
        hidden = 4 * num_tokens * int(config.hidden_size)
        logits = 3 * 4 * num_tokens * int(config.vocab_size)
        batch = min(self.batch_size, windows)
        return sizes.get(-1, 0) + 2 * max(layers, default=0) + 3 * windows * hidden + batch * logits

    @contextmanager
    def open(self) -> Iterator[PreTrainedModel]:
        """Yield the model, whose layers get their weights when they are called."""
        with ThreadPoolExecutor(1) as self._loader:
            self._next = self._loader.submit(self._fetch, 0)
            self._set(self._fetch(-1))
            try:
                for index, layer in enumerate(self._layers):
                    layer.forward = partial(self._run, index, layer.forward)
                yield self.skeleton
            finally:
                self._next.result()
                for index, layer in enumerate(self._layers):
                    vars(layer).pop("forward", None)
                    self._drop(index)
                self._drop(-1)
                del self._next

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """Yield the model with all of its weights on the device."""
        try:
            for index in self._keys:
                self._set(self._fetch(index))
            yield self.skeleton
        finally:
            for index in self._keys:
                self._drop(index)

    def _run(self, index: int, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        arrived = self._next.result()
        # The first layer is fetched again at the end: another call may follow.
        self._next = self._loader.submit(self._fetch, (index + 1) % len(self._layers))
        self._set(arrived)
        outputs = []
        for start in range(0, len(hidden), self.batch_size):
            rows = slice(start, start + self.batch_size)
            cut = partial(_cut, count=len(hidden), rows=rows)
            named = {name: cut(each) for name, each in kwargs.items()}
            # Not over the input: some models use it again behind the layer.
            outputs.append(forward(hidden[rows], *map(cut, args), **named))
        self._drop(index)
        return _joined(outputs)

    def _fetch(self, index: int) -> _Arrival:
        """Bring a layer's weights to the device, or those of no layer (-1)."""
        keys = self._keys.get(index, [])
        if self._side is None:
            return {key: self.weights[key].to(self.device) for key in keys}, None
        with torch.cuda.stream(self._side):
            found = {}
            for key in keys:
                value = self.weights[key]
                found[key] = torch.empty(value.shape, dtype=value.dtype, device=self.device)
                copy(found[key], value)
            event = torch.cuda.Event()
            event.record()
        return found, event

    def _set(self, arrived: _Arrival) -> None:
        values, event = arrived
        if event is not None:
            event.wait()
        for key, value in values.items():
            if value.is_cuda:
                value.record_stream(torch.cuda.current_stream(self.device))
            for module, name in self._places[key]:
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
                else:
                    module._buffers[name] = value

    def _drop(self, index: int) -> None:
        for key in self._keys.get(index, []):
            for module, name in self._places[key]:
                kind: Any = module._parameters if name in module._parameters else module._buffers
                kind[name] = kind[name].to("meta")


def _joined(parts: list[Any]) -> Any:
    """Put what a layer returned for some windows at a time together."""
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(each)) for each in zip(*parts, strict=True))
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


def _places(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[tuple[Any, str]]]:
    """Return for every state key the modules that hold it, and under which name."""
    found: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                found.setdefault(id(value), []).append((module, name))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: found[id(named[key])] for key in weights}


def _cut(value: Any, count: int, rows: slice) -> Any:
    """Take the rows of what has one for each window; leave everything else."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == count > 1 else value
    if isinstance(value, tuple):
        return tuple(_cut(each, count, rows) for each in value)
    return value
