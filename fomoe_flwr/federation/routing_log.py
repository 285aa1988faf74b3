"""What a round says about routing: tables by layer and worker, and their means for the metrics.

A column has a name and one number for each layer. `routing.jsonl` has every column, with null for
an undefined number. `metrics.jsonl` has the mean of every column over the layers, as `moe/` and the
name of the column; an undefined mean is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.config import RoutingMode, Settings
from fomoe_flwr.data.tokens import TokenBlocks, heldout_windows
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.model import routing_metrics as measure
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.parameters.fragments import fragment_of_round
from fomoe_flwr.parameters.keys import is_router_key

Columns = dict[str, list[float]]
"""Name of a measure -> one number for each layer."""

Choose = Callable[[Tensor], Tensor]
"""The assembled model's choices, [num_layers, tokens, top_k], for [windows, tokens] ids."""

FRACTIONS = ("ghost_fraction", "all_ghost_fraction")
"""Columns whose means are in the metrics already, from the replies."""


class RoutingLog:
    """Measures the routing of every round on fixed held-out tokens, the probe."""

    def __init__(self, settings: Settings, spec: StateSpec, blocks: TokenBlocks) -> None:
        self.settings = settings
        self.spec = spec
        self.probe = probe_windows(blocks, settings.eval.probe_tokens)
        self._before: Tensor | None = None

    def begin(self, choose: Choose) -> None:
        """Note which experts the assembled model chooses before the first (or resumed) round."""
        self._before = self._choices(choose)

    def close(
        self, record: RoundRecord, choose: Choose, state: State
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the metrics of a finished round and its line in `routing.jsonl`."""
        columns, per_worker = self._tables(record)
        columns["router_cosine"] = self._cosines(state)
        columns["expert_drift"] = self._drift(record, state)
        before, self._before = self._before, self._choices(choose)
        if before is not None and self._before is not None:
            columns["churn"] = measure.churn(before, self._before, self.spec.num_experts).tolist()
        means = {
            f"moe/{name}": measure.defined_mean(values)
            for name, values in columns.items()
            if name not in FRACTIONS
        }
        layers = _rows(columns)
        for layer, load in zip(layers, record.load.tolist(), strict=True):
            layer["load"] = load
        line = {
            "round": record.server_round,
            "layers": layers,
            "workers": [
                {
                    "worker": worker,
                    "tokens": record.counts[worker].tokens,
                    "layers": _rows(per_worker[worker]),
                }
                for worker in sorted(per_worker)
            ],
        }
        return {name: value for name, value in means.items() if not math.isnan(value)}, line

    def _choices(self, choose: Choose) -> Tensor | None:
        return None if self.probe is None else choose(self.probe)

    def _tables(self, record: RoundRecord) -> tuple[Columns, dict[int, Columns]]:
        """Measure the routing counts of all replies: pooled, and of each worker alone."""
        workers = sorted(record.counts)
        counts = [record.counts[worker] for worker in workers]
        together = measure_counts(measure.pool(counts))
        apart: dict[int, Columns] = {}
        for worker, own in zip(workers, counts, strict=True):
            held = record.layout.of_worker(worker)
            apart[worker] = {"residents": [len(experts) for experts in held]}
            apart[worker] |= self._expected(held)
            is_partial = self.settings.model.routing_mode is RoutingMode.PARTITIONED
            apart[worker] |= measure_counts(own, held if is_partial else None)
        tokens = [own.tokens for own in counts]
        for name in ("ghost_expected", "all_ghost_expected"):
            # Weighted by the tokens that each worker routed, like the measured shares.
            table = [apart[worker][name] for worker in workers]
            together[name] = [
                sum(n * value for n, value in zip(tokens, column, strict=True))
                / max(1, sum(tokens))
                for column in zip(*table, strict=True)
            ]
        if record.choices:
            stacked = torch.stack([record.choices[worker] for worker in workers])
            agreement = measure.agreement(stacked, self.spec.num_experts)
            for worker, row in zip(workers, agreement.tolist(), strict=True):
                apart[worker]["worker_agreement"] = row
            together["worker_agreement"] = agreement.mean(0).tolist()
        return together, apart

    def _expected(self, held: Sequence[Sequence[int]]) -> Columns:
        """Return the ghost shares of these residents at uniform routing; none in `partitioned`."""
        shape = self.settings.model
        if shape.routing_mode is RoutingMode.PARTITIONED:
            nothing = [0.0] * len(held)
            return {"ghost_expected": nothing, "all_ghost_expected": nothing}
        experts, top_k, sizes = shape.num_experts, shape.top_k, list(map(len, held))
        return {
            "ghost_expected": [measure.uniform_ghost_share(experts, size) for size in sizes],
            "all_ghost_expected": [
                measure.uniform_all_ghost_share(experts, size, top_k) for size in sizes
            ],
        }

    def _cosines(self, state: State) -> list[float]:
        routers = {
            self.spec.layer_of(key): value
            for key, value in state.items()
            if is_router_key(key) and value.dim() == 2  # not a selection bias
        }
        return [measure.router_cosine(routers[layer]) for layer in sorted(routers)]

    def _drift(self, record: RoundRecord, state: State) -> list[float]:
        """Return how far the copies of experts drifted apart, relative to the new weights.

        Layers that were not synchronised in this round have NaN.
        """
        outer = self.settings.outer
        part = self.spec.fragment(fragment_of_round(outer, record.server_round), outer.fragments)
        assert record.disagreement is not None
        assert record.copies is not None
        squares = torch.zeros(self.spec.num_layers, self.spec.num_experts, dtype=torch.float64)
        several = {layer for layer, copies in enumerate(record.copies) if bool((copies > 1).any())}
        for entry in part.expert:
            if self.spec.layer_of(entry.key) not in several:  # Nothing lies apart there.
                continue
            # A selection bias has one number an expert, and no second axis.
            rows = state[entry.key].reshape(self.spec.num_experts, -1)
            norms = torch.linalg.vector_norm(rows, dim=1).double()
            squares[self.spec.layer_of(entry.key)] += norms.square()
        drift = measure.expert_drift(record.disagreement, squares.sqrt(), record.copies)
        sent = {self.spec.layer_of(entry.key) for entry in part.expert}
        return [value if i in sent else math.nan for i, value in enumerate(drift.tolist())]


def probe_windows(blocks: TokenBlocks, num_tokens: int) -> Tensor | None:
    """Return at most `num_tokens` held-out ids, [windows, tokens], spread over all domains."""
    if num_tokens == 0:
        return None
    windows = torch.from_numpy(blocks.window(heldout_windows(blocks, num_tokens)))
    return windows[:, : min(blocks.sequence_length, num_tokens)]


def measure_counts(counts: RoutingCounts, scored: Sequence[Sequence[int]] | None = None) -> Columns:
    """Return ghosts and balance by layer; `scored` are the experts among which routers choose."""
    everything = range(counts.load.shape[1])
    loads = [
        load[list(everything if scored is None else scored[layer])]
        for layer, load in enumerate(counts.load)
    ]
    columns = {
        "ghost_fraction": measure.ghost_share(counts).tolist(),
        "all_ghost_fraction": measure.all_ghost_share(counts).tolist(),
    }
    for name, function in (
        ("load_entropy", measure.load_entropy),
        ("load_kl", measure.load_kl),
        ("max_vio", measure.max_violation),
        ("load_cv", measure.load_variation),
        ("dead_experts", measure.dead_share),
    ):
        # A worker that has left holds nothing to choose from.
        columns[name] = [float(function(load)) if len(load) else math.nan for load in loads]
    return columns


def _rows(columns: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Turn columns into one object a layer."""
    return [
        {"layer": layer}
        | {
            name: None if math.isnan(value) else value
            for name, value in zip(columns, values, strict=True)
        }
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    ]
