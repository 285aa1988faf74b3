"""The strategy over real workers and a grid that loses, spoils and repeats their replies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType, RecordDict
from torch import Tensor

from fomoe_flwr import __version__, costs
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.data.source import prepare_tokenizer
from fomoe_flwr.data.tokenizer import tokenizer_digest, tokenizer_json
from fomoe_flwr.federation import client, wire
from fomoe_flwr.federation import seats as seats_module
from fomoe_flwr.federation.apps import client_app
from fomoe_flwr.federation.in_process_grid import InProcessGrid
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.seats import RunIdentity
from fomoe_flwr.federation.strategy import FederationError, FoMoEStrategy
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT
from fomoe_flwr.worker.round import RoundResult, RoundTask
from fomoe_flwr.worker.training import LocalReport

WORKERS = 3
BAD = 1
"""The worker that something happens to."""
BAD_ROUND = 2
FIRST_NODE = 2
"""The in-process grid numbers its nodes from here, in worker order."""


@pytest.fixture
def make_settings(small_text: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(*overrides: str) -> Settings:
        return load_settings(
            [
                "preset=tiny",
                f"data.path={small_text}",
                f"output_dir={tmp_path}",
                f"layout.num_workers={WORKERS}",
                "local.steps=1",
                "local.batch_size=2",
                "local.threads=1",
                "federation.node_wait_seconds=0",
                *overrides,
            ]
        )

    return make


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace local training by a random update; everything else of a worker stays real."""

    def instead(task: RoundTask, open_batches: object) -> RoundResult:
        generator = torch.Generator().manual_seed(100 * task.server_round + task.worker)
        shared, experts = (
            torch.randn(vector.shape, generator=generator) * 1e-2
            for vector in (task.shared, task.experts)
        )
        tokens = 60 + task.worker
        nobody = torch.zeros(task.spec.num_layers, dtype=torch.long)
        load = torch.ones(task.spec.num_layers, task.spec.num_experts, dtype=torch.long)
        routing = RoutingCounts(load=load, ghosts=nobody, all_ghost=nobody, tokens=tokens)
        report = LocalReport(6.0, 6.0, 1.0, 1.0, 1e-3, tokens, 0.1, routing)
        return RoundResult(shared, experts, {}, report, False, 0)

    monkeypatch.setattr(client, "run_round", instead)


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


def with_json(reply: Message, **changes: Any) -> list[Message]:
    words = wire.json_in(reply.content, wire.TASK) | changes
    reply.content[wire.TASK] = wire.json_record(words)
    return [reply]


def with_load(reply: Message, first: int) -> list[Message]:
    load = wire.json_in(reply.content, wire.TASK)["load"]
    load[0][0] = first
    return with_json(reply, load=load)


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


