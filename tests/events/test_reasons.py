"""Reasons that people read: one line, and no name of a class unless the program has a fault."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from flwr.app import Error

from fomoe_flwr.data import DataError
from fomoe_flwr.errors import reason_of
from fomoe_flwr.federation import wire
from fomoe_flwr.worker.trainer import TrainingError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DataError("no text\nat all"), "no text at all"),
        (TrainingError("loss is nan"), "loss is nan"),
        (ValueError("too small"), "too small"),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            "/x: No space left on device: make room, or name another place",
        ),
        (SystemExit(143), "interrupted: it was told to end"),
        (KeyError("a bug"), "a fault in the program (KeyError: 'a bug')"),
        (AssertionError(), "a fault in the program (AssertionError)"),
    ],
)
def test_a_reason_is_one_line_without_a_class(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("<class 'fomoe_flwr.data.DataError'>:<'no text'>", "no text"),
        ("<class 'ValueError'>:<'it's\ntoo small'>", "it's too small"),
        ("<class 'KeyError'>:<''a''>", "a fault in the program (KeyError: 'a')"),
        ("Node Unavailable", "Node Unavailable"),
        ("", "no reason given"),
    ],
)
def test_flowers_words_for_an_error_become_ours(told: str, reason: str) -> None:
    found = wire.error_in(SimpleNamespace(error=Error(2, told)))  # type: ignore[arg-type]
    assert str(found) == f"{reason} (Flower error 2)"
