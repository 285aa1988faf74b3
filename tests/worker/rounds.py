"""Rounds of one worker over a small text, in this process or in several."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from micro import micro
from torch import Tensor

from fomoe_flwr.config import Settings
from fomoe_flwr.data.source import NodeData, prepare_tokenizer
from fomoe_flwr.data.tokenizer import tokenizer_json
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.multi_gpu import NodeProcesses
from fomoe_flwr.worker.round import RoundResult, RoundTask, run_round

UNEVEN: Residents = ((0, 1, 2, 4, 5), (3,))
"""Five residents do not divide by two, and one leaves a process without any."""


@dataclass
class Rounds:
    """A worker's rounds, one after the other: what it gets each time is what it had at the end."""

    folder: Path
    text: Path
    overrides: tuple[str, ...] = ()
    residents: Residents = UNEVEN
    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        self.settings = micro(
            "rounds=4", "local.steps=3", f"data.path={self.text}", *self.overrides
        )
        settings = self.settings
        config = transformers_config(settings.model, settings.data.sequence_length)
        self.spec = StateSpec.of(settings.model, config)
        self.state = state_of(build_model(settings.model, config, seed=1))
        tokenizer = tokenizer_json(prepare_tokenizer(settings))
        self.data = NodeData(settings.data, settings.local, 0, 0, 0, 1, tokenizer)

    def task(self, server_round: int, **more: object) -> RoundTask:
        """Return the task of a round over the weights as they are now."""
        fields = {
            "settings": self.settings,
            "spec": self.spec,
            "worker": 0,
            "server_round": server_round,
            "residents": self.residents,
            "shared": self.spec.pack_shared(self.state),
            "experts": self.spec.pack_experts(self.state, self.residents),
            "state_dir": self.folder,
        }
        return RoundTask(**(fields | more))  # type: ignore[arg-type]

    def alone(self, task: RoundTask) -> RoundResult:
        """Train a round in this process."""
        return run_round(task, partial(CACHE.batches, self.data))

    def together(self, task: RoundTask, processes: NodeProcesses, count: int = 2) -> RoundResult:
        """Train a round in several processes."""
        return processes.run_round(task, self.data, count)


def assert_close(got: RoundResult, want: RoundResult, tolerance: float = 2e-5) -> None:
    """Expect the same up to the order of sums; counts may differ where a choice was a tie."""
    compare = partial(torch.testing.assert_close, rtol=1e-3, atol=tolerance)
    compare(got.shared, want.shared)
    compare(got.experts, want.experts)
    assert got.moments.keys() == want.moments.keys()
    for name, (shared, experts) in want.moments.items():
        compare(got.moments[name][0], shared)
        compare(got.moments[name][1], experts)
    for name in ("loss", "last_loss", "balance_loss", "grad_norm"):
        compare(torch.tensor(getattr(got.report, name)), torch.tensor(getattr(want.report, name)))
    assert got.report.tokens == want.report.tokens
    assert got.report.lr == want.report.lr
    assert got.report.routing.tokens == want.report.routing.tokens
    for name in ("load", "ghosts", "all_ghost"):
        close_counts(getattr(got.report.routing, name), getattr(want.report.routing, name))
    assert (got.inner_state_fresh, got.num_fresh_experts) == (
        want.inner_state_fresh,
        want.num_fresh_experts,
    )


def close_counts(got: Tensor, want: Tensor) -> None:
    """Expect counts that differ by a tie or two."""
    assert got.shape == want.shape
    assert int((got - want).abs().sum()) <= 2
