"""Micro federations over made-up text."""

from __future__ import annotations

from pathlib import Path

import pytest
from federated import Federate, Federation, OneRound, Weights, failures, use_made_up_data
from micro import micro


@pytest.fixture
def made_up_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all workers `Counting` text."""
    use_made_up_data(monkeypatch)


@pytest.fixture
def federate(tmp_path: Path, made_up_data: None) -> Federate:
    """Return a function that runs a micro federation in a folder of its own."""
    count = iter(range(100))

    def run(*overrides: str) -> Federation:
        return Federation(micro(*overrides), tmp_path / str(next(count))).run()

    return run


@pytest.fixture
def one_round(federate: Federate) -> OneRound:
    """Return a function that gives how the first round moved the weights."""

    def run(*overrides: str) -> tuple[Weights, Federation]:
        federation = federate("rounds=1", *overrides)
        assert failures(federation) == {}
        return {k: v - federation.initial[k] for k, v in federation.state.items()}, federation

    return run
