"""Local training: K optimizer steps on one worker's residents. No Flower, no files."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.config import BalanceSettings, LocalSettings
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.cuda_graph import GraphedPass
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.head_loss import head_loss
from fomoe_flwr.model.router_probe import RouterProbe, RoutingCounts
from fomoe_flwr.model.shards import whole
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.parameters.completep import Multipliers, multipliers
from fomoe_flwr.worker.inner_state import InnerState

if TYPE_CHECKING:
    # Reading text takes libraries that a step does not need.
    from fomoe_flwr.data.batches import Batches

PLAIN = Execution()
"""Nothing compiled, captured or cut up."""


class TrainingError(RunError):
    """Local training that cannot go on."""


@dataclass(frozen=True)
class LocalReport:
    """What K local steps did."""

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

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second of this worker."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def learning_rate(settings: LocalSettings, step: int, total_steps: int) -> float:
    """Return the rate of a step (from 0) of the whole run, over all rounds."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "wsd":
        tail = max(1, round(settings.decay_fraction * total_steps))
        progress = max(0.0, min(1.0, (step - (total_steps - tail)) / tail))
        return settings.lr * (1.0 - (1.0 - settings.min_lr_ratio) * progress)
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def make_optimizer(model: nn.Module, settings: LocalSettings) -> torch.optim.Optimizer:
    """Build the local optimizer; decay touches matrices only, not embeddings, norms or routers.

    A router row whose expert is a ghost, and an embedding row whose token is absent, get no task
    gradient: decay would shrink them for nothing. A model with width and depth multipliers gets
    CompleteP's groups; their `lr_multiplier` is the factor on the schedule's rate. Its rules are
    Adam's, so SGD has none.
    """
    groups: dict[tuple[bool, Multipliers], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.numel():  # of a layer without residents
            continue
        exempt = parameter.dim() < 2 or any(
            part in name for part in ("embed", "norm", ".gate.", "lm_head")
        )
        factors = _multipliers(model, name) if settings.optimizer == "adamw" else Multipliers()
        groups.setdefault((exempt, factors), []).append(parameter)
    described = [
        {
            "params": parameters,
            "lr": settings.lr * factors.lr,
            "lr_multiplier": factors.lr,
            "weight_decay": 0.0 if exempt else settings.weight_decay * factors.decay,
        }
        | ({"eps": settings.eps * factors.eps} if settings.optimizer == "adamw" else {})
        for (exempt, factors), parameters in groups.items()
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(described, lr=settings.lr)
    return torch.optim.AdamW(
        described,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def _multipliers(model: nn.Module, name: str) -> Multipliers:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "width_multiplier"):
        return Multipliers()
    return multipliers(name, config.width_multiplier, config.depth_multiplier, config.depth_alpha)


def token_loss(
    model: PreTrainedModel, windows: Tensor, precision: str = "float32", chunked: bool = False
) -> Tensor:
    """Return the mean cross entropy (nats per token) of [B, S + 1] windows.

    With `chunked` the logits of all tokens never exist at once; see `model.head_loss`.
    """
    ids, targets = windows[:, :-1], windows[:, 1:].flatten()
    with torch.autocast(windows.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        if not chunked:
            logits = model(input_ids=ids, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), targets)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head: Any = model.get_output_embeddings()
        # The paper's class divides its logits by the width's multiplier.
        multiplier = getattr(model, "multiplier", 1.0)
        return head_loss(hidden.flatten(0, 1), head.weight, targets, multiplier)


def train(
    model: PreTrainedModel,
    probe: RouterProbe,
    optimizer: torch.optim.Optimizer,
    inner: InnerState,
    batches: Batches,
    settings: LocalSettings,
    *,
    balance: BalanceSettings,
    first_step: int,
    total_steps: int,
    device: torch.device,
    execution: Execution = PLAIN,
    team: Team = ALONE,
) -> LocalReport:
    """Take `settings.steps` optimizer steps, starting at step `first_step` of the run.

    `execution` must be the one that the model was prepared with, and `team` the one it is parted
    among; every process of it gets the same report. Raises TrainingError when the loss is no longer
    finite: a worker that diverged must not send its weights.
    """
    passes = team.passes(settings)

    def run_pass(windows: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        loss = team.run(token_loss, model, windows, settings.precision, execution.chunked_loss)
        routers = probe.losses()
        extra = balance.loss * routers.balance + balance.z_loss * routers.z
        ((loss + extra) / (passes / weight)).backward()
        return loss.detach(), routers.balance.detach().to(device)

    model.train()
    started = time.perf_counter()
    losses, norms, balances, tokens = [], [], [], 0
    rate = settings.lr
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    graph: GraphedPass | None = None
    for offset in range(settings.steps):
        rate = learning_rate(settings, first_step + offset, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_multiplier"]
        if graph is None:
            optimizer.zero_grad(set_to_none=True)
        step_loss = torch.zeros((), device=device)
        step_balance = torch.zeros((), device=device)
        passed = enumerate(team.micro_batches(batches, settings, device))
        for index, (windows, weight) in passed:
            if execution.cuda_graph and graph is None:
                graph = GraphedPass(run_pass, windows, parameters, probe.forget)
            loss, balanced = graph(windows, index == 0) if graph else run_pass(windows, weight)
            step_loss += loss / (passes / weight)
            step_balance += balanced / (passes / weight)
            tokens += windows[:, 1:].numel()
        norms.append(_clip(parameters, optimizer, settings.grad_clip))
        inner.step(optimizer, rate)
        probe.move_biases(balance.bias_rate, team.sum)
        losses.append(step_loss)
        balances.append(step_balance)
    # One host sync a round, not one a step.
    step_losses = team.mean(torch.stack(losses))
    mean_loss = float(step_losses.mean())
    if not math.isfinite(mean_loss):
        bad = next(i for i, loss in enumerate(step_losses) if not math.isfinite(float(loss)))
        raise TrainingError(
            f"training loss is {float(step_losses[bad])} at step {first_step + bad}: lower "
            f"local.lr={settings.lr} or local.grad_clip={settings.grad_clip}"
        )
    optimizer.zero_grad(set_to_none=True)
    return LocalReport(
        loss=mean_loss,
        last_loss=float(step_losses[-1]),
        balance_loss=float(team.mean(torch.stack(balances)).mean()),
        grad_norm=float(torch.stack(norms).mean()),
        lr=rate,
        tokens=int(team.sum(torch.tensor(tokens))),
        seconds=time.perf_counter() - started,
        routing=probe.counts.over(team.sum),
    )


def _clip(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, limit: float
) -> Tensor:
    """Return the norm of all gradients, and have the step's gradients shortened to `limit`.

    A fused optimizer divides by `grad_scale` while it reads the gradients: that saves a pass over
    them. A limit of 0 is none.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    if limit > 0 and isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale = ((norm.float() + 1e-6) / limit).clamp(min=1.0)  # type: ignore[attr-defined]
    elif limit > 0:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.detach().float()
