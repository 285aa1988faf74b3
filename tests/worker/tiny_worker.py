"""A worker of made-up gradients, and the AdamW that each of its experts should have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fomoe_flwr.config import LocalSettings, RoutingMode
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.worker.inner_state import InnerState
from fomoe_flwr.worker.optimizer import make_optimizer

NUM_EXPERTS, NUM_LAYERS, ROW = 6, 2, (3, 4)
LOCAL = LocalSettings(lr=1e-2, fresh_expert_warmup_steps=0, weight_decay=0.0)
FIRST, SECOND = ((0, 1, 3), (2, 4)), ((1, 3, 5), (0, 4))


class TinyExperts(nn.Module):
    """Two layers of one expert tensor each and a shared matrix, under a real model's names."""

    def __init__(self, residents: Residents) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.shared = nn.Linear(4, 3, bias=False)
        layers = []
        for held in residents:
            layer, layer.mlp, layer.mlp.experts = nn.Module(), nn.Module(), nn.Module()
            layer.mlp.experts.down_proj = nn.Parameter(torch.zeros(len(held), *ROW))
            layers.append(layer)
        self.model.layers = nn.ModuleList(layers)

    def expert(self, layer: int) -> nn.Parameter:
        return self.model.layers[layer].mlp.experts.down_proj


Weights = dict[tuple[int, int], Tensor]


def gradient(layer: int, expert: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * expert + layer)
    return torch.randn(ROW, generator=generator)


def starting_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {
        (layer, expert): torch.randn(ROW, generator=generator)
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
    }


class Worker:
    """One worker's round: experts in, optimizer steps on made-up gradients, experts out."""

    def __init__(
        self, residents: Residents, weights: Weights, shared: Tensor, local: LocalSettings = LOCAL
    ) -> None:
        self.residents, self.local = residents, local
        self.model = TinyExperts(residents)
        with torch.no_grad():
            self.model.model.shared.weight.copy_(shared)
            for layer, held in enumerate(residents):
                for row, expert in enumerate(held):
                    self.model.expert(layer)[row] = weights[layer, expert]
        self.optimizer = make_optimizer(self.model, local)
        self.inner = InnerState(
            self.model, self.optimizer, local, RoutingMode.SKIP_TOKEN, residents
        )

    def train(self, steps: Sequence[int], rates: Mapping[int, float] | None = None) -> None:
        for step in steps:
            rate = (rates or {}).get(step, self.local.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.model.model.shared.weight.grad = gradient(9, 0, step)[:, :4].clone()
            for layer, held in enumerate(self.residents):
                grads = [gradient(layer, expert, step) for expert in held]
                self.model.expert(layer).grad = torch.stack(grads)
            self.inner.step(rate)

    def export(self, weights: Weights) -> Tensor:
        for layer, held in enumerate(self.residents):
            for row, expert in enumerate(held):
                weights[layer, expert] = self.model.expert(layer).detach()[row].clone()
        return self.model.model.shared.weight.detach().clone()

    def moments(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state[self.model.expert(layer)]
        row = list(self.residents[layer]).index(expert)
        return state["exp_avg"][row].clone(), state["exp_avg_sq"][row].clone()


def federated(
    rounds: Sequence[tuple[Residents, Sequence[int]]],
    folder: Path,
    local: LocalSettings = LOCAL,
    rates: Mapping[int, float] | None = None,
) -> tuple[Weights, Tensor]:
    """Play rounds with a stop, a file and a new process between any two of them."""
    weights, shared = starting_weights(), torch.ones(3, 4)
    for number, (residents, steps) in enumerate(rounds):
        worker = Worker(residents, weights, shared, local)
        worker.inner.restore(folder / f"{number - 1}.safetensors")
        worker.train(steps, rates)
        worker.inner.save(folder / f"{number}.safetensors")
        shared = worker.export(weights)
    return weights, shared


def separate_adams(
    rounds: Sequence[tuple[Residents, Sequence[int]]],
    local: LocalSettings = LOCAL,
    rates: Mapping[int, float] | None = None,
) -> Weights:
    """Give every (layer, expert) a torch AdamW of its own, new whenever the expert comes anew."""
    weights = starting_weights()
    adams: dict[tuple[int, int], tuple[nn.Parameter, torch.optim.AdamW]] = {}
    ages: dict[tuple[int, int], int] = {}
    for number, (residents, steps) in enumerate(rounds):
        held = {(layer, e) for layer, row in enumerate(residents) for e in row}
        adams = {place: adam for place, adam in adams.items() if place in held}
        for place in held - adams.keys():
            leaf = nn.Parameter(weights[place].clone())
            adams[place] = (
                leaf,
                torch.optim.AdamW(
                    [leaf],
                    betas=(local.beta1, local.beta2),
                    eps=local.eps,
                    weight_decay=local.weight_decay,
                ),
            )
            ages[place] = 0 if number else 10**9
        for step in steps:
            for place, (leaf, adam) in adams.items():
                warmup = local.fresh_expert_warmup_steps
                share = (ages[place] + 1) / warmup if ages[place] < warmup else 1.0
                adam.param_groups[0]["lr"] = (rates or {}).get(step, local.lr) * share
                leaf.grad = gradient(*place, step)
                adam.step()
                ages[place] += 1
        for place, (leaf, _) in adams.items():
            weights[place] = leaf.detach().clone()
    return weights


def assert_close(got: Weights, want: Weights) -> None:
    assert got.keys() == want.keys()
    for place, value in want.items():
        torch.testing.assert_close(got[place], value, rtol=1e-6, atol=1e-6, msg=str(place))
