"""Local training: one object that owns all that one worker trains with. No Flower."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fomoe_flwr.config import Settings
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.cuda_graph import GraphedPass
from fomoe_flwr.model.device_copy import has_room
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.router_probe import RoutingCounts, chosen_experts
from fomoe_flwr.model.shards import FullTensors, whole
from fomoe_flwr.model.state import State, StateSpec, load_state, state_of
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.optimizer import learning_rate, make_optimizer
from fomoe_flwr.worker.training_model import TrainingModel

if TYPE_CHECKING:
    # Reading text takes libraries that a step does not need.
    from fomoe_flwr.data.batches import Batches


class TrainingError(RunError):
    """Local training that cannot go on."""


@dataclass(frozen=True)
class LocalReport:
    """What some local steps did."""

    loss: float
    """Mean cross entropy per token over the steps, nats."""
    last_loss: float
    balance_loss: float
    grad_norm: float
    """Mean total gradient norm before clipping."""
    lr: float
    tokens: int
    seconds: float
    routing: RoutingCounts

    def after(self, earlier: LocalReport | None) -> LocalReport:
        """Return the report of some earlier steps and these, as if of one call."""
        if earlier is None:
            return self
        share = earlier.tokens / (earlier.tokens + self.tokens)
        means = {
            name: share * getattr(earlier, name) + (1 - share) * getattr(self, name)
            for name in ("loss", "balance_loss", "grad_norm")
        }
        return replace(
            self,
            tokens=earlier.tokens + self.tokens,
            seconds=earlier.seconds + self.seconds,
            routing=earlier.routing.plus(self.routing),
            **means,
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second of this worker."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class LocalTrainer:
    """Model, optimizer, inner state, schedule and data position of one worker.

    It adopts weights and moments, takes steps, and gives its weights, moments and state.

    Parameters
    ----------
    training
        A model of the worker's residents, and its passes.
    settings
        The run's settings. Their `rounds * local.steps` is the length of the schedule.
    open_batches
        Opens the worker's text at a batch of the run.
    first_step
        Steps of the run that lie behind.
    pooled_share
        [num_layers, num_experts] shares of assignments of all workers, for the balance loss.
    """

    def __init__(
        self,
        training: TrainingModel,
        settings: Settings,
        residents: Residents,
        open_batches: Callable[[int], Batches],
        *,
        first_step: int = 0,
        pooled_share: Tensor | None = None,
    ) -> None:
        local, model = settings.local, training.model
        self.training, self.model, self.team = training, model, training.team
        self.settings, self.residents = settings, residents
        training.begin(residents, pooled_share)
        self.pooled_share = pooled_share
        self.probe = training.probe
        self.optimizer = make_optimizer(model, local)
        self.inner = InnerState(
            model, self.optimizer, local, settings.model.routing_mode, residents
        )
        self.batches = open_batches(first_step * local.accumulate)
        self.step = first_step
        """Steps of the run that are done."""
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def adopt(self, weights: State) -> None:
        """Copy new weights into the model; optimizer and data position stay."""
        load_state(self.model, weights)

    def adopt_moments(self, moments: Mapping[str, State], part: StateSpec) -> None:
        """Take Adam's moments of a part of the state, as the server averaged them."""
        self.inner.adopt(moments, part, self.step)

    def restore(self, path: Path) -> None:
        """Take up optimizer and text where `save` wrote them down."""
        self.inner.restore(path)
        if self.inner.cursor:
            self.batches.restore(self.inner.cursor)

    def save(self, path: Path, weights: Mapping[str, Tensor], on_disk: bool = True) -> None:
        """Store optimizer, data position and `weights`; see `InnerState.save`."""
        self.inner.cursor = self.batches.state()
        pooled = None if self.pooled_share is None else self.pooled_share.tolist()
        self.inner.place = {"step": self.step, "pooled": pooled}
        self.inner.save(path, weights, self.team.is_first, on_disk)

    @property
    def weights(self) -> State:
        """The weights of the residents and the shared parameters, by state key."""
        return FullTensors(state_of(self.model))

    def copied_weights(self) -> dict[str, Tensor]:
        """Copy the weights: where they lie if there is room, else to host memory.

        Only the first process of a team gets them, but all take part.
        """
        size = sum(value.nbytes for value in state_of(self.model).values())
        device = self.training.device
        if device.type == "cuda" and not has_room(device, 2 * size):
            device = torch.device("cpu")
        copied: dict[str, Tensor] = {}
        for key, value in self.weights.items():
            if self.team.is_first:
                copied[key] = value.detach().to(device, copy=True)
        return copied

    def moments(self, name: str) -> State:
        """Return one of Adam's moments by state key."""
        return self.inner.moments(name)

    def close(self) -> None:
        """Let go of the optimizer; the weights stay in the model."""
        # Two thirds of the training state, and nobody asks for it any more.
        self.optimizer.state.clear()

    def choices(self, probe: Tensor) -> Tensor:
        """Return the experts that the model chooses for [windows, tokens] ids; see `RouterProbe`.

        The result is [num_layers, tokens, top_k].
        """
        shape, batch_size = self.settings.model, self.settings.local.batch_size
        with torch.no_grad():
            return self.team.run(
                chosen_experts,
                self.model,
                probe,
                shape.num_experts,
                shape.top_k,
                self.residents,
                batch_size,
            )

    def train(self, num_steps: int, span: int | None = None) -> LocalReport:
        """Take optimizer steps and say what they did; all processes of the team say the same.

        They stand for `span` steps of the schedule, so that workers that take more or fewer steps
        in a round pass through the same rates.
        Raises TrainingError when the loss is no longer finite: a worker that diverged must not send
        its weights.
        """
        local, team, first_step = self.settings.local, self.team, self.step
        training, device = self.training, self.training.device
        self.model.train()
        started = time.perf_counter()
        losses, norms, tokens, rate = [], [], 0, local.lr
        graph: GraphedPass | None = None
        for done in range(num_steps):
            rate = self._set_rate(first_step + done * (span or num_steps) / num_steps)
            if graph is None:
                self.optimizer.zero_grad(set_to_none=True)
            step_losses = torch.zeros(2, device=device)
            micro_batches = team.micro_batches(self.batches, local, device)
            for index, (windows, weight) in enumerate(micro_batches):
                graph = graph or training.capture(windows, self._parameters)
                run = training.run_pass
                results = graph(windows, index == 0) if graph else run(windows, weight)
                step_losses += torch.stack(results) / (training.num_passes / weight)
                tokens += windows[:, 1:].numel()
            norms.append(self._clip())
            self.inner.step(rate)
            self.probe.move_biases(self.settings.balance.bias_rate, team.sum)
            losses.append(step_losses)
            self.step += 1
        # One host sync a call, not one a step.
        task, balance = team.mean(torch.stack(losses).T.contiguous())
        mean_loss = float(task.mean())
        if not math.isfinite(mean_loss):
            bad = next(i for i, loss in enumerate(task) if not math.isfinite(float(loss)))
            raise TrainingError(
                f"training loss is {float(task[bad])} at step {first_step + bad}: lower "
                f"local.lr={local.lr} or local.grad_clip={local.grad_clip}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        return LocalReport(
            loss=mean_loss,
            last_loss=float(task[-1]),
            balance_loss=float(balance.mean()),
            grad_norm=float(torch.stack(norms).mean()),
            lr=rate,
            tokens=int(team.sum(torch.tensor(tokens))),
            seconds=time.perf_counter() - started,
            routing=self.probe.counts.over(team.sum),
        )

    def _set_rate(self, step: float) -> float:
        """Give the optimizer the rate of a step of the run, and return it."""
        local = self.settings.local
        rate = learning_rate(local, step, self.settings.rounds * local.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        return rate

    def _clip(self) -> Tensor:
        """Return the norm of all gradients, and shorten them to `local.grad_clip` (0: do not).

        A fused optimizer divides by `grad_scale` while it reads the gradients: that saves a pass
        over them.
        """
        limit = self.settings.local.grad_clip
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if limit > 0 and isinstance(self.optimizer, torch.optim.AdamW):
            scale = ((norm.float() + 1e-6) / limit).clamp(min=1.0)
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        elif limit > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return norm.detach().float()
