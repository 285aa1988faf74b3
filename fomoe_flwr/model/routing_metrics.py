"""Measures of stable routing: ghosts, balance of the load, and how alike two routers choose.

Shape legend: L layers, T tokens, K chosen experts per token, E experts, M workers, D model width.

With n_i assignments to expert i, f_i = n_i / sum n. Loads are `[..., E]` and their measures keep
the leading axes; NaN where nothing was routed, or where a measure has no meaning. Choices are
`[..., T, K]` ids; the id E stands for no choice, where a router had fewer than K experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fomoe_flwr.model.router_probe import RoutingCounts

DEAD_SHARE = 0.1
"""An expert is dead if it gets less than this part of an even share."""


def pool(counts: Sequence[RoutingCounts]) -> RoutingCounts:
    """Add up the counts of several workers; at least one."""
    return RoutingCounts(
        torch.stack([one.load for one in counts]).sum(0),
        torch.stack([one.ghosts for one in counts]).sum(0),
        torch.stack([one.all_ghost for one in counts]).sum(0),
        sum(one.tokens for one in counts),
    )


def ghost_share(counts: RoutingCounts) -> Tensor:
    """Return the share of assignments that went to a ghost, [L]; from 0 to 1."""
    return counts.ghosts.double() / counts.load.sum(-1)


def all_ghost_share(counts: RoutingCounts) -> Tensor:
    """Return the share of tokens of which every choice was a ghost, [L]; from 0 to 1."""
    return counts.all_ghost.double() / counts.tokens if counts.tokens else _nan(counts.all_ghost)


def uniform_ghost_share(num_experts: int, num_residents: int) -> float:
    """Return `ghost_share` when all sets of choices are equally likely: 1 - R / E."""
    return 1 - num_residents / num_experts


def uniform_all_ghost_share(num_experts: int, num_residents: int, top_k: int) -> float:
    """Return `all_ghost_share` when all sets are equally likely: C(E - R, k) / C(E, k)."""
    return math.comb(num_experts - num_residents, top_k) / math.comb(num_experts, top_k)


def load_entropy(load: Tensor) -> Tensor:
    """Return -sum f_i ln f_i / ln E: 1 if the load is even, 0 if one expert gets all.

    A single expert has an even load: 1.
    """
    most = math.log(load.shape[-1])
    return 1 - load_kl(load) / most if most else 1 - load_kl(load)


def load_kl(load: Tensor) -> Tensor:
    """Return KL(f || uniform) = ln E + sum f_i ln f_i in nats; from 0 (even) to ln E."""
    share = _shares(load)
    # Rounding can end just below zero.
    return (math.log(load.shape[-1]) + torch.xlogy(share, share).sum(-1)).clamp(min=0)


def max_violation(load: Tensor) -> Tensor:
    """Return MaxVio, max n_i / mean n - 1, of all tokens given; from 0 (even) to E - 1."""
    return load.shape[-1] * _shares(load).amax(-1) - 1


def load_variation(load: Tensor) -> Tensor:
    """Return the coefficient of variation std(n) / mean n; from 0 (even) to sqrt(E - 1)."""
    return load.shape[-1] * _shares(load).std(-1, correction=0)


def dead_share(load: Tensor) -> Tensor:
    """Return the share of experts with f_i < 0.1 / E; from 0 to less than 1."""
    share = _shares(load)
    dead = (share < DEAD_SHARE / load.shape[-1]).double().mean(-1)
    return dead.where(load.sum(-1) > 0, math.nan)


def router_cosine(weight_ED: Tensor) -> float:
    """Return the mean cosine of two different rows of a router; from -1 / (E - 1) to 1.

    1 is collapse: the router cannot tell experts apart. A row of zeros is orthogonal to all.
    """
    num_experts = weight_ED.shape[0]
    if num_experts < 2:
        return math.nan
    rows_ED = torch.nn.functional.normalize(weight_ED.detach().double(), dim=-1)
    cosine_EE = rows_ED @ rows_ED.T
    total = cosine_EE.sum() - cosine_EE.diagonal().sum()
    return float(total / (num_experts * (num_experts - 1)))


def choice_overlap(choices_MTK: Tensor, num_experts: int) -> Tensor:
    """Return |A_m(t) & A_m'(t)| / K, mean over tokens, for all pairs of routers: [M, M], 0 to 1."""
    num_tokens, top_k = choices_MTK.shape[1:]
    chosen_MTE = torch.zeros(len(choices_MTK), num_tokens, num_experts + 1)
    chosen_MTE.scatter_(2, choices_MTK, 1.0)
    flat = chosen_MTE[..., :num_experts].flatten(1)
    # Sums of ones: exact in fp32, in any order.
    return (flat @ flat.T).double() / (num_tokens * top_k)


def churn(before_LTK: Tensor, after_LTK: Tensor, num_experts: int) -> Tensor:
    """Return the share of choices that are new, 1 - mean |A_before & A_after| / K: [L], 0 to 1."""
    pairs = torch.stack([before_LTK, after_LTK], 1)
    return torch.stack([1 - choice_overlap(pair, num_experts)[0, 1] for pair in pairs])


def agreement(choices_MLTK: Tensor, num_experts: int) -> Tensor:
    """Return for every worker its mean overlap with the others, [M, L]; from 0 to 1, NaN if M = 1.

    Its mean over workers is the mean over all pairs.
    """
    num_workers, num_layers = choices_MLTK.shape[:2]
    if num_workers < 2:
        return torch.full((num_workers, num_layers), math.nan, dtype=torch.float64)
    layers = []
    for layer in range(num_layers):
        overlap_MM = choice_overlap(choices_MLTK[:, layer], num_experts)
        layers.append((overlap_MM.sum(1) - overlap_MM.diagonal()) / (num_workers - 1))
    return torch.stack(layers, 1)


def expert_drift(distance_LE: Tensor, norm_LE: Tensor, copies_LE: Tensor) -> Tensor:
    """Return how far an expert's copies lie apart, relative to its weights: [L], 0 or more.

    Root mean square distance of the copies from their mean over the norm of the expert's weights,
    mean over the experts with at least two copies; NaN in a layer without.
    """
    relative_LE = distance_LE.double() / norm_LE.double().clamp(min=torch.finfo(torch.float).tiny)
    several_LE = copies_LE >= 2
    return relative_LE.where(several_LE, 0.0).sum(-1) / several_LE.sum(-1)


def defined_mean(values: Iterable[float]) -> float:
    """Return the mean of those that are not NaN, NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _shares(load: Tensor) -> Tensor:
    return load.double() / load.sum(-1, keepdim=True)


def _nan(like: Tensor) -> Tensor:
    return torch.full(like.shape, math.nan, dtype=torch.float64)
