"""One worker's round: adopt the global weights, train K steps, report what changed.

No Flower here: the client unpacks a message into a `RoundTask` and packs the `RoundResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fomoe_flwr.codecs.vectors import seed_of
from fomoe_flwr.config import Settings
from fomoe_flwr.config.execution import is_heap_held
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.device_copy import copy, has_room, pin_host_memory
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import State, StateSpec, overlay
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.parameters.fragments import fragment_of_round, moments_of_round
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.device import pick_device
from fomoe_flwr.worker.error_feedback import ErrorFeedback, Vectors
from fomoe_flwr.worker.heap import held_heap
from fomoe_flwr.worker.pseudo_gradient import difference, gather, pack
from fomoe_flwr.worker.state_files import (
    FEEDBACK,
    WEIGHTS,
    named_weights,
    received_and_trained,
    state_file,
)
from fomoe_flwr.worker.state_store import STATES
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer


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
    fragment: int = -1
    """The fragment that `shared` and `experts` carry; the rest is on the disk. -1 is everything."""
    moments: Mapping[str, Vectors] = field(default_factory=dict)
    """Averaged moments of the same fragment's parameters."""
    pooled_share: Tensor | None = None
    """[num_layers, num_experts] shares of assignments of all workers in the round before."""
    probe: Tensor | None = None
    """[windows, tokens] ids for which the trained model's choices are wanted."""

    @property
    def carried(self) -> StateSpec:
        """What `shared` and `experts` carry."""
        return self.spec.fragment(self.fragment, self.settings.outer.fragments)

    @property
    def returned(self) -> StateSpec:
        """What the round synchronises, and so what the worker returns."""
        outer = self.settings.outer
        return self.spec.fragment(fragment_of_round(outer, self.server_round), outer.fragments)

    @property
    def first_step(self) -> int:
        """Steps of the run that lie behind."""
        return (self.server_round - 1) * self.settings.local.steps

    def seed(self, vector: str) -> int:
        """Return the seed of what is rounded by chance in a vector that this worker sends."""
        return seed_of(self.settings.seed, self.server_round, self.worker, vector)

    def split(self, part: StateSpec, vectors: Vectors) -> dict[str, Tensor]:
        """View two flat vectors as the keys of a part of this worker's state."""
        shared, experts = vectors
        return part.split_shared(shared) | part.split_experts(experts, self.residents)


@dataclass(frozen=True)
class RoundResult:
    """What a worker returns: the fragment's pseudo-gradient, and moments as they are.

    With a lossy codec the pseudo-gradient contains what was left of earlier ones.
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
    team call this with the same task. The result of the first one counts; those of the others have
    no vectors.
    """
    settings, local = task.settings, task.settings.local
    device = pick_device(local.device)
    if device.type == "cuda" and STATES.is_in_memory:
        pin_host_memory()
    received, current = starting_weights(task)
    heap = held_heap(is_heap_held(settings.execution, device.type))
    lent = CACHE.model(settings, task.residents, device, team)
    with heap, _threads(local.threads // team.size), lent as training:
        trainer = LocalTrainer(
            training,
            settings,
            task.residents,
            open_batches,
            first_step=task.first_step,
            pooled_share=task.pooled_share,
        )
        received, current = _travelled(received, current, device)
        with closing(trainer):
            trainer.adopt(current)
            del current
            _resume(task, trainer)
            report = trainer.train(local.steps)
            choices = None if task.probe is None else trainer.choices(task.probe)
            _save(task, trainer, received)
            moments = _moments(task, trainer)
        shared, experts = _pseudo_gradient(task, trainer, received)
        return RoundResult(
            shared=shared,
            experts=experts,
            moments=moments,
            report=report,
            inner_state_fresh=trainer.inner.is_fresh,
            num_fresh_experts=trainer.inner.num_fresh_experts,
            choices=choices,
        )


def starting_weights(task: RoundTask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the global weights as last received, and the weights to start from.

    They differ where a fragment was not synchronised: there the worker goes on from its own.
    Raises LostStateError if those are not on the disk.
    """
    pieces = task.split(task.carried, (task.shared, task.experts))
    if task.fragment < 0:
        return pieces, pieces
    try:
        with STATES.open(state_file(task.state_dir, task.server_round - 1)) as stored:
            names = [name for name in stored.keys() if name.startswith(WEIGHTS)]  # noqa: SIM118
            # Copies, since the server's pieces are laid over them.
            kept = {n.removeprefix(WEIGHTS): stored.get_tensor(n).clone() for n in names}
    except (OSError, SafetensorError) as error:
        raise LostStateError(
            f"worker {task.worker} has no weights of round {task.server_round - 1}"
        ) from error
    received, current = received_and_trained(kept)
    overlay(received, task.carried, pieces)
    overlay(current, task.carried, pieces)
    return received, current


def _travelled(
    received: dict[str, Tensor], current: dict[str, Tensor], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take what a worker starts from and compares with to a GPU, once, if there is room."""
    size = sum(value.nbytes for value in received.values())
    if device.type != "cuda" or received is not current or not has_room(device, 2 * size):
        return received, current
    there = {key: torch.empty(v.shape, dtype=v.dtype, device=device) for key, v in received.items()}
    for key, value in received.items():
        copy(there[key], value)
    return there, there


def _resume(task: RoundTask, trainer: LocalTrainer) -> None:
    """Take up optimizer and text where the worker's last round left them."""
    if stored := STATES.newest_before(task.state_dir, task.server_round):
        trainer.restore(stored)
    if task.moments:
        part = task.carried.parameters()
        moments = {name: task.split(part, vectors) for name, vectors in task.moments.items()}
        trainer.adopt_moments(moments, part)


def _save(task: RoundTask, trainer: LocalTrainer, received: State) -> None:
    """Write down what the worker's next round starts from; forget what none will ask for."""
    keep: dict[str, Tensor] = {}
    if task.settings.outer.fragments > 1:
        trained: dict[str, Tensor] = {}
        for key, value in trainer.weights.items():  # all processes take part in gathering
            if trainer.team.is_first:
                trained[key] = value.to("cpu", copy=True)
        keep = named_weights(received, trained)
    on_disk = task.settings.has_checkpoint(task.server_round)
    trainer.save(state_file(task.state_dir, task.server_round), keep, on_disk)
    if trainer.team.is_first:
        rounds = {*task.keep_rounds, task.server_round, task.server_round - 1}
        STATES.forget_rounds(task.state_dir, rounds)


def _moments(task: RoundTask, trainer: LocalTrainer) -> dict[str, Vectors]:
    part, collect = task.returned.parameters(), pack if trainer.team.is_first else gather
    names = moments_of_round(task.settings.outer, task.server_round)
    return {name: collect(part, trainer.moments(name)) for name in names}


def _pseudo_gradient(task: RoundTask, trainer: LocalTrainer, received: State) -> Vectors:
    """Return what the worker sends: the difference, with what codecs left behind before."""
    if not trainer.team.is_first:
        return gather(task.returned, trainer.weights)
    vectors = difference(task.returned, received, trainer.weights, task.residents)
    feedback = ErrorFeedback(task.settings.wire, task.spec, task.residents)
    if before := STATES.newest_before(task.state_dir, task.server_round, FEEDBACK):
        feedback.restore(before)
    vectors = feedback.correct(task.returned, *vectors, task.seed)
    on_disk = task.settings.has_checkpoint(task.server_round)
    feedback.save(state_file(task.state_dir, task.server_round, FEEDBACK), on_disk)
    return vectors


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
