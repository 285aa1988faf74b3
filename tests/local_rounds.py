"""A federation by hand, without Flower.

Rounds run through `run_round`; means and steps through `HolderMean` and `OuterStep`, exactly as the
strategy composes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from micro import SEQUENCE, micro_model
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import DataSettings, LocalSettings, ModelSettings, OuterSettings, Settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.worker.round import RoundResult, RoundTask, run_round

WORKERS, EXPERTS, LAYERS, BATCH = 3, 6, 2, 4
MODEL = micro_model()
LOCAL = LocalSettings(
    steps=3,
    lr=3e-3,
    warmup_steps=2,
    weight_decay=0.1,
    eps=1e-6,
    device="cpu",
    threads=1,
)
ALL: Residents = [range(EXPERTS)] * LAYERS
EVERYBODY = [ALL] * WORKERS
RING = [((0, 1, 2, 3), (0, 2, 4, 5)), ((2, 3, 4, 5), (0, 1, 2, 3)), ((0, 1, 4, 5), (1, 3, 4, 5))]

Weights = dict[str, Tensor]


class Given:
    """A worker's own batches, the same ones for federation and reference."""

    def __init__(self, worker: int, position: int = 0) -> None:
        self.worker, self.position = worker, position

    def next_batch(self) -> Tensor:
        self.position += 1
        generator = torch.Generator().manual_seed(1000 * self.worker + self.position)
        return torch.randint(0, 260, (BATCH, SEQUENCE + 1), generator=generator)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def settings_of(rounds: int = 3, **model: Any) -> Settings:
    """Return settings of three steps a round, with changes of the model's shape."""
    return Settings(
        rounds=rounds,
        model=replace(MODEL, **model),
        data=DataSettings(sequence_length=SEQUENCE),
        local=replace(LOCAL),
        outer=OuterSettings("average"),
    )


def initial(model: ModelSettings) -> Weights:
    """Return the weights that every run starts from."""
    built = build_model(model, transformers_config(model, SEQUENCE), seed=4)
    return {key: value.clone() for key, value in state_of(built).items()}


def local_rounds(
    settings: Settings,
    spec: StateSpec,
    state: Weights,
    residents: Sequence[Residents],
    server_round: int,
    folder: Path,
) -> Iterator[RoundResult]:
    """Train one round of every worker."""
    for worker, held in enumerate(residents):
        task = RoundTask(
            settings=settings,
            spec=spec,
            worker=worker,
            server_round=server_round,
            residents=held,
            shared=spec.pack_shared(state),
            experts=spec.pack_experts(state, held),
            state_dir=folder / f"worker-{worker}",
            keep_rounds=[],
        )
        yield run_round(task, lambda position, worker=worker: Given(worker, position))


def federate(settings: Settings, residents: Sequence[Residents], folder: Path) -> Weights:
    """Train all rounds of workers with fixed residents; return the global weights."""
    spec = StateSpec.of(settings.model, transformers_config(settings.model, SEQUENCE))
    state, outer = initial(settings.model), OuterStep(settings.outer)
    for server_round in range(1, settings.rounds + 1):
        mean = HolderMean(spec)
        results = local_rounds(settings, spec, state, residents, server_round, folder)
        for held, result in zip(residents, results, strict=True):
            mean.fold(result.shared, result.experts, held, result.report.tokens)
        outer.apply(state, mean)
    return state


def assert_close(got: Weights, want: Weights, atol: float) -> None:
    """Compare key by key."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, k=key: k + m)


def assert_trained(state: Weights, model: ModelSettings, at_least: float) -> None:
    """Expect that every tensor has moved by far more than any tolerance in use."""
    for key, value in initial(model).items():
        assert (state[key] - value).abs().max() > at_least, key
