"""Losses on the routers: the balance loss and the z-loss.

Shape legend: T tokens, E scored experts (residents only in `partitioned`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterLosses:
    """Losses on the routers of one forward pass, unweighted."""

    balance: Tensor
    """E * sum_i f_i P_i (Switch): f_i share of assignments to expert i, P_i its mean probability.

    Sigmoid scores are normalised over the experts first; 1 is perfect balance. In `skip_token`
    ghosts take part, so that a worker's router does not forget them.
    """
    z: Tensor
    """Mean squared logsumexp of the logits."""


def router_losses(logits_TE: Tensor, share_E: Tensor, is_sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Return the balance loss and the z-loss of one router.

    `share_E` are the shares of assignments that the balance loss takes for f_i.
    """
    logits_TE = logits_TE.float()
    if is_sigmoid:
        score_TE = logits_TE.sigmoid()
        probability_TE = score_TE / score_TE.sum(-1, keepdim=True)
    else:
        probability_TE = torch.softmax(logits_TE, -1)
    balance = logits_TE.shape[-1] * (share_E * probability_TE.mean(0)).sum()
    return balance, logits_TE.logsumexp(-1).square().mean()


@cache
def compiled_losses() -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """Return `router_losses` as one fused kernel."""
    compiled: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]] = torch.compile(
        router_losses, dynamic=False
    )
    return compiled
