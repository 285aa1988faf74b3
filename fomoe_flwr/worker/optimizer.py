"""The local optimizer and the schedule of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fomoe_flwr.config import LocalSettings
from fomoe_flwr.parameters.completep import Multipliers, multipliers


def learning_rate(settings: LocalSettings, step: float, total_steps: int) -> float:
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
    """Build the local optimizer. Weight decay touches matrices, but no embedding, norm or router.

    A router row whose expert is a ghost, and an embedding row whose token is absent, get no task
    gradient: decay would shrink them for nothing. A model with width and depth multipliers gets
    CompleteP's groups. Their `lr_multiplier` is the factor on the schedule's rate. CompleteP's
    rules are Adam's, so SGD has none.
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
