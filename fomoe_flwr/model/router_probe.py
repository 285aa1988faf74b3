"""What the routers do: the balance loss of a step, the routing counts of a round, the choices.

Shape legend: T tokens, K chosen experts, E scored experts (residents only in `partitioned`),
L layers, B windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.model.residency import Residents, moe_blocks


@dataclass
class RoutingCounts:
    """Assignments of tokens to experts, summed over the steps of a round."""

    load: Tensor
    """[num_layers, num_experts] assignments to each expert, ghosts included."""
    ghosts: Tensor
    """[num_layers] assignments that went to a ghost."""
    all_ghost: Tensor
    """[num_layers] tokens of which every choice was a ghost."""
    tokens: int = 0

    @property
    def ghost_fraction(self) -> float:
        """Share of assignments that went to a ghost, over all layers."""
        return _ratio(float(self.ghosts.sum()), float(self.load.sum()))

    @property
    def all_ghost_fraction(self) -> float:
        """Share of (token, layer) pairs of which every choice was a ghost."""
        return _ratio(float(self.all_ghost.sum()), float(self.tokens * len(self.all_ghost)))


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


@dataclass
class RouterProbe:
    """Listens to every router of a model.

    Between `model(...)` and `backward()`, `losses()` gives the losses of that forward pass;
    `counts` grow until they are read.
    """

    model: nn.Module
    num_experts: int
    residents: Residents | None = None
    pooled_share: Tensor | None = None
    """[num_layers, num_experts] shares of assignments to use in place of the micro-batch's own."""
    counts: RoutingCounts = field(init=False)
    _pending: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)
    _step_load: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        blocks = list(moe_blocks(self.model))
        num_layers = 1 + max((layer for layer, _ in blocks), default=-1)
        self.counts = RoutingCounts(
            load=torch.zeros(num_layers, self.num_experts, dtype=torch.long),
            ghosts=torch.zeros(num_layers, dtype=torch.long),
            all_ghost=torch.zeros(num_layers, dtype=torch.long),
        )
        self._first_layer = blocks[0][0] if blocks else -1
        self._handles = [
            block.gate.register_forward_hook(self._listener(layer, block))
            for layer, block in blocks
        ]

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def losses(self) -> RouterLosses:
        """Return the routers' losses since the last call, means over layers."""
        pending, self._pending = self._pending, []
        if not pending:
            return RouterLosses(torch.zeros(()), torch.zeros(()))
        balance, z = (torch.stack(column).mean() for column in zip(*pending, strict=True))
        return RouterLosses(balance, z)

    def move_biases(self, rate: float) -> None:
        """Move every selection bias by `rate` towards balance (arXiv 2408.15664).

        An expert with less than the mean load since the last call gets more, one above it less.
        """
        loads, self._step_load = self._step_load, {}
        if not rate:
            return
        for layer, block in moe_blocks(self.model):
            load = loads[layer].float()
            with torch.no_grad():
                block.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)

    def _listener(self, layer: int, block: Any) -> Callable[..., None]:
        slots = getattr(block.experts, "slot_of_expert", None)
        held = torch.arange(self.num_experts)
        if self.residents is not None and slots is None:
            # `partitioned`: the router counts slots; write them down under their global ids.
            held = torch.tensor(self.residents[layer], dtype=torch.long)
        pooled = None if self.pooled_share is None else self.pooled_share[layer, held]
        if pooled is not None and not pooled.any():
            # Nobody who holds these experts was heard of in the round before.
            pooled = None

        def listen(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            logits_TE, chosen_TK = output[0], output[-1]
            if not self.model.training:
                return
            load_E = torch.bincount(chosen_TK.reshape(-1), minlength=logits_TE.shape[-1])
            self._step_load[layer] = load_E + self._step_load.get(layer, 0)
            if torch.is_grad_enabled():
                probability_E = _probabilities(block.gate, logits_TE).mean(0)
                if pooled is None:
                    share_E = load_E.float() / chosen_TK.numel()
                else:
                    share_E = (pooled / pooled.sum()).to(probability_E)
                balance = logits_TE.shape[-1] * (share_E * probability_E).sum()
                z = logits_TE.float().logsumexp(-1).square().mean()
                self._pending.append((balance, z))
            self.counts.load[layer, held] += load_E.cpu()
            if slots is not None:
                ghost_TK = slots[chosen_TK] == block.experts.num_experts
                self.counts.ghosts[layer] += int(ghost_TK.sum())
                self.counts.all_ghost[layer] += int(ghost_TK.all(-1).sum())
            if layer == self._first_layer:
                self.counts.tokens += len(chosen_TK)

        return listen


def chosen_experts(
    model: PreTrainedModel,
    windows_BS: Tensor,
    num_experts: int,
    top_k: int,
    residents: Residents | None = None,
    batch_size: int = 16,
) -> Tensor:
    """Return the experts that each token is sent to, [L, T, K] with T = B * S.

    Global ids in ascending order; the id `num_experts` fills up where a router of `partitioned` has
    fewer than `top_k` experts to choose from. In eval mode, where `RouterProbe` counts nothing.
    """
    seen: dict[int, list[Tensor]] = {}

    def listener(layer: int, block: Any) -> Callable[..., None]:
        held = torch.arange(num_experts)
        if residents is not None and not hasattr(block.experts, "slot_of_expert"):
            held = torch.tensor(residents[layer], dtype=torch.long)

        def listen(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            ids_TK = held[output[-1].cpu()].sort(-1).values
            missing = (0, top_k - ids_TK.shape[-1])
            padded_TK = nn.functional.pad(ids_TK, missing, value=num_experts)
            seen.setdefault(layer, []).append(padded_TK)

        return listen

    handles = [
        block.gate.register_forward_hook(listener(layer, block))
        for layer, block in moe_blocks(model)
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch_BS in windows_BS.split(batch_size):
                # Without the head: nobody asks for logits over the vocabulary.
                model.base_model(input_ids=batch_BS.to(device), use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(seen[layer]) for layer in sorted(seen)])


def _probabilities(gate: nn.Module, logits_TE: Tensor) -> Tensor:
    if getattr(gate, "score_function", "softmax") == "sigmoid":
        score_TE = logits_TE.float().sigmoid()
        return score_TE / score_TE.sum(-1, keepdim=True)
    return torch.softmax(logits_TE.float(), -1)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
