"""Local training on two micro layers: a model, its batches and a trainer."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from micro import micro_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.config import (
    BalanceSettings,
    LocalSettings,
    ModelSettings,
    Settings,
)
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import state_of
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer
from fomoe_flwr.worker.training_model import TrainingModel

SHAPE = micro_model(num_experts=4)
RESIDENTS = ((0, 2), (1, 2, 3))
LOCAL = LocalSettings(
    steps=2,
    optimizer="sgd",
    lr=0.1,
    warmup_steps=0,
    schedule="constant",
    grad_clip=0.0,
)
NO_BALANCE = BalanceSettings(loss=0.0)
WINDOWS = torch.randint(0, 260, (4, 4, 9), generator=torch.Generator().manual_seed(0))


class Given:
    """Batches that serve the given ones in order."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.position = batches, 0

    def next_batch(self) -> Tensor:
        self.position += 1
        return self.batches[self.position - 1]

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def model_of(shape: ModelSettings = SHAPE) -> PreTrainedModel:
    return build_model(shape, transformers_config(shape, 8), RESIDENTS, seed=1)


def trainer_of(
    model: nn.Module,
    local: LocalSettings,
    batches: list[Tensor],
    first_step: int = 0,
    shape: ModelSettings = SHAPE,
    balance: BalanceSettings = NO_BALANCE,
    pooled_share: Tensor | None = None,
) -> LocalTrainer:
    settings = Settings(model=shape, local=local, balance=balance, rounds=100)
    return LocalTrainer(
        TrainingModel(model, settings),
        settings,
        RESIDENTS,
        lambda position: Given(batches),
        first_step=first_step,
        pooled_share=pooled_share,
    )


def run(
    model: nn.Module,
    local: LocalSettings,
    batches: list[Tensor],
    first_step: int = 0,
    balance_loss: float = 0.0,
) -> LocalReport:
    balance = BalanceSettings(loss=balance_loss)
    trainer = trainer_of(model, local, batches, first_step, balance=balance)
    with closing(trainer), closing(trainer.training):
        return trainer.train(local.steps)


def assert_close(got: nn.Module, want: nn.Module, atol: float) -> None:
    expected = state_of(want)
    for key, value in state_of(got).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=atol)
