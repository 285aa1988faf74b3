"""A strategy over real workers, and a grid that notes every task and can spoil replies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Error, Message, MessageType, RecordDict
from torch import Tensor

from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import Settings
from fomoe_flwr.data.source import prepare_tokenizer
from fomoe_flwr.data.tokenizer import tokenizer_digest, tokenizer_json
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.seats import RunIdentity
from fomoe_flwr.federation.strategy import FoMoEStrategy
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT

WORKERS = 3
BAD = 1
"""The worker that something happens to."""
BAD_ROUND = 2
FIRST_NODE = 2
"""The in-process grid numbers its nodes from here, in worker order."""


@dataclass
class Snapshot:
    """The server's side at the end of a round."""

    record: RoundRecord
    state: dict[str, Tensor]
    momentum: dict[str, Tensor]


class Federation:
    """A strategy with everything it needs, and what it left behind after every round."""

    def __init__(self, settings: Settings) -> None:
        tokenizer = prepare_tokenizer(settings)
        text = tokenizer_json(tokenizer)
        config = transformers_config(settings.model, settings.data.sequence_length)
        model = build_model(settings.model, config, seed=settings.seed)
        self.settings = settings
        self.spec = StateSpec.of(settings.model, config)
        self.state = state_of(model)
        self.outer = OuterStep(settings.outer)
        self.snapshots: list[Snapshot] = []
        self.after_round: Callable[[RoundRecord], None] = lambda record: None
        self.strategy = FoMoEStrategy(
            settings,
            self.spec,
            self.state,
            self.outer,
            RunIdentity("ab" * 16, text, tokenizer_digest(text)),
            self._note,
        )
        self.initial = self._snapshot(RoundRecord(0, self.strategy.layouts.expected(1)))

    def _snapshot(self, record: RoundRecord) -> Snapshot:
        return Snapshot(
            deepcopy(record),
            {key: value.clone() for key, value in self.state.items()},
            {key: value.clone() for key, value in self.outer.momentum.items()},
        )

    def _note(self, record: RoundRecord) -> None:
        self.snapshots.append(self._snapshot(record))
        self.after_round(record)

    def run(self, grid: InProcessGrid) -> list[Snapshot]:
        self.strategy.start(grid)
        return self.snapshots


Tamper = Callable[[Message, Message, "WatchedGrid"], list[Message]]
"""(request, true reply, grid) -> what arrives instead."""


@dataclass
class Sent:
    """One task as it left the server, and its true reply."""

    server_round: int
    worker: int
    request: Message
    reply: Message | None = None

    def update(self, settings: Settings, spec: StateSpec) -> tuple[Tensor, Tensor, float]:
        assert self.reply is not None
        content = self.reply.content
        record = content.array_records[PSEUDO_GRADIENT]
        shared, experts = (
            wire.decode(record[key], settings.wire.up, record[key].shape[0]) for key in wire.VECTORS
        )
        return shared, experts, wire.metrics_in(content, ("tokens",))["tokens"]


@dataclass
class Watch:
    """What a grid saw, and what it shall spoil."""

    tamper: Tamper | None = None
    tasks: dict[str, Sent] = field(default_factory=dict)

    def of(self, server_round: int, worker: int) -> Sent:
        found = [
            t for t in self.tasks.values() if (t.server_round, t.worker) == (server_round, worker)
        ]
        assert len(found) == 1
        return found[0]


class WatchedGrid(InProcessGrid):
    """An in-process grid that notes all tasks and spoils those of one worker in one round."""

    def __init__(self, tmp_path: Path, num_nodes: int = WORKERS, tamper: Tamper | None = None):
        super().__init__(client_app, num_nodes, tmp_path / "workers")
        self.watch = Watch(tamper)
        self.absent: set[int] = set()

    def node_config(self, node: int) -> dict[str, Any]:
        return self._contexts[node].node_config

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            if message.metadata.message_type == MessageType.TRAIN:
                words = wire.json_in(message.content, wire.TASK)
                self.watch.tasks[message_id] = Sent(words["server_round"], words["worker"], message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived: list[Message] = []
        for message_id in message_ids:
            for reply in super().pull_messages([message_id]):
                arrived += self._deliver(message_id, reply)
        return arrived

    def _deliver(self, message_id: str, reply: Message) -> list[Message]:
        task = self.watch.tasks.get(message_id)
        if task is None:
            return [reply]
        task.reply = reply
        if self.watch.tamper is None or (task.server_round, task.worker) != (BAD_ROUND, BAD):
            return [reply]
        return self.watch.tamper(task.request, reply, self)


def with_arrays(
    request: Message, reply: Message, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[Message]:
    """Answer like `reply` but with other arrays; the true reply stays as it was."""
    content = RecordDict(dict(reply.content))
    record = wire.arrays_of(*(reply.content.array_records[PSEUDO_GRADIENT].values()))
    changed = change(dict(record))
    for key in list(record):
        del record[key]
    for key, value in changed.items():
        record[key] = value
    content[PSEUDO_GRADIENT] = record
    return [Message(content, reply_to=request)]


def error_reply(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    return [Message(Error(2, "RuntimeError: the disk\nis full"), reply_to=request)]


def expected_state(
    federation: Federation, before: Snapshot, updates: Mapping[int, tuple[Tensor, Tensor, float]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take the Nesterov step by its definition, in float64: (state, momentum)."""
    settings, spec = federation.settings, federation.spec
    layout = federation.strategy.layouts.expected(BAD_ROUND)
    total = sum(tokens for _, _, tokens in updates.values())
    mean_shared = sum(shared.double() * (n / total) for shared, _, n in updates.values())
    assert isinstance(mean_shared, Tensor)
    gradients = dict(spec.split_shared(mean_shared))
    present = {key: torch.ones(value.shape[:1]) for key, value in gradients.items()}
    for entry in spec.expert:
        assert entry.layer is not None
        gradient, weight = (
            torch.zeros(entry.shape, dtype=torch.float64),
            torch.zeros(entry.shape[0]),
        )
        for worker, (_, experts, n) in updates.items():
            residents = layout.of_worker(worker)
            held = list(residents[entry.layer])
            gradient[held] += n * spec.split_experts(experts, residents)[entry.key].double()
            weight[held] += n
        rows = (-1, *(1 for _ in entry.shape[1:]))
        gradients[entry.key] = gradient / weight.clamp(min=1e-9).double().view(rows)
        present[entry.key] = (weight > 0).float()
    mu, lr = settings.outer.momentum, settings.outer.lr
    state, momentum = {}, {}
    for key, gradient in gradients.items():
        old = before.momentum[key].double()
        velocity = mu * old + gradient
        step = lr * (gradient + mu * velocity)
        mask = present[key].bool()
        state[key] = before.state[key].double()
        state[key][mask] -= step[mask]
        momentum[key] = old.clone()
        momentum[key][mask] = velocity[mask]
    return state, momentum
