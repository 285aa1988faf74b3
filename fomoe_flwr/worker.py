"""One worker's round: build the residents, train K steps, return the pseudo-gradient.

No Flower here: `client_app` unpacks a message into a `RoundTask` and packs the `RoundResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fomoe_flwr.config import Settings
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.inner_state import InnerState
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.model.state import StateSpec, load_state, state_of
from fomoe_flwr.training import LocalReport, make_optimizer, train


@dataclass(frozen=True)
class RoundTask:
    """Everything a worker needs for one round."""

    settings: Settings
    spec: StateSpec
    worker: int
    server_round: int
    residents: Residents
    shared: Tensor
    """Flat fp32 vector of the shared parameters."""
    experts: Tensor
    """Flat fp32 vector of the resident experts."""
    state_dir: Path
    """This worker's own folder on this run."""
    keep_rounds: Sequence[int]
    """Rounds whose inner state a resume may still ask for."""


@dataclass(frozen=True)
class RoundResult:
    """What a worker returns."""

    shared: Tensor
    experts: Tensor
    report: LocalReport
    inner_state_fresh: bool
    num_fresh_experts: int


def run_round(task: RoundTask, open_batches: Callable[[int], Batches]) -> RoundResult:
    """Train one round and return the pseudo-gradient, received minus trained weights.

    The inner state is read from `state_dir` (the newest before this round) and written there under
    this round's number, so that a repeated round starts from the same place.
    """
    settings, local = task.settings, task.settings.local
    device = pick_device(local.device)
    with _threads(local.threads):
        config = transformers_config(settings.model, settings.data.sequence_length)
        model = build_model(settings.model, config, task.residents, device=device, empty=True)
        load_state(
            model,
            task.spec.split_shared(task.shared)
            | task.spec.split_experts(task.experts, task.residents),
        )
        optimizer = make_optimizer(model, local)
        inner = InnerState(model, local, settings.model.routing_mode, task.residents)
        first_step = (task.server_round - 1) * local.steps
        batches = open_batches(first_step * local.accumulate)
        if stored := _newest_before(task.state_dir, task.server_round):
            inner.restore(optimizer, stored)
        if inner.cursor:
            batches.restore(inner.cursor)
        probe = RouterProbe(model, settings.model.num_experts, task.residents)
        report = train(
            model,
            probe,
            optimizer,
            inner,
            batches,
            local,
            first_step=first_step,
            total_steps=settings.rounds * local.steps,
            device=device,
        )
        probe.close()
        inner.cursor = batches.state()
        inner.save(optimizer, _state_file(task.state_dir, task.server_round))
        _forget(task.state_dir, {*task.keep_rounds, task.server_round, task.server_round - 1})
        trained = state_of(model)
        return RoundResult(
            shared=task.shared - task.spec.pack_shared(trained),
            experts=task.experts - task.spec.pack_experts(trained),
            report=report,
            inner_state_fresh=inner.is_fresh,
            num_fresh_experts=inner.num_fresh_experts,
        )


def pick_device(name: str) -> torch.device:
    """Resolve `auto` to the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _state_file(state_dir: Path, server_round: int) -> Path:
    return state_dir / f"round-{server_round:06d}.safetensors"


def _newest_before(state_dir: Path, server_round: int) -> Path | None:
    """Return the last state that this worker stored: of the round before, unless it missed one."""
    limit = _state_file(state_dir, server_round).name
    names = sorted(item.name for item in state_dir.glob("round-*.safetensors"))
    earlier = [name for name in names if name < limit]
    return state_dir / earlier[-1] if earlier else None


def _forget(state_dir: Path, keep: set[int]) -> None:
    kept = {_state_file(state_dir, server_round).name for server_round in keep}
    for stored in state_dir.glob("round-*.safetensors"):
        if stored.name not in kept:
            stored.unlink(missing_ok=True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
