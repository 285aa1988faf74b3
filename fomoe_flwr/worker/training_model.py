"""The model that a worker trains, with what outlives a round: its probe and its captured pass.

Both serve every worker whose residents are as many in every layer: which experts they are is
written into tensors that a captured pass reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.config import Settings
from fomoe_flwr.model.cuda_graph import GraphedPass
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.head_loss import head_loss
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.parallel.team import ALONE, Team


class TrainingModel:
    """A model of some residents and the forward and backward pass over a micro-batch.

    `execution` is what the model was prepared with; None resolves the settings for its device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        team: Team = ALONE,
        execution: Execution | None = None,
    ) -> None:
        self.model, self.settings, self.team = model, settings, team
        self.device = next(model.parameters()).device
        self.execution = execution or Execution.choose(settings, self.device, team.size)
        self.probe = RouterProbe(
            model, settings.model.num_experts, compiled=self.execution.compiled
        )
        self.num_passes = team.passes(settings.local)
        """Forward and backward passes of this process in a step."""
        self._graph: GraphedPass | None = None

    def begin(self, residents: Residents, pooled_share: Tensor | None) -> None:
        """Count anew, for a worker of these residents; see `RouterProbe`."""
        if not self.probe.begin(residents, pooled_share):
            self._graph = None

    def close(self) -> None:
        """Let go of the probe and of the captured pass's memory."""
        self.probe.close()
        self._graph = None

    def capture(self, windows: Tensor, parameters: Sequence[nn.Parameter]) -> GraphedPass | None:
        """Return the captured pass where the execution has one; capture it at the first call."""
        if not self.execution.cuda_graph:
            return None
        if self._graph is None:
            self._graph = GraphedPass(self.run_pass, windows, parameters, self.probe.forget)
        self._graph.lend_gradients()
        return self._graph

    def run_pass(self, windows: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """Add one micro-batch's gradients; return its cross entropy and its balance loss."""
        local, balance = self.settings.local, self.settings.balance
        loss = self.team.run(
            token_loss, self.model, windows, local.precision, self.execution.chunked_loss
        )
        routers = self.probe.losses()
        extra = balance.loss * routers.balance + balance.z_loss * routers.z
        ((loss + extra) / (self.num_passes / weight)).backward()
        return loss.detach(), routers.balance.detach().to(self.device)


def token_loss(
    model: PreTrainedModel, windows: Tensor, precision: str = "float32", chunked: bool = False
) -> Tensor:
    """Return the mean cross entropy (nats per token) of [B, S + 1] windows.

    With `chunked` the logits of all tokens never exist at once, if they are a plain product of
    hidden states and head; see `model.head_loss`.
    """
    ids, targets = windows[:, :-1], windows[:, 1:].flatten()
    with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        multiplier: float | None = getattr(model, "logit_multiplier", None)
        if not chunked or multiplier is None:
            logits = model(input_ids=ids, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), targets)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head: Any = model.get_output_embeddings()
        return head_loss(hidden.flatten(0, 1), head.weight, targets, multiplier)
