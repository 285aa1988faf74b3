"""Replies that are lost or spoilt: the round goes on, and the step is the one without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from watched import (
    BAD,
    BAD_ROUND,
    Federation,
    Tamper,
    WatchedGrid,
    error_reply,
    expected_state,
    with_arrays,
)

from fomoe_flwr.config import Settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.strategy import FederationError


def with_json(reply: Message, **changes: Any) -> list[Message]:
    words = wire.json_in(reply.content, wire.TASK) | changes
    reply.content[wire.TASK] = wire.json_record(words)
    return [reply]


def with_load(reply: Message, first: int) -> list[Message]:
    load = wire.json_in(reply.content, wire.TASK)["load"]
    load[0][0] = first
    return with_json(reply, load=load)


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
