"""Folding: what a reply counts for, whoever sends it, how often and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor
from watched import (
    BAD,
    BAD_ROUND,
    WORKERS,
    Federation,
    WatchedGrid,
    expected_state,
    with_arrays,
)

from fomoe_flwr.config import Settings
from fomoe_flwr.federation import wire


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
