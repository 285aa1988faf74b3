"""CompleteP (arXiv 2505.01618): what a wider and deeper model multiplies its proxy's settings by.

The rules are those that the paper's authors coded, `research/fomoe.md` section 5.4: m_d and m_L are
width and depth over the proxy's. Theirs names no group for experts and router; here experts are
hidden matrices and the router is an output matrix (arXiv 2508.09752). What the model itself
multiplies (logits, branches, initialisation) stands in `model.fomoe`.
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

    Epsilon shrinks for every parameter alike, as in the authors' code; the CompleteP paper spares
    embedding and output the depth's part.
    """
    eps = depth**-alpha / width
    if not has_layer(key):
        return Multipliers(eps=eps)
    depth_lr = depth ** (alpha - 1)
    if "norm" in key or is_router_key(key):
        return Multipliers(lr=depth_lr, eps=eps)
    return Multipliers(lr=depth_lr / width, eps=eps, decay=width)
