"""One worker's training alone, without messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fomoe_flwr.config import Settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.step_benchmark import RandomBatches
from fomoe_flwr.worker.training import make_optimizer, train


class LocalWorker:
    """One worker's training alone: residents only, the steps that a run takes."""

    def __init__(self, settings: Settings, residents: Sequence[Sequence[int]]) -> None:
        local, model = settings.local, settings.model
        config = transformers_config(model, settings.data.sequence_length)
        self.settings = settings
        self.model = build_model(model, config, residents, seed=0)
        self.optimizer = make_optimizer(self.model, local)
        self.inner = InnerState(self.model, local, model.routing_mode, residents)
        self.batches = RandomBatches(settings, torch.device("cpu"))
        self.probe = RouterProbe(self.model, model.num_experts, residents)
        self.gradient_bytes = 0
        self.optimizer.register_step_pre_hook(self._weigh_gradients)

    def _weigh_gradients(self, *_: object) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient_bytes = sum(each.numel() * each.element_size() for each in gradients)

    def train(self) -> None:
        """Train `local.steps` steps."""
        settings = self.settings
        train(
            self.model,
            self.probe,
            self.optimizer,
            self.inner,
            self.batches,
            settings.local,
            balance=settings.balance,
            first_step=0,
            total_steps=100,
            device=torch.device("cpu"),
        )

    def state_bytes(self) -> int:
        """Return the bytes of weights, gradients and moments."""
        tensors = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            # Not the step counts, of which there is one a tensor.
            tensors += [value for key, value in state.items() if key != "step"]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return kept + self.gradient_bytes
