"""The inner optimizer's state of one worker, which the state store keeps from round to round.

Adam's moments of an expert belong to the expert, not to its place in a worker's stack: when the
layout moves, kept experts keep their moments and new ones start fresh, with a learning-rate warm-up
for those weights only (paper section 3.4).

torch counts steps per parameter, and all residents of a layer are one parameter. So every row has
an age of its own here, and `step` gives a row younger than its parameter the exact Adam bias
correction of its own age (up to eps), and its warm-up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fomoe_flwr.config import LocalSettings, RoutingMode
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.shards import FullTensors, local, parted_like, rows_here, whole
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.parameters.fragments import MOMENTS as _MOMENTS
from fomoe_flwr.parameters.keys import is_expert_key, layer_of, sparse_layers
from fomoe_flwr.worker.state_files import PLACE, WEIGHTS, resident_name, residents_in
from fomoe_flwr.worker.state_store import STATES, UNREADABLE, Stored, tell_lost

_NEGLIGIBLE = 1e-6


@dataclass
class InnerState:
    """The state of a torch optimizer with an age for each resident; goes to a file and back."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    settings: LocalSettings
    routing: RoutingMode
    residents: Residents
    is_fresh: bool = True
    """True until a stored state was found."""
    num_fresh_experts: int = 0
    """(layer, expert) pairs that are new here since the stored state."""
    cursor: dict[str, object] = field(default_factory=dict)
    """Where the worker's data stream stands."""
    place: dict[str, object] = field(default_factory=dict)
    """At which step of the run the worker is, and with whose shares it balances."""
    _steps: int = 0
    _ages: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sparse = sparse_layers(name for name, _ in self.model.named_parameters())
        if not self._ages:
            self._ages = [torch.zeros(len(r), dtype=torch.long) for r in self.residents]

    def _layer_of(self, key: str) -> int:
        return self._sparse.index(layer_of(key))

    def step(self, rate: float) -> None:
        """Take one optimizer step; give experts younger than the worker the step of their age."""
        corrected = self._corrections()
        before = {p: local(p)[rows].clone() for p, rows, _, _ in corrected}
        self.optimizer.step()
        decay = {
            p: rate * g.get("lr_multiplier", 1.0) * g["weight_decay"]
            for g in self.optimizer.param_groups
            for p in g["params"]
        }
        for parameter, rows, bias, warmup in corrected:
            start = before[parameter]
            shape = (-1,) + (1,) * (parameter.dim() - 1)
            bias, warmup = bias.to(start).view(shape), warmup.to(start).view(shape)
            # Weight decay knows no bias correction: only Adam's own part is scaled by it.
            here = local(parameter)
            adam = here[rows] - start * (1 - decay[parameter])
            here[rows] = start + warmup * (bias * adam - decay[parameter] * start)
        self._steps += 1
        for ages in self._ages:
            ages += 1

    def _corrections(self) -> list[tuple[nn.Parameter, Tensor, Tensor, Tensor]]:
        """List (parameter, rows, bias, warm-up) where a row's update differs from its parameter's.

        Of a parameter that is parted among processes only the rows that are here, counted from 0.
        Both factors multiply: `bias` what Adam adds, `warmup` the learning rate.
        """
        if self.settings.optimizer != "adamw" or all(
            bool((ages == self._steps).all()) for ages in self._ages
        ):
            return []
        found = []
        for name, parameter in self.model.named_parameters():
            if not is_expert_key(name, self.routing) or not parameter.numel():
                continue
            ages = self._ages[self._layer_of(name)]
            bias = self._bias(ages + 1) / self._bias(ages.max()[None] + 1)
            warmup = torch.ones_like(bias)
            num_warm = self.settings.fresh_expert_warmup_steps
            if num_warm:
                young = (ages < self._steps) & (ages < num_warm)
                warmup = torch.where(young, (ages + 1) / num_warm, warmup)
            here = rows_here(parameter)
            bias, warmup = bias[here], warmup[here]
            off = (bias - 1).abs() + (warmup - 1).abs()
            rows = (off > _NEGLIGIBLE).nonzero().flatten()
            if len(rows):
                found.append((parameter, rows, bias[rows], warmup[rows]))
        return found

    def _bias(self, steps: Tensor) -> Tensor:
        """Return Adam's step-size factor sqrt(1 - beta2^t) / (1 - beta1^t)."""
        t = steps.double()
        return (1 - self.settings.beta2**t).sqrt() / (1 - self.settings.beta1**t)

    def moments(self, name: str) -> State:
        """Return one of Adam's moments by state key."""
        parameters, state = self.model.named_parameters(), self.optimizer.state
        return FullTensors({key: state[p][name] if p.numel() else p for key, p in parameters})

    def adopt(self, moments: Mapping[str, State], part: StateSpec, steps: int) -> None:
        """Take moments that the server averaged, as if they had `steps` local steps behind them.

        A single moment goes only where the other one is: a first moment over a fresh second one
        would make a huge step.
        """
        parameters = dict(self.model.named_parameters())
        both = len(moments) == len(_MOMENTS)
        if both:
            self._steps = max(self._steps, steps)
        for entry in (*part.shared, *part.expert):
            parameter = parameters[entry.key]
            if not parameter.numel():
                continue
            state = self.optimizer.state[parameter]
            rows: slice | Tensor = slice(None)
            if entry.layer is not None and not both:
                rows = self._ages[entry.layer] == self._steps
            if not both and not state:
                continue
            if not state:
                state["step"] = torch.tensor(0.0, device=parameter.device)
                for name in _MOMENTS:
                    state[name] = torch.zeros_like(parameter)
            for name, values in moments.items():
                start, given = entry.start, values[entry.key]
                here = rows_here(parameter)
                first, stop = max(here.start, start), min(here.stop, start + len(given))
                if stop > first:
                    chosen = rows[first:stop] if isinstance(rows, Tensor) else rows
                    target = local(state[name])[first - here.start : stop - here.start]
                    target[chosen] = given[first - start : stop - start].to(target)[chosen]
            if both:
                state["step"].fill_(float(steps))
        if both:
            for layer in {entry.layer for entry in part.expert if entry.layer is not None}:
                self._ages[layer].fill_(steps)

    def save(
        self,
        path: Path,
        weights: Mapping[str, Tensor] | None = None,
        is_writer: bool = True,
        on_disk: bool = True,
    ) -> None:
        """Store moments, ages, cursor and `weights`; see `StateStore.save`.

        No step may follow: the store takes the moments themselves. With
        `local.keep_inner_state=false` no moments and ages are kept. Processes that share the
        model call this together, and one writes: what lies on the disk is whole, so that the next
        round may have another number of processes.
        """
        tensors: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            for moment in _MOMENTS:
                if self.settings.keep_inner_state and moment in self.optimizer.state.get(p, {}):
                    value = whole(self.optimizer.state[p][moment])
                    if is_writer:
                        tensors[f"{moment}/{name}"] = value
        if not is_writer:
            return
        for layer, ages in enumerate(self._ages):
            tensors[f"age/{layer}"] = ages
            tensors[resident_name(layer)] = torch.tensor(self.residents[layer], dtype=torch.long)
        for name, value in (weights or {}).items():
            tensors[f"{WEIGHTS}{name}"] = value.detach()
        meta = {"steps": str(self._steps), "cursor": json.dumps(self.cursor)}
        meta[PLACE] = json.dumps(self.place)
        STATES.save(path, tensors, meta, on_disk)

    def restore(self, path: Path) -> None:
        """Read a stored state into the optimizer; leave everything fresh if it cannot be read.

        Experts that were not resident when it was stored start with zero moments and age 0.
        """
        try:
            with STATES.open(path) as stored:
                self._adopt(stored)
        except UNREADABLE as error:
            tell_lost(path, error)
            self._steps, self._ages, self.num_fresh_experts, self.cursor = 0, [], 0, {}
            self.__post_init__()
            self.optimizer.state.clear()
            return
        self.is_fresh = not self.settings.keep_inner_state

    def _adopt(self, stored: Stored) -> None:
        meta = stored.metadata() or {}
        self.cursor = json.loads(meta["cursor"])
        if not self.settings.keep_inner_state:
            return
        self._steps = int(meta["steps"])
        origin = []
        for layer, (residents, held) in enumerate(
            zip(self.residents, residents_in(stored), strict=True)
        ):
            place = {expert: i for i, expert in enumerate(held)}
            source = torch.tensor([place.get(expert, -1) for expert in residents], dtype=torch.long)
            known = source >= 0
            ages = torch.zeros(len(residents), dtype=torch.long)
            ages[known] = stored.get_tensor(f"age/{layer}")[source[known]]
            self._ages[layer] = ages
            self.num_fresh_experts += int((~known).sum())
            origin.append(source)
        if self.settings.optimizer != "adamw":
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.numel():
                continue
            is_expert = is_expert_key(name, self.routing)
            step = int(self._ages[self._layer_of(name)].max()) if is_expert else self._steps
            state: dict[str, Tensor] = {"step": torch.tensor(float(step), device=parameter.device)}
            for moment in _MOMENTS:
                value = stored.get_tensor(f"{moment}/{name}")
                if is_expert:
                    value = _rows(value, origin[self._layer_of(name)])
                state[moment] = parted_like(parameter, value)
            self.optimizer.state[parameter] = state


def _rows(stored: Tensor, source: Tensor) -> Tensor:
    """Return the stored rows at `source`, zeros where it is -1."""
    if torch.equal(source, torch.arange(len(stored))):
        return stored
    rows = stored.new_zeros(len(source), *stored.shape[1:])
    rows[source >= 0] = stored[source[source >= 0]]
    return rows
