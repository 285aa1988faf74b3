"""What the routers do: the losses of a step, the routing counts of a round, the choices.

Shape legend: T tokens, K chosen experts, E scored experts (residents only in `partitioned`),
L layers, B windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.model.blocks import MoeBlock, moe_blocks, routed
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.router_losses import RouterLosses, compiled_losses, router_losses


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

    def over(self, total: Callable[[Tensor], Tensor]) -> RoutingCounts:
        """Return the counts of several processes, of which `total` adds up a tensor."""
        parts = [self.load.flatten(), self.ghosts, self.all_ghost, torch.tensor([self.tokens])]
        sums = total(torch.cat(parts)).split([part.numel() for part in parts])
        return RoutingCounts(sums[0].view_as(self.load), sums[1], sums[2], int(sums[3]))

    def plus(self, other: RoutingCounts) -> RoutingCounts:
        """Return the counts of both."""
        return RoutingCounts(
            self.load + other.load,
            self.ghosts + other.ghosts,
            self.all_ghost + other.all_ghost,
            self.tokens + other.tokens,
        )

    @property
    def ghost_fraction(self) -> float:
        """Share of assignments that went to a ghost, over all layers."""
        return _ratio(float(self.ghosts.sum()), float(self.load.sum()))

    @property
    def all_ghost_fraction(self) -> float:
        """Share of (token, layer) pairs of which every choice was a ghost."""
        return _ratio(float(self.all_ghost.sum()), float(self.tokens * len(self.all_ghost)))


class RouterProbe:
    """Listens to every router of a model.

    Between `model(...)` and `backward()`, `losses()` gives the losses of that forward pass;
    `counts` grow until they are read. Nothing here makes the host wait for a GPU before that.

    `pooled_share`, [num_layers, num_experts] shares of assignments, takes the place of the
    micro-batch's own; with `compiled` the losses run as one fused kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        num_experts: int,
        residents: Residents | None = None,
        pooled_share: Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        self.num_experts = num_experts
        self._losses = compiled_losses() if compiled else router_losses
        self._layers = {row: _Listener(block) for row, block in enumerate(moe_blocks(model))}
        self._pending: list[tuple[Tensor, Tensor]] = []
        # Activation checkpointing runs layers again in backward: that is not another forward pass.
        self._is_forward = True
        # A loss in chunks calls the model without its head.
        trunk = getattr(model, "base_model", model)
        self._handles = [trunk.register_forward_pre_hook(self._begin)] + [
            listener.block.router.register_forward_hook(self._hook(model, listener))
            for listener in self._layers.values()
        ]
        self.begin(residents, pooled_share)

    def begin(self, residents: Residents | None, pooled_share: Tensor | None) -> bool:
        """Begin to count anew, for these residents.

        Return whether a captured pass still reads and writes what this object does.
        """
        self._pending = []
        self.forget()
        same = [
            listener.begin(
                self.num_experts,
                None if residents is None else residents[layer],
                None if pooled_share is None else pooled_share[layer],
            )
            for layer, listener in self._layers.items()
        ]
        return all(same)

    def close(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    @property
    def counts(self) -> RoutingCounts:
        """What was counted so far; waits for the device."""
        num_layers = 1 + max(self._layers, default=-1)
        counts = RoutingCounts(
            load=torch.zeros(num_layers, self.num_experts, dtype=torch.long),
            ghosts=torch.zeros(num_layers, dtype=torch.long),
            all_ghost=torch.zeros(num_layers, dtype=torch.long),
            tokens=next((listener.tokens() for listener in self._layers.values()), 0),
        )
        for layer, listener in self._layers.items():
            counts.load[layer, listener.scored] = (listener.load_E + listener.step_load_E).cpu()
            counts.ghosts[layer] = counts.load[layer, listener.ghosts()].sum()
            counts.all_ghost[layer] = listener.all_ghost.cpu()
        return counts

    def forget(self) -> None:
        """Begin to count anew."""
        for listener in self._layers.values():
            for count in (listener.load_E, listener.step_load_E, listener.all_ghost):
                count.zero_()

    def losses(self) -> RouterLosses:
        """Return the routers' losses since the last call, means over layers."""
        pending, self._pending = self._pending, []
        self._is_forward = False
        if not pending:
            return RouterLosses(torch.zeros(()), torch.zeros(()))
        balance, z = (torch.stack(column).mean() for column in zip(*pending, strict=True))
        return RouterLosses(balance, z)

    def move_biases(
        self, rate: float, total: Callable[[Tensor], Tensor] = lambda load: load
    ) -> None:
        """Move every selection bias by `rate` towards balance (arXiv 2408.15664).

        An expert with less than the mean load since the last call gets more, one above it less.
        `total` adds up a tensor over the processes of this worker.
        """
        for listener in self._layers.values():
            if rate:
                load_E = total(listener.step_load_E).float()
                with torch.no_grad():
                    bias = listener.block.bias
                    assert bias is not None
                    bias += (rate * torch.sign(load_E.mean() - load_E)).view_as(bias)
            listener.load_E += listener.step_load_E
            listener.step_load_E.zero_()

    def _begin(self, *_: object) -> None:
        self._is_forward = True

    def _hook(self, model: nn.Module, listener: _Listener) -> Callable[..., None]:
        def listen(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            if not model.training:
                return
            logits_TE, _, chosen_TK = routed(output)
            load_E = _load(chosen_TK, logits_TE.shape[-1])
            if self._is_forward:
                listener.count(chosen_TK, load_E)
            if torch.is_grad_enabled():
                share_E = listener.pooled_E
                if share_E is None:
                    share_E = load_E.float() / chosen_TK.numel()
                losses = self._losses(logits_TE, share_E.to(logits_TE.device), listener.is_sigmoid)
                # A repeated layer must do the same work, or what it saves would not match.
                if self._is_forward:
                    self._pending.append(losses)

        return listen


class _Listener:
    """What one router did: counters on its own device."""

    def __init__(self, block: MoeBlock) -> None:
        self.block = block
        self.is_sigmoid = getattr(block.router, "score_function", "softmax") == "sigmoid"
        self.slots: Tensor | None = getattr(block.experts, "slot_of_expert", None)
        self.scored: list[int] = []
        self.pooled_E: Tensor | None = None
        self.top_k = 0
        self.load_E = self.step_load_E = torch.zeros(0, dtype=torch.long)
        self.all_ghost = torch.zeros((), dtype=torch.long)

    def begin(
        self, num_experts: int, residents: Sequence[int] | None, share_E: Tensor | None
    ) -> bool:
        """Write under these experts' ids; return whether all tensors are still the same."""
        before = self.pooled_E, self.load_E
        self.scored = list(range(num_experts))
        if residents is not None and self.slots is None:
            # `partitioned`: the router counts slots; write them down under their global ids.
            self.scored = list(residents)
        if len(self.scored) != len(self.load_E):
            self.load_E = torch.zeros(len(self.scored), dtype=torch.long)
            self.step_load_E = torch.zeros_like(self.load_E)
            self.all_ghost = torch.zeros((), dtype=torch.long)
        self._pool(None if share_E is None else share_E[self.scored])
        return before[0] is self.pooled_E and before[1] is self.load_E

    def _pool(self, held_E: Tensor | None) -> None:
        """Take the shares of all workers in the round before."""
        if held_E is None or not held_E.any():  # nobody who holds these experts was heard of
            self.pooled_E = None
            return
        pooled_E = (held_E / held_E.sum()).float()
        if self.pooled_E is None or len(self.pooled_E) != len(pooled_E):
            self.pooled_E = pooled_E
        else:
            self.pooled_E.copy_(pooled_E)

    def count(self, chosen_TK: Tensor, load_E: Tensor) -> None:
        """Add one forward pass."""
        if self.load_E.device != load_E.device:
            device = load_E.device
            self.load_E, self.step_load_E = self.load_E.to(device), self.step_load_E.to(device)
            self.all_ghost = self.all_ghost.to(device)
            self.pooled_E = None if self.pooled_E is None else self.pooled_E.to(device)
        self.top_k = chosen_TK.shape[-1]
        self.step_load_E += load_E
        if self.slots is not None:
            is_ghost_TK = self.slots[chosen_TK] == int(self.block.experts.num_experts)
            self.all_ghost += is_ghost_TK.all(-1).sum()

    def ghosts(self) -> Tensor:
        """Return the ids of experts that the router scores and the worker lacks."""
        if self.slots is None:
            return torch.empty(0, dtype=torch.long)
        return (self.slots == int(self.block.experts.num_experts)).nonzero().flatten().cpu()

    def tokens(self) -> int:
        """Return how many tokens were routed."""
        return int((self.load_E + self.step_load_E).sum()) // max(1, self.top_k)


def _load(chosen_TK: Tensor, num_experts: int) -> Tensor:
    if chosen_TK.is_cuda:
        # bincount would make the host wait. Bins of width one: exact.
        flat = chosen_TK.reshape(-1).float()
        return torch.histc(flat, bins=num_experts, min=0, max=num_experts).long()
    return torch.bincount(chosen_TK.reshape(-1), minlength=num_experts)


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

    def listener(layer: int, block: MoeBlock) -> Callable[..., None]:
        held = torch.arange(num_experts)
        if residents is not None and not hasattr(block.experts, "slot_of_expert"):
            held = torch.tensor(residents[layer], dtype=torch.long)

        def listen(_module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
            ids_TK = held[routed(output)[2].cpu()].sort(-1).values
            missing = (0, top_k - ids_TK.shape[-1])
            padded_TK = nn.functional.pad(ids_TK, missing, value=num_experts)
            seen.setdefault(layer, []).append(padded_TK)

        return listen

    handles = [
        block.router.register_forward_hook(listener(row, block))
        for row, block in enumerate(moe_blocks(model))
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


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
