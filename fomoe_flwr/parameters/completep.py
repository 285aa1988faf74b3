"""CompleteP (arXiv 2505.01618): what a wider and deeper model multiplies its proxy's settings by.

m_d and m_L are the model's width and depth over those of its proxy. The rules are those of the code
that FoMoE's authors train with (their fork of LLM Foundry, github.com/relogu/llm-foundry, commit
ab08c44). That code names no group for experts and router. Here experts are hidden matrices, and the
router is an output matrix (arXiv 2508.09752). `model.fomoe` has the multipliers of logits, branches
and initialisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from fomoe_flwr.parameters.keys import has_layer, is_router_key


@dataclass(frozen=True)
class Multipliers:
    """Factors on learning rate, Adam's epsilon and weight decay of one parameter."""

    lr: float = 1.0
    eps: float = 1.0
    decay: float = 1.0


def multipliers(key: str, width: float, depth: float, alpha: float = 1.0) -> Multipliers:
    """Return the factors of the parameter `key` for m_d = `width` and m_L = `depth`.

    Epsilon shrinks alike for every parameter, as in the authors' code. The CompleteP paper does not
    shrink it with depth for embedding and output.
    """
    eps = depth**-alpha / width
    if not has_layer(key):
        return Multipliers(eps=eps)
    depth_lr = depth ** (alpha - 1)
    if "norm" in key or is_router_key(key):
        return Multipliers(lr=depth_lr, eps=eps)
    return Multipliers(lr=depth_lr / width, eps=eps, decay=width)