def nan_in_experts(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    def spoil(arrays: dict[str, Any]) -> dict[str, Any]:
        size = arrays["experts"].shape[0]
        vector = torch.zeros(size)
        vector[size // 2] = float("nan")
        return arrays | {"experts": wire.encode(vector, "float32")}

    return with_arrays(request, reply, spoil)


def infinity_in_shared(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    def spoil(arrays: dict[str, Any]) -> dict[str, Any]:
        vector = torch.full((arrays["shared"].shape[0],), float("inf"))
        return arrays | {"shared": wire.encode(vector, "float32")}

    return with_arrays(request, reply, spoil)


def wrong_shape(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    def spoil(arrays: dict[str, Any]) -> dict[str, Any]:
        vector = torch.zeros(arrays["experts"].shape[0] - 1)
        return arrays | {"experts": wire.encode(vector, "float32")}

    return with_arrays(request, reply, spoil)


def wrong_keys(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    return with_arrays(
        request, reply, lambda arrays: {"shared": arrays["shared"], "router": arrays["experts"]}
    )


def garbage(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    def spoil(arrays: dict[str, Any]) -> dict[str, Any]:
        whole = arrays["shared"]
        cut = type(whole)(whole.dtype, tuple(whole.shape), whole.stype, b"\x80\x04garbage")
        return arrays | {"shared": cut}

    return with_arrays(request, reply, spoil)


def oversized(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    def spoil(arrays: dict[str, Any]) -> dict[str, Any]:
        whole = arrays["shared"]
        grown = type(whole)(whole.dtype, tuple(whole.shape), whole.stype, whole.data + bytes(2**20))
        return arrays | {"shared": grown}

    return with_arrays(request, reply, spoil)


def late(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    """The true reply arrives, but to the task of the round before."""
    words = wire.json_in(reply.content, wire.TASK) | {"server_round": BAD_ROUND - 1}
    reply.content[wire.TASK] = wire.json_record(words)
    return [Message(reply.content, reply_to=grid.watch.of(BAD_ROUND - 1, BAD).request)]


def no_metrics(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    content = RecordDict({k: v for k, v in reply.content.items() if k != wire.METRICS})
    return [Message(content, reply_to=request)]


def one_metric_missing(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    content = RecordDict(dict(reply.content))
    words = {k: v for k, v in reply.content.metric_records[wire.METRICS].items() if k != "tokens"}
    content[wire.METRICS] = wire.metrics_record(words)
    return [Message(content, reply_to=request)]


def someone_elses_reply(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    """The reply of worker 0 arrives a second time, and this worker's does not."""
    duplicate = grid.watch.of(BAD_ROUND, 0).reply
    assert duplicate is not None
    return [duplicate]


def no_reply(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    return []


def error_reply(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    return [Message(Error(2, "RuntimeError: the disk\nis full"), reply_to=request)]


def empty_reply(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
    return [Message(RecordDict(), reply_to=request)]


FAULTS: Mapping[str, tuple[Tamper, str]] = {
    "no reply": (no_reply, "no reply before the round's deadline"),
    "error reply": (error_reply, "RuntimeError: the disk is full (Flower error 2)"),
    "NaN": (nan_in_experts, "array holds NaN or infinite numbers"),
    "infinity": (infinity_in_shared, "array holds NaN or infinite numbers"),
    "wrong shape": (wrong_shape, "array has shape ["),
    "wrong keys": (
        wrong_keys,
        "needs the arrays shared, experts in 'pseudo_gradient' (got ['router', 'shared'])",
    ),
    "wrong round": (
        lambda request, reply, grid: with_json(reply, server_round=1),
        "answers server_round=1, this round is server_round=2",
    ),
    "wrong worker": (
        lambda request, reply, grid: with_json(reply, worker=0),
        "answers worker=0, this round is worker=1",
    ),
    "wrong layout": (
        lambda request, reply, grid: with_json(reply, layout_digest="0" * 16),
        "answers layout_digest=0000000000000000, this round is layout_digest=",
    ),
    "duplicate of another": (someone_elses_reply, "no reply before the round's deadline"),
    "garbage": (garbage, "array has 9 bytes, its shape needs "),
    "oversized": (oversized, "array has "),
    "late": (late, "no reply before the round's deadline"),
    "no metrics": (no_metrics, "needs the record 'metrics' (got "),
    "one metric missing": (one_metric_missing, "metric tokens=None must be a finite number"),
    "a count beyond all tensors": (
        lambda request, reply, grid: with_load(reply, 2**70),
        "routing counts must be tables of integers >= 0, 2 layers by 12 experts",
    ),
    "more tokens routed than given": (
        lambda request, reply, grid: with_load(reply, 10_000),
        "routing counts of a layer add up to more than ",
    ),
    "empty reply": (empty_reply, "needs the record 'task' (got [])"),
}


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


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("overlap", [1, 2], ids=["only holder", "shares its experts"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_goes_on_without_a_worker_whose_reply_is_lost_or_spoilt(
    fault: str, overlap: int, routing: str, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    tamper, reason = FAULTS[fault]
    settings = make_settings(
        "rounds=2",
        "outer=nesterov",
        f"layout.overlap={overlap}",
        f"model.routing={routing}",
        "federation.round_timeout_seconds=0.5",
    )
    federation, grid = Federation(settings), WatchedGrid(tmp_path, tamper=tamper)
    before, after = federation.run(grid)

    assert before.record.failures == {}
    assert list(after.record.failures) == [BAD]
    assert after.record.failures[BAD].startswith(reason)
    assert "\n" not in after.record.failures[BAD]
    assert sorted(after.record.replies) == [0, 2]

    updates = {
        worker: grid.watch.of(BAD_ROUND, worker).update(settings, federation.spec)
        for worker in (0, 2)
    }
    state, momentum = expected_state(federation, before, updates)
    for key in after.state:
        torch.testing.assert_close(after.state[key].double(), state[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(after.momentum[key].double(), momentum[key], rtol=0, atol=1e-6)

    residents = after.record.layout.of_worker(BAD)
    lost = sum(len(layer) for layer in residents) if overlap == 1 else 0
    assert after.record.missing_experts == lost
    for entry in federation.spec.expert:
        assert entry.layer is not None
        held = list(residents[entry.layer])
        is_same = torch.equal(after.state[entry.key][held], before.state[entry.key][held])
        kept = torch.equal(after.momentum[entry.key][held], before.momentum[entry.key][held])
        assert (is_same, kept) == (overlap == 1, overlap == 1), entry.key
        assert bool(before.momentum[entry.key][held].ne(0).any())


@pytest.mark.usefixtures("quick_workers")
def test_a_reply_far_larger_than_the_others_counts_like_the_largest_that_may_be(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    def blow_up(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
        shared, experts, _ = grid.watch.of(BAD_ROUND, BAD).update(settings, federation.spec)
        larger = {"shared": 1e6 * shared, "experts": 1e3 * experts}
        encoded = {key: wire.encode(vector, "float32") for key, vector in larger.items()}
        return with_arrays(request, reply, lambda arrays: arrays | encoded)

    settings = make_settings("rounds=2", "outer=nesterov", "outer.clip_to_median=2")
    federation, grid = Federation(settings), WatchedGrid(tmp_path, tamper=blow_up)
    before, after = federation.run(grid)
    assert (before.record.clipped, after.record.clipped) == (set(), {BAD})
    assert after.record.failures == {}

    def updates(server_round: int) -> dict[int, tuple[Tensor, Tensor, float]]:
        return {
            worker: grid.watch.of(server_round, worker).update(settings, federation.spec)
            for worker in range(WORKERS)
        }

    def rms(vector: Tensor) -> Tensor:
        return vector.double().square().mean().sqrt()

    limits = [
        2 * torch.stack([rms(update[part]) for update in updates(1).values()]).median()
        for part in (0, 1)
    ]
    counted = updates(BAD_ROUND)
    shared, experts, tokens = counted[BAD]
    counted[BAD] = (shared * limits[0] / rms(shared), experts * limits[1] / rms(experts), tokens)
    state, momentum = expected_state(federation, before, counted)
    for key in after.state:
        torch.testing.assert_close(after.state[key].double(), state[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(after.momentum[key].double(), momentum[key], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quick_workers")
def test_the_median_of_three_holders_outvotes_one_that_lies(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    def lie(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
        shared, experts, _ = grid.watch.of(BAD_ROUND, BAD).update(settings, federation.spec)
        encoded = {
            key: wire.encode(-1e9 * vector, "float32")
            for key, vector in {"shared": shared, "experts": experts}.items()
        }
        return with_arrays(request, reply, lambda arrays: arrays | encoded)

    settings = make_settings(
        "rounds=2", "outer.robust=median", "outer.weighting=uniform", f"layout.overlap={WORKERS}"
    )
    federation, grid = Federation(settings), WatchedGrid(tmp_path, tamper=lie)
    before, after = federation.run(grid)
    assert after.record.failures == {}
    everything = after.record.layout.of_worker(BAD)
    sent = [
        grid.watch.of(BAD_ROUND, worker).update(settings, federation.spec)
        for worker in range(WORKERS)
    ]
    sent[BAD] = (-1e9 * sent[BAD][0], -1e9 * sent[BAD][1], sent[BAD][2])
    spec = federation.spec
    step = spec.split_shared(torch.stack([shared for shared, _, _ in sent]).median(0).values)
    step |= spec.split_experts(
        torch.stack([experts for _, experts, _ in sent]).median(0).values, everything
    )
    for key, value in after.state.items():
        torch.testing.assert_close(value, before.state[key] - step[key], rtol=0, atol=1e-6)


def test_a_reply_that_arrives_twice_counts_once(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=2", "layout.overlap=2")

    def twice(request: Message, reply: Message, grid: WatchedGrid) -> list[Message]:
        return [reply, reply]

    doubled = Federation(settings).run(WatchedGrid(tmp_path / "a", tamper=twice))
    clean = Federation(settings).run(WatchedGrid(tmp_path / "b"))
    assert doubled[-1].record.failures == {}
    assert doubled[-1].record.bytes_up == clean[-1].record.bytes_up
    for key, value in clean[-1].state.items():
        assert torch.equal(doubled[-1].state[key], value)


def test_aggregation_takes_the_first_of_two_replies_of_a_worker(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=1", "layout.overlap=2")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    with_replies = federation.strategy.aggregate_train

    def repeat(server_round: int, replies: Iterable[Message]) -> Any:
        return with_replies(server_round, [r for reply in replies for r in (reply, reply)])

    federation.strategy.aggregate_train = repeat  # type: ignore[method-assign]
    (repeated,) = federation.run(grid)
    (clean,) = Federation(settings).run(WatchedGrid(tmp_path / "clean"))
    assert repeated.record.failures == {}
    for key, value in clean.state.items():
        assert torch.equal(repeated.state[key], value)


def test_too_few_replies_stop_the_run_and_name_every_reason(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=2", "federation.min_workers=3")
    federation = Federation(settings)
    with pytest.raises(FederationError) as caught:
        federation.run(WatchedGrid(tmp_path, tamper=error_reply))
    assert str(caught.value) == (
        "round 2: 2 of 3 workers replied, federation.min_workers=3 are needed "
        "(worker 1: RuntimeError: the disk is full (Flower error 2))"
    )
    assert len(federation.snapshots) == 1
    for key, value in federation.snapshots[0].state.items():
        assert torch.equal(federation.state[key], value)


def test_a_federation_with_too_few_nodes_does_not_begin(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    federation, grid = Federation(make_settings()), WatchedGrid(tmp_path, num_nodes=2)
    with pytest.raises(FederationError) as caught:
        federation.run(grid)
    text = str(caught.value)
    assert text.startswith("layout.num_workers=3 but the federation has 2 usable nodes")
    assert '--federation-config "num-supernodes=3"' in text
    assert "federation.node_wait_seconds=0" in text
    assert grid.watch.tasks == {}


def test_two_nodes_cannot_play_one_worker(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    grid = WatchedGrid(tmp_path)
    grid.node_config(FIRST_NODE + 2)["partition-id"] = 1
    with pytest.raises(FederationError) as caught:
        Federation(make_settings()).run(grid)
    assert str(caught.value) == (
        "1 of 3 workers cannot start: asks for worker 1, which is taken or outside "
        "layout.num_workers=3"
    )


def test_a_node_too_many_for_a_worker_is_left_out_and_takes_over_when_the_first_leaves(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=2", "layout.overlap=2")
    federation, grid = Federation(settings), WatchedGrid(tmp_path, num_nodes=4)
    spare = FIRST_NODE + 3
    grid.node_config(spare)["partition-id"] = 1

    def lose_the_first(record: RoundRecord) -> None:
        assert federation.strategy.seats.worker_of_node == {2: 0, 3: 1, 4: 2}
        if record.server_round == 1:
            grid.absent = {FIRST_NODE + 1}
            federation.after_round = lambda record: None

    federation.after_round = lose_the_first
    _, second = federation.run(grid)
    assert second.record.failures == {}
    assert federation.strategy.seats.worker_of_node == {2: 0, 4: 2, spare: 1}


def test_a_node_without_a_number_takes_the_first_free_worker(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    federation, grid = Federation(make_settings("rounds=1")), WatchedGrid(tmp_path)
    for node in (FIRST_NODE, FIRST_NODE + 2):
        del grid.node_config(node)["partition-id"]
    (only,) = federation.run(grid)
    assert sorted(federation.strategy.seats.worker_of_node.values()) == [0, 1, 2]
    assert sorted(only.record.replies) == [0, 1, 2]


def test_nodes_of_another_version_refuse_and_the_error_says_so(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats_module, "__version__", "99.0")
    grid = WatchedGrid(tmp_path)
    with pytest.raises(FederationError) as caught:
        Federation(make_settings()).run(grid)
    text = str(caught.value)
    assert text.startswith("3 of 3 workers cannot start: ")
    assert f"the server runs fomoe-flwr 99.0, this node {__version__}: install the same" in text
    assert grid.watch.tasks == {}


def test_a_node_whose_text_is_missing_refuses_before_training(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    grid = WatchedGrid(tmp_path)
    grid.node_config(FIRST_NODE)["data-path"] = str(tmp_path / "nowhere")
    with pytest.raises(FederationError, match=r"1 of 3 workers cannot start: .*does not exist"):
        Federation(make_settings()).run(grid)


def test_a_node_that_refused_is_asked_again_when_it_comes_back(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=4", "layout.overlap=2")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    node = FIRST_NODE + BAD
    bad_path = str(tmp_path / "nowhere")

    def change(record: RoundRecord) -> None:
        if record.server_round == 1:  # it restarts with a wrong path ...
            grid.absent = {node}
        elif record.server_round == 2:
            grid.absent = set()
            grid.node_config(node)["data-path"] = bad_path
        elif record.server_round == 3:  # ... its operator mends it; the grid saw it leave
            grid.absent = {node}
            federation.strategy.seats.meet(grid)
            grid.absent = set()
            del grid.node_config(node)["data-path"]

    federation.after_round = change
    failures = [snapshot.record.failures for snapshot in federation.run(grid)]
    gone = {BAD: "no node plays this worker"}
    assert failures == [{}, gone, gone, {}]


def test_nodes_that_vanish_are_missed_and_those_that_return_take_their_place_again(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=3", "outer=nesterov")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)

    def change(record: RoundRecord) -> None:
        grid.absent = {FIRST_NODE + BAD} if record.server_round == 1 else set()

    federation.after_round = change
    first, second, third = federation.run(grid)
    assert first.record.failures == {}
    assert second.record.failures == {BAD: "no node plays this worker"}
    assert second.record.missing_experts == 2 * 4
    assert second.record.bytes_down < first.record.bytes_down
    assert third.record.failures == {}
    assert sorted(third.record.replies) == [0, 1, 2]
    # It takes up the inner state of round 1, the last it was there for.
    assert [reply["fresh_state"] for reply in first.record.replies.values()] == [1, 1, 1]
    assert [reply["fresh_state"] for reply in third.record.replies.values()] == [0, 0, 0]


class ReversedGrid(WatchedGrid):
    """Works in reverse order; a reply is there only some pulls after it was asked for."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self._given: list[str] = []
        self._done: dict[str, Message] = {}
        self._pulls: dict[str, int] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        self._given += ids
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived = []
        for message_id in reversed(self._given):
            (self._done[message_id],) = super().pull_messages([message_id])
        self._given.clear()
        for message_id in message_ids:
            self._pulls[message_id] = self._pulls.get(message_id, 0) + 1
            task = self.watch.tasks.get(message_id)
            late = 3 - task.worker if task else 0
            if message_id in self._done and self._pulls[message_id] > late:
                arrived.append(self._done.pop(message_id))
        return arrived


def test_the_result_does_not_depend_on_who_finishes_first(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=1", "layout.overlap=2", "outer=nesterov")
    (straight,) = Federation(settings).run(WatchedGrid(tmp_path / "a"))
    (turned,) = Federation(settings).run(ReversedGrid(tmp_path / "b"))
    for key, value in straight.state.items():
        assert torch.equal(turned.state[key], value), key
    assert list(turned.record.replies) == [0, 1, 2]


@pytest.mark.usefixtures("quick_workers")
@pytest.mark.parametrize(("up", "down"), [("float32", "float32"), ("bfloat16", "float16")])
@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_predicted_bytes_are_the_bytes_that_travel(
    kind: str,
    overlap: int,
    routing: str,
    up: str,
    down: str,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    settings = make_settings(
        "rounds=1",
        f"layout={kind}",
        f"layout.num_workers={WORKERS}",
        f"layout.overlap={overlap}",
        f"model.routing={routing}",
        f"wire.up={up}",
        f"wire.down={down}",
    )
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    (only,) = federation.run(grid)
    assert only.record.failures == {}
    predicted = costs.predict_bytes(settings, only.record.layout)
    assert only.record.bytes_up == predicted.up
    assert only.record.bytes_down == predicted.down
    for worker in range(WORKERS):
        task = grid.watch.of(1, worker)
        assert task.reply is not None
        assert wire.payload_bytes(task.request.content) == predicted.down_per_worker[worker]
        assert wire.payload_bytes(task.reply.content) == predicted.up_per_worker[worker]


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_a_task_carries_the_shared_part_and_the_residents_and_nothing_else(
    routing: str, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=1", "layout.overlap=2", f"model.routing={routing}")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    before, spec = federation.initial.state, federation.spec
    (only,) = federation.run(grid)
    shared_arrays = []
    for worker in range(WORKERS):
        content = grid.watch.of(1, worker).request.content
        residents = only.record.layout.of_worker(worker)
        assert [len(layer) for layer in residents] == [8, 8]
        record = content.array_records[wire.WEIGHTS]
        shared_arrays.append(record["shared"])
        shared, experts = wire.vectors_in(
            content, wire.WEIGHTS, "float32", (spec.shared_size, spec.experts_size(residents))
        )
        assert torch.equal(shared, spec.pack_shared(before))
        assert torch.equal(experts, spec.pack_experts(before, residents))
        assert sorted(content) == [wire.TASK, wire.WEIGHTS]
        header = TaskHeader.read(content)
        assert header.residents == residents
        assert header.worker == worker
    assert all(array is shared_arrays[0] for array in shared_arrays)


def test_overlap_equal_to_all_workers_sends_everybody_everything(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings("rounds=1", f"layout.overlap={WORKERS}")
    federation, grid = Federation(settings), WatchedGrid(tmp_path)
    (only,) = federation.run(grid)
    total = sum(value.numel() for value in federation.state.values())
    assert only.record.bytes_down == only.record.bytes_up == WORKERS * total * 4
