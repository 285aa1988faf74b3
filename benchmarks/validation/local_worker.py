"""One worker's training alone, without messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fomoe_flwr.config import Settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.worker.step_benchmark import RandomBatches
from fomoe_flwr.worker.trainer import LocalTrainer
from fomoe_flwr.worker.training_model import TrainingModel


class LocalWorker:
    """One worker's training alone: residents only, the steps that a run takes."""

    def __init__(self, settings: Settings, residents: Sequence[Sequence[int]]) -> None:
        model = settings.model
        config = transformers_config(model, settings.data.sequence_length)
        self.settings = settings
        self.model = build_model(model, config, residents, seed=0)
        batches = RandomBatches(settings, torch.device("cpu"))
        self.trainer = LocalTrainer(
            TrainingModel(self.model, settings), settings, residents, lambda position: batches
        )
        self.probe = self.trainer.probe
        self.gradient_bytes = 0
        self.trainer.optimizer.register_step_pre_hook(self._weigh_gradients)

    def _weigh_gradients(self, *_: object) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient_bytes = sum(each.numel() * each.element_size() for each in gradients)

    def train(self) -> None:
        """Train `local.steps` steps."""
        self.trainer.train(self.settings.local.steps)

    def state_bytes(self) -> int:
        """Return the bytes of weights, gradients and moments."""
        tensors = [*self.model.parameters()]
        for state in self.trainer.optimizer.state.values():
            # Not the step counts, of which there is one a tensor.
            tensors += [value for key, value in state.items() if key != "step"]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return kept + self.gradient_bytes
