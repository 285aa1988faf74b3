"""FLOPs of a token, by part of the model, and what skipping ghosts can save of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings, RoutingMode
from fomoe_flwr.layout import Layout
from fomoe_flwr.parameters.keys import has_layer, is_any_expert_key, is_router_key
from fomoe_flwr.parameters.shapes import head_size, latent_sizes, layer_groups

TRAINING_FACTOR = 3
"""Training FLOPs over forward FLOPs: the backward pass has two products for each one."""


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token, by part of the model; a multiply-add counts two."""

    projections: float
    """Every dense matrix of the layers: attention's, and shared experts'."""
    scores: float
    router: float
    experts: float
    head: float

    @property
    def forward(self) -> float:
        """FLOPs of one token's forward pass."""
        return self.projections + self.scores + self.router + self.experts + self.head

    @property
    def train(self) -> float:
        """FLOPs of one token's forward and backward pass."""
        return TRAINING_FACTOR * self.forward

    @property
    def expert_share(self) -> float:
        """Share of the experts in all FLOPs (f in the skip-token limit)."""
        return self.experts / self.forward


def token_flops(
    model: ModelSettings, sequence_length: int, executed_experts: float | None = None
) -> TokenFlops:
    """Return the forward FLOPs of one token; norms, softmax and embedding look-up are left out.

    `executed_experts` is the mean number of experts that run for a token in a layer; left out, it
    is `top_k`, the whole model. Attention is causal: a token attends to half the sequence on
    average.
    """
    executed = model.top_k if executed_experts is None else executed_experts
    dense = router = experts = attending = 0
    for group in layer_groups(model):
        attending += len(group.numbers) if any(".self_attn." in key for key in group.shapes) else 0
        for key, shape in group.shapes.items():
            size = group.copies * math.prod(shape)
            dense += size if _is_dense_matrix(key, shape) else 0
            router += size if is_router_key(key) and len(shape) == 2 else 0
            experts += size if is_any_expert_key(key) else 0
    return TokenFlops(
        projections=2 * dense,
        scores=attending * sequence_length * model.num_heads * _attended(model),
        router=2 * router,
        experts=executed * 2 * experts / model.num_experts,
        head=2 * model.hidden_size * model.vocab_size,
    )


def _attended(model: ModelSettings) -> int:
    """Return the widths of a key and a value."""
    if "attended" in model.architecture:
        return int(model.architecture["attended"])
    # DeepSeek's keys have a rotary part that values lack.
    rotary = latent_sizes(model).rotary if model.family == "deepseek_v3" else 0
    return 2 * head_size(model) + rotary


def executed_experts(model: ModelSettings, layout: Layout) -> list[float]:
    """Return how many experts run for a token on each worker, mean over layers, at uniform routing.

    `skip_token`: the chosen experts that happen to be resident. `partitioned`: the worker chooses
    among its residents, so it runs `top_k` of them as long as it has that many.
    """
    means = []
    for worker in range(layout.num_workers):
        held = [len(experts) for experts in layout.of_worker(worker)]
        if model.routing_mode is RoutingMode.SKIP_TOKEN:
            means.append(model.top_k * sum(held) / (len(held) * model.num_experts))
        else:
            means.append(sum(min(model.top_k, count) for count in held) / len(held))
    return means


def skip_speedup_limit(expert_share: float, resident_share: float) -> float:
    """Return how much faster a step can get when only a share of the expert work is executed.

    1 / (1 - f (1 - a)): f the experts' share of all FLOPs, a the executed share of expert work.
    """
    return 1 / (1 - expert_share * (1 - resident_share))


def _is_dense_matrix(key: str, shape: tuple[int, ...]) -> bool:
    is_routed = is_router_key(key) or is_any_expert_key(key)
    return has_layer(key) and len(shape) == 2 and not is_routed
