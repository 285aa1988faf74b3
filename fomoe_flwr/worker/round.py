"""One worker's round: build the residents, train K steps, return the pseudo-gradient.

No Flower here: `client_app` unpacks a message into a `RoundTask` and packs the `RoundResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from fomoe_flwr.codecs.vectors import seed_of
from fomoe_flwr.config import Settings
from fomoe_flwr.config.execution import is_heap_held
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.router_probe import RouterProbe, chosen_experts
from fomoe_flwr.model.shards import Wholes
from fomoe_flwr.model.state import State, StateSpec, load_state, overlay, state_of
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.parameters.fragments import fragment_of_round, moments_of_round
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.error_feedback import ErrorFeedback, Vectors
from fomoe_flwr.worker.heap import held_heap
from fomoe_flwr.worker.inner_state import InnerState, stored_weights
from fomoe_flwr.worker.training import LocalReport, make_optimizer, train

_INNER, _FEEDBACK = "round", "feedback"
"""What names of files on a worker's disk begin with."""


class LostStateError(RunError):
    """A worker that no longer has the weights it was left with; it must be sent all of them."""


@dataclass(frozen=True)
class RoundTask:
    """Everything a worker needs for one round."""

    settings: Settings
    spec: StateSpec
    worker: int
    server_round: int
    residents: Residents
    shared: Tensor
    experts: Tensor
    state_dir: Path
    """This worker's own folder on this run."""
    keep_rounds: Sequence[int] = ()
    """Rounds whose inner state a resume may still ask for."""
    part: StateSpec | None = None
    """What `shared` and `experts` carry; None means everything, else the rest is on the disk."""
    moments: Mapping[str, Vectors] = field(default_factory=dict)
    """Averaged moments of the same part's parameters."""
    pooled_share: Tensor | None = None
    """[num_layers, num_experts] shares of assignments of all workers in the round before."""
    probe: Tensor | None = None
    """[windows, tokens] ids for which the trained model's choices are wanted."""

    def seed(self, vector: str) -> int:
        """Return the seed of what is rounded by chance in a vector that this worker sends."""
        return seed_of(self.settings.seed, self.server_round, self.worker, vector)


@dataclass(frozen=True)
class RoundResult:
    """What a worker returns: the fragment's pseudo-gradient, and moments as they are.

    Where a codec is lossy the pseudo-gradient has in it what was left of earlier ones.
    """

    shared: Tensor
    experts: Tensor
    moments: Mapping[str, Vectors]
    report: LocalReport
    inner_state_fresh: bool
    num_fresh_experts: int
    choices: Tensor | None = None
    """[num_layers, tokens, top_k] experts that the probe's tokens chose before averaging."""


