"""The MoE blocks of a model: its experts and routers, found by what they are.

transformers gives all experts one interface (`experts.is_experts`) and all routers one result:
(logits, weights, chosen experts, ...). Names of attributes, and what else a block has, differ.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomoe_flwr.errors import InputError
from fomoe_flwr.model.experts import form_of, is_experts
from fomoe_flwr.parameters.keys import has_layer, layer_of

BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
"""What families call the bias that a router adds to the scores when it chooses."""

NO_EXPERTS = "it has no experts with the interface of transformers"
_TRIAL_TOKENS = 16
_SCORES: dict[tuple[type, int, str], str] = {}


class FamilyError(InputError):
    """A model that cannot be trained here; the text says why."""


@dataclass(frozen=True)
class MoeBlock:
    """One sparse layer's experts, with the router that chooses among them."""

    path: str
    """Name of the module that has both."""
    layer: int
    """Number of the decoder layer."""
    owner: nn.Module
    router_name: str
    experts_name: str

    @property
    def router(self) -> Any:
        """Module that returns (logits, weights, chosen experts, ...)."""
        return self.owner.get_submodule(self.router_name)

    @property
    def experts(self) -> Any:
        """Module with transformers' experts interface."""
        return self.owner.get_submodule(self.experts_name)

    @property
    def bias(self) -> Tensor | None:
        """The selection bias, [E], that moves with the load; None for a router without one."""
        found = [
            value
            for module in (self.router, self.owner)
            for name, value in (*module.named_parameters(), *module.named_buffers())
            if name.rpartition(".")[2] in BIAS_NAMES
        ]
        return found[0] if found else None


def moe_blocks(model: nn.Module) -> Iterator[MoeBlock]:
    """Yield the blocks of a model, in the order of its layers.

    Raises FamilyError where experts have no router that can be told, or lie outside the layers.
    """
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        path, _, experts = name.rpartition(".")
        if not has_layer(f".{path}."):
            raise FamilyError(f"{type(module).__name__} at {name} lies in no decoder layer")
        owner = model.get_submodule(path)
        yield MoeBlock(path, layer_of(f".{path}."), owner, _router(owner, experts), experts)


def num_experts(experts: Any) -> int:
    """Return from how many experts a token's are chosen; ghosts of `skip_token` count."""
    rows = getattr(experts, "slot_of_expert", experts.down_proj)
    return len(rows)


def checked_blocks(model: nn.Module) -> list[MoeBlock]:
    """Return the blocks of a model whose ghosts can be skipped; else raise FamilyError, and why."""
    blocks = list(moe_blocks(model))
    if not blocks:
        raise FamilyError(NO_EXPERTS)
    layers = [block.layer for block in blocks]
    if len(set(layers)) != len(layers):
        raise FamilyError("a layer has two sets of experts")
    sizes = {num_experts(block.experts) for block in blocks}
    if len(sizes) != 1:
        raise FamilyError(f"its layers have different numbers of experts: {sorted(sizes)}")
    for block in blocks:
        form_of(block.experts)
    return blocks


def score_function(router: nn.Module, hidden_size: int) -> str:
    """Find out how a router makes weights of logits: `softmax`, `sigmoid` or `other`.

    Weights of two chosen experts are in proportion to their scores, however they are normalised or
    scaled. So a copy of the router, with weights drawn here, is asked for some tokens; once for
    all routers that are alike.
    """
    plain = {k: v for k, v in vars(router).items() if isinstance(v, int | float | str)}
    alike = (type(router), hidden_size, repr(sorted(plain.items())))
    if alike not in _SCORES:
        _SCORES[alike] = _score_function(router, hidden_size)
    return _SCORES[alike]


def _score_function(router: nn.Module, hidden_size: int) -> str:
    asked = trial(_choosing_two(router), hidden_size)
    if asked is None:
        return "other"
    logits_TE, weight_TK, chosen_TK = asked
    if weight_TK.shape != chosen_TK.shape or chosen_TK.shape[1] == 1:
        return "other"
    logits_TK = logits_TE.gather(1, chosen_TK)
    for name, score in (("softmax", logits_TK), ("sigmoid", F.logsigmoid(logits_TK))):
        apart_TK = weight_TK.log() - score
        if (apart_TK - apart_TK.mean(1, keepdim=True)).abs().max() < 1e-3:
            return name
    return "other"


def _choosing_two(router: Any) -> Any:
    """Return a router that chooses two experts at least: one weight alone may always be 1."""
    if getattr(router, "top_k", None) != 1:
        return router
    copied = copy.deepcopy(router)
    copied.top_k = 2
    return copied


def trial(router: nn.Module, hidden_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Ask a copy of a router, which may be on the meta device; None if it needs more than tokens.

    Returns logits [T, E], weights [T, K] and chosen experts [T, K].
    """
    generator = torch.Generator().manual_seed(0)
    copied = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    for name, value in (*copied.named_parameters(), *copied.named_buffers()):
        if not value.is_floating_point() or "bias" in name:
            value.data.zero_()
        else:
            value.data.normal_(std=hidden_size**-0.5, generator=generator)
    x_TD = torch.randn(_TRIAL_TOKENS, hidden_size, generator=generator)
    # Some get the selection bias of their block as a second input.
    bias_E = torch.zeros(max((len(v) for v in copied.parameters() if v.dim()), default=0))
    for inputs in ((x_TD,), (x_TD[None],), (x_TD, bias_E), (x_TD[None], bias_E)):
        try:
            with torch.no_grad():
                answer = copied(*inputs)
            return routed(answer)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            continue
    return None


def routed(answer: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a router's logits [T, E], weights [T, K] and chosen experts [T, K]."""
    logits, weights, chosen = answer[:3]
    flat = chosen.reshape(-1, chosen.shape[-1])
    return logits.reshape(len(flat), -1), weights.reshape(len(flat), -1), flat


def _router(owner: nn.Module, experts: str) -> str:
    """Find the module that has a row for each expert."""
    count = num_experts(owner.get_submodule(experts))
    found = [
        name
        for name, child in owner.named_children()
        if name != experts and any(value.dim() and len(value) == count for value in _tensors(child))
    ]
    kinds = {name: type(owner.get_submodule(name)).__name__.lower() for name in found}
    for word in ("router", "gate", ""):
        candidates = [name for name, kind in kinds.items() if word in kind]
        if len(candidates) == 1:
            return candidates[0]
    raise FamilyError(
        f"{type(owner).__name__} has no router that can be told: {len(found)} of its modules have "
        f"a row for each of {count} experts"
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
