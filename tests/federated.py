"""A whole federation in this process, without text: strategy, wire, workers and their disks.

The real server strategy and client app exchange real messages; only the data is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MessageType
from torch import Tensor

from fomoe_flwr import files
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import Settings
from fomoe_flwr.data.tokenizer import tokenizer_digest
from fomoe_flwr.federation import client, wire
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.seats import RunIdentity
from fomoe_flwr.federation.strategy import FoMoEStrategy
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.parameters.fragments import fragment_of_round, moments_of_round
from fomoe_flwr.worker.round import RoundResult, RoundTask
from fomoe_flwr.worker.trainer import LocalReport

Weights = dict[str, Tensor]

OUTER = {
    "average": ["outer=average"],
    "nesterov": ["outer=nesterov"],
    "local_adamw": ["outer=local_adamw"],
    "des_loc": ["outer=des_loc", "outer.first_moment_every=2", "outer.second_moment_every=3"],
}
"""Every outer mode, with periods that differ."""


class Counting:
    """A worker's text: rows that count up in steps, every worker from another place."""

    def __init__(self, settings: Settings, worker: int, position: int = 0) -> None:
        self.settings, self.worker, self.position = settings, worker, position

    def batches(self, position: int) -> Counting:
        """Open at a batch."""
        return Counting(self.settings, self.worker, position)

    def next_batch(self) -> Tensor:
        """Return the next `[B, S + 1]` windows."""
        self.position += 1
        rows = self.settings.local.batch_size
        starts = [7 * (rows * self.position + row) + 61 * self.worker for row in range(rows)]
        length = self.settings.data.sequence_length + 1
        return torch.tensor(
            [[(start + (1 + start % 5) * i) % 256 for i in range(length)] for start in starts]
        )

    def state(self) -> dict[str, Any]:
        """Return the cursor."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a cursor."""
        self.position = state["position"]


def use_made_up_data(patch: pytest.MonkeyPatch) -> None:
    """Give all workers `Counting` text."""
    # No power cut is expected here, and waiting for disks takes longer than training.
    patch.setattr(files, "_flush", lambda path: None)
    patch.setattr(client, "_node_data", lambda settings, worker, *_: Counting(settings, worker))
    patch.setattr(client.CACHE, "batches", lambda data, position: data.batches(position))


def use_no_training(patch: pytest.MonkeyPatch) -> None:
    """Replace local training by replies of the right sizes; everything around it stays real."""

    def instead(task: RoundTask, open_batches: object) -> RoundResult:
        settings, spec = task.settings, task.spec
        outer = settings.outer
        part = spec.fragment(fragment_of_round(outer, task.server_round), outer.fragments)
        own = part.parameters()
        report = LocalReport(
            loss=1.0,
            last_loss=1.0,
            balance_loss=1.0,
            grad_norm=1.0,
            lr=1e-3,
            tokens=8,
            seconds=0.1,
            routing=RoutingCounts(
                torch.ones(spec.num_layers, spec.num_experts, dtype=torch.long),
                torch.zeros(spec.num_layers, dtype=torch.long),
                torch.zeros(spec.num_layers, dtype=torch.long),
                8,
            ),
        )
        return RoundResult(
            shared=torch.ones(part.shared_size),
            experts=torch.ones(part.experts_size(task.residents)),
            moments={
                name: (torch.ones(own.shared_size), torch.ones(own.experts_size(task.residents)))
                for name in moments_of_round(outer, task.server_round)
            },
            report=report,
            inner_state_fresh=False,
            num_fresh_experts=0,
        )

    patch.setattr(client, "run_round", instead)


@dataclass
class Traffic:
    """Payload bytes by (round, worker)."""

    down: dict[tuple[int, int], int] = field(default_factory=dict)
    up: dict[tuple[int, int], int] = field(default_factory=dict)


class CountingGrid(InProcessGrid):
    """An in-process grid that weighs every task and every reply."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        super().__init__(client_app, num_nodes, folder)
        self.traffic = Traffic()
        self._places: dict[str, tuple[int, int]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Weigh tasks."""
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            if message.metadata.message_type == MessageType.TRAIN:
                words = wire.json_in(message.content, wire.TASK)
                place = words["server_round"], words["worker"]
                self._places[message_id] = place
                self.traffic.down[place] = wire.payload_bytes(message.content)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Weigh replies."""
        arrived = []
        for message_id in message_ids:
            for reply in super().pull_messages([message_id]):
                place = self._places.get(message_id)
                if place and not reply.has_error():
                    self.traffic.up[place] = wire.payload_bytes(reply.content)
                arrived.append(reply)
        return arrived


@dataclass
class Snapshot:
    """The server at the end of a round."""

    record: RoundRecord
    state: Weights
    outer: Weights


class Federation:
    """One run without evaluation and files of the server."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        config = transformers_config(settings.model, settings.data.sequence_length)
        self.settings = settings
        self.folder = folder
        self.spec = StateSpec.of(settings.model, config)
        self.state = state_of(build_model(settings.model, config, seed=settings.seed))
        self.initial = {key: value.clone() for key, value in self.state.items()}
        self.outer = OuterStep(settings.outer)
        self.grid = CountingGrid(folder, settings.layout.num_workers)
        self.rounds: list[Snapshot] = []
        self.after_round: Callable[[RoundRecord], None] = lambda record: None
        text = '{"made": "up"}'
        self.strategy = FoMoEStrategy(
            settings,
            self.spec,
            self.state,
            self.outer,
            RunIdentity("ab" * 16, text, tokenizer_digest(text)),
            self._note,
        )

    def _note(self, record: RoundRecord) -> None:
        self.rounds.append(
            Snapshot(
                record,
                {key: value.clone() for key, value in self.state.items()},
                {key: value.clone() for key, value in self.outer.tensors().items()},
            )
        )
        self.after_round(record)

    def run(self) -> Federation:
        """Train all rounds."""
        self.strategy.start(self.grid)
        return self

    @property
    def traffic(self) -> Traffic:
        """What travelled."""
        return self.grid.traffic


def assert_identical(got: Weights, want: Weights) -> None:
    """Compare bit by bit."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def failures(federation: Federation) -> dict[int, dict[int, str]]:
    """Return what failed, by round and worker."""
    return {
        s.record.server_round: s.record.failures for s in federation.rounds if s.record.failures
    }


def fragment_part(key: str, value: Tensor, fragment: int, fragments: int) -> Tensor:
    """View the part of a full key that a fragment carries, by its definition."""
    if ".layers." in key:
        mine = int(key.split(".")[2]) % fragments == fragment
        return value if mine else value[:0]
    rows = len(value)
    return value[rows * fragment // fragments : rows * (fragment + 1) // fragments]


Federate = Callable[..., Federation]
"""Runs a micro federation with overrides, in a folder of its own."""
OneRound = Callable[..., tuple[Weights, Federation]]
"""Runs one round with overrides; returns how far every weight moved, and the federation."""