def run_round(
    task: RoundTask, open_batches: Callable[[int], Batches], team: Team = ALONE
) -> RoundResult:
    """Train one round and return the pseudo-gradient, received minus trained weights.

    The inner state is read from `state_dir` (the newest before this round) and written there under
    this round's number, so that a repeated round starts from the same place. All processes of a
    team call this with the same task; the result of the first one counts, those of the others have
    no vectors.
    """
    settings, local = task.settings, task.settings.local
    device = pick_device(local.device)
    received, current = _starting_weights(task)
    lent = CACHE.model(settings, task.residents, device, team)
    heap = held_heap(is_heap_held(settings.execution, device.type))
    with heap, _threads(local.threads // team.size), lent as model:
        load_state(model, current)
        del current
        optimizer = make_optimizer(model, local)
        inner, batches = _resume(task, model, optimizer, open_batches)
        report = _train(task, model, optimizer, inner, batches, team)
        choices = _choices(task, model, team)
        inner.cursor = batches.state()
        trained = Wholes(state_of(model))
        _save(task, inner, optimizer, received, trained, team)
        fragment = fragment_of_round(settings.outer, task.server_round)
        part = task.spec.fragment(fragment, settings.outer.fragments)
        pack = _packed if team.is_first else _gathered
        moments = {
            name: pack(part.parameters(), inner.moments(optimizer, name))
            for name in moments_of_round(settings.outer, task.server_round)
        }
        # Two thirds of the training state, and from here on nobody asks for it.
        optimizer.state.clear()
        if team.is_first:
            difference = _difference(part, received, trained, task.residents)
            shared, experts = _corrected(task, part, *difference)
        else:
            shared, experts = _gathered(part, trained)
        return RoundResult(
            shared=shared,
            experts=experts,
            moments=moments,
            report=report,
            inner_state_fresh=inner.is_fresh,
            num_fresh_experts=inner.num_fresh_experts,
            choices=choices,
        )


def _resume(
    task: RoundTask,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    open_batches: Callable[[int], Batches],
) -> tuple[InnerState, Batches]:
    """Take up optimizer and text where the worker's last round left them."""
    local = task.settings.local
    first_step = (task.server_round - 1) * local.steps
    inner = InnerState(model, local, task.settings.model.routing_mode, task.residents)
    batches = open_batches(first_step * local.accumulate)
    if stored := _newest_before(task.state_dir, task.server_round):
        inner.restore(optimizer, stored)
    if task.moments:
        _adopt_moments(task, inner, optimizer, first_step)
    if inner.cursor:
        batches.restore(inner.cursor)
    return inner, batches


def _train(
    task: RoundTask,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    inner: InnerState,
    batches: Batches,
    team: Team,
) -> LocalReport:
    settings, local = task.settings, task.settings.local
    device = pick_device(local.device)
    execution = Execution.choose(settings.execution, device, settings.model.vocab_size)
    probe = RouterProbe(
        model,
        settings.model.num_experts,
        task.residents,
        pooled_share=task.pooled_share,
        compiled=execution.compiled,
    )
    report = train(
        model,
        probe,
        optimizer,
        inner,
        batches,
        local,
        balance=settings.balance,
        first_step=(task.server_round - 1) * local.steps,
        total_steps=settings.rounds * local.steps,
        device=device,
        execution=execution,
        team=team,
    )
    probe.close()
    return report


def _choices(task: RoundTask, model: PreTrainedModel, team: Team) -> Tensor | None:
    if task.probe is None:
        return None
    shape, batch_size = task.settings.model, task.settings.local.batch_size
    with torch.no_grad():
        return team.run(
            chosen_experts,
            model,
            task.probe,
            shape.num_experts,
            shape.top_k,
            task.residents,
            batch_size,
        )


def _save(
    task: RoundTask,
    inner: InnerState,
    optimizer: torch.optim.Optimizer,
    received: State,
    trained: State,
    team: Team,
) -> None:
    """Write down what the worker's next round starts from; forget what none will ask for."""
    keep: dict[str, Tensor] = {}
    if task.settings.outer.fragments > 1:
        keep = {f"received/{key}": value for key, value in received.items()}
        for key, value in trained.items():
            if team.is_first:
                keep[f"trained/{key}"] = value.cpu()
    path = _state_file(task.state_dir, task.server_round)
    inner.save(optimizer, path, keep, is_writer=team.is_first)
    if team.is_first:
        _forget(task.state_dir, {*task.keep_rounds, task.server_round, task.server_round - 1})


def _gathered(part: StateSpec, state: State) -> Vectors:
    """Take part in gathering what the first process packs; keep nothing of it."""
    for entry in (*part.shared, *part.expert):
        state[entry.key]
    return torch.empty(0), torch.empty(0)


def _packed(part: StateSpec, state: State) -> Vectors:
    return part.pack_shared(state), part.pack_experts(state)


def _difference(part: StateSpec, received: State, trained: State, residents: Residents) -> Vectors:
    """Return received minus trained weights, without packing the trained ones too."""
    shared, experts = _packed(part, received)
    pieces = part.split_shared(shared) | part.split_experts(experts, residents)
    for entry in (*part.shared, *part.expert):
        piece, mine = pieces[entry.key], entry.of(trained)
        if mine.dtype != piece.dtype:
            # What was received was rounded before training began; that is no step of training.
            piece.copy_(piece.to(mine.dtype))
        piece -= mine.to("cpu", piece.dtype)
    return shared, experts


def _corrected(task: RoundTask, part: StateSpec, shared: Tensor, experts: Tensor) -> Vectors:
    """Add what codecs left behind of earlier pseudo-gradients, and write down what is left now."""
    feedback = ErrorFeedback(task.settings.wire, task.spec, task.residents)
    if before := _newest_before(task.state_dir, task.server_round, _FEEDBACK):
        feedback.restore(before)
    shared, experts = feedback.correct(part, shared, experts, task.seed)
    feedback.save(_state_file(task.state_dir, task.server_round, _FEEDBACK))
    return shared, experts


def _starting_weights(task: RoundTask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the global weights as last received, and the weights to start from.

    They differ where a fragment was not synchronised: there the worker goes on from its own.
    """
    part = task.part or task.spec
    pieces = part.split_shared(task.shared) | part.split_experts(task.experts, task.residents)
    if task.part is None:
        return pieces, pieces
    try:
        kept = stored_weights(_state_file(task.state_dir, task.server_round - 1))
    except (OSError, SafetensorError) as error:
        raise LostStateError(
            f"worker {task.worker} has no weights of round {task.server_round - 1}"
        ) from error
    received, current = (
        {key.removeprefix(kind): value for key, value in kept.items() if key.startswith(kind)}
        for kind in ("received/", "trained/")
    )
    overlay(received, part, pieces)
    overlay(current, part, pieces)
    return received, current


def _adopt_moments(
    task: RoundTask, inner: InnerState, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    part = (task.part or task.spec).parameters()
    moments = {
        name: part.split_shared(shared) | part.split_experts(experts, task.residents)
        for name, (shared, experts) in task.moments.items()
    }
    inner.adopt(optimizer, moments, part, steps)


def pick_device(name: str) -> torch.device:
    """Resolve `auto` to the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _state_file(state_dir: Path, server_round: int, kind: str = _INNER) -> Path:
    return state_dir / f"{kind}-{server_round:06d}.safetensors"


def _newest_before(state_dir: Path, server_round: int, kind: str = _INNER) -> Path | None:
    """Return the last state that this worker stored: of the round before, unless it missed one."""
    limit = _state_file(state_dir, server_round, kind).name
    names = sorted(item.name for item in state_dir.glob(f"{kind}-*.safetensors"))
    earlier = [name for name in names if name < limit]
    return state_dir / earlier[-1] if earlier else None


def _forget(state_dir: Path, keep: set[int]) -> None:
    for kind in (_INNER, _FEEDBACK):
        kept = {_state_file(state_dir, server_round, kind).name for server_round in keep}
        for stored in state_dir.glob(f"{kind}-*.safetensors"):
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
