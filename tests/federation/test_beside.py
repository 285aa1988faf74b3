"""Work beside the main thread: order, errors, and the same bits as one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from watched import BAD, Federation, WatchedGrid, error_reply

from fomoe_flwr.config import Settings
from fomoe_flwr.federation.beside import Beside, one_ahead
from fomoe_flwr.federation.strategy import FoMoEStrategy


@pytest.mark.parametrize("is_on", [False, True])
def test_pieces_are_done_in_order_and_all_of_them(is_on: bool) -> None:
    done: list[int] = []
    with Beside(is_on) as beside:
        for number in range(20):
            beside.do(lambda number=number: done.append(number))
        beside.wait()
    assert done == list(range(20))


@pytest.mark.parametrize("is_on", [False, True])
def test_what_a_piece_raises_reaches_the_caller(is_on: bool) -> None:
    def fail() -> None:
        raise ValueError("broken")

    def fail_beside() -> None:
        with Beside(is_on) as beside:
            beside.do(fail)
            beside.wait()

    with pytest.raises(ValueError, match="broken"):
        fail_beside()


def test_a_piece_goes_on_while_the_caller_does_something_else() -> None:
    may_end = threading.Event()
    with Beside(is_on=True) as beside:
        beside.do(may_end.wait)
        may_end.set()  # Reached before the piece has ended.
        beside.wait()


@pytest.mark.parametrize("is_on", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_items_come_in_order(is_on: bool, count: int) -> None:
    assert list(one_ahead(iter(range(count)), is_on)) == list(range(count))


@pytest.mark.parametrize(("is_on", "ahead"), [(False, 0), (True, 1)])
def test_at_most_one_item_is_made_ahead(is_on: bool, ahead: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    for number in one_ahead(items(), is_on):
        assert len(made) <= number + 1 + ahead


@pytest.mark.parametrize("is_on", [False, True])
def test_what_making_an_item_raises_reaches_the_caller(is_on: bool) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk full")

    taken = one_ahead(items(), is_on)
    assert next(taken) == 1
    with pytest.raises(OSError, match="disk full"):
        next(taken)


@pytest.mark.parametrize("outer", ["average", "nesterov"])
@pytest.mark.usefixtures("quick_workers")
def test_a_run_beside_gives_the_same_bits(
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outer: str,
) -> None:
    settings = make_settings("rounds=3", f"outer={outer}", "layout.overlap=2")
    ends = []
    for is_on in (False, True):
        monkeypatch.setattr(FoMoEStrategy, "_has_idle_cores", lambda _, is_on=is_on: is_on)
        grid = WatchedGrid(tmp_path / str(is_on))
        ends.append(Federation(settings).run(grid))
    for plain, beside in zip(*ends, strict=True):
        assert beside.record.replies.keys() == plain.record.replies.keys()
        for key, value in plain.state.items():
            assert torch.equal(beside.state[key], value), key
        for key, value in plain.momentum.items():
            assert torch.equal(beside.momentum[key], value), key


@pytest.mark.usefixtures("quick_workers")
def test_a_bad_reply_folded_beside_is_left_out(
    make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FoMoEStrategy, "_has_idle_cores", lambda _: True)
    settings = make_settings("rounds=2", "federation.min_workers=1")
    _, after = Federation(settings).run(WatchedGrid(tmp_path, tamper=error_reply))
    assert set(after.record.failures) == {BAD}
