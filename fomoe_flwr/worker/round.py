"""One worker's round: adopt the global weights, train K steps, report what changed.

No Flower here: the client unpacks a message into a `RoundTask` and packs the `RoundResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fomoe_flwr.codecs.vectors import seed_of
from fomoe_flwr.config import Settings
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.device_copy import copy, has_room, pin_host_memory
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.parameters.fragments import (
    fragment_of_round,
    moments_of_round,
    snapshot_step,
    sync_step,
)
from fomoe_flwr.worker.delay import has_taken, take_delayed_steps
from fomoe_flwr.worker.device import pick_device
from fomoe_flwr.worker.error_feedback import ErrorFeedback, Vectors
from fomoe_flwr.worker.merging import merge, merged
from fomoe_flwr.worker.pseudo_gradient import difference, gather, pack
from fomoe_flwr.worker.state_files import (
    AHEAD,
    FEEDBACK,
    kept_weights,
    named_weights,
    residents_in,
    state_file,
)
from fomoe_flwr.worker.state_store import STATES
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer
from fomoe_flwr.worker.workplace import lent_trainer


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
    continues: bool = False
    """Whether this worker's reply of the round before counted."""
    steps: int = 0
    """Steps to take; 0 means those that the settings give all workers."""

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
        """Steps of the run that lie before the synchronisation point that the task comes from."""
        return sync_step(self.settings, self.server_round - 1)

    @property
    def num_steps(self) -> int:
        """Steps from there to what the worker returns."""
        return self.steps or snapshot_step(self.settings, self.server_round) - self.first_step

    @property
    def merges(self) -> bool:
        """Whether the worker keeps something of its own weights of the round before."""
        outer = self.settings.outer
        is_one = self.continues and outer.fragments == 1 and outer.merge_alpha > 0
        return self.fragment >= 0 or is_one

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
    seconds_before: float = 0.0
    """Of the report's seconds, those that had passed before the task came."""


def run_round(
    task: RoundTask, open_batches: Callable[[int], Batches], team: Team = ALONE
) -> RoundResult:
    """Train one round and return the pseudo-gradient, received minus trained weights.

    The inner state is read from `state_dir` (the newest before this round) and written there under
    this round's number, so that a repeated round starts from the same place. All processes of a
    team call this with the same task. The result of the first one counts; those of the others have
    no vectors.
    """
    device = pick_device(task.settings.local.device)
    if device.type == "cuda" and STATES.is_in_memory:
        pin_host_memory()
    was_ahead = has_taken(_ahead(task))
    before = None
    if task.continues:
        folder, last = task.state_dir, task.server_round - 1
        before = take_delayed_steps(task.settings, folder, last, open_batches, team)
    received, current = starting_weights(task)
    with lent_trainer(
        task.settings, task.residents, open_batches, team, task.first_step, task.pooled_share
    ) as trainer:
        received, current = _travelled(received, current, device)
        with closing(trainer):
            trainer.adopt(current)
            del current
            _resume(task, trainer)
            # A worker of its own pace passes through the schedule as the others do.
            span = (task.settings.local.steps,) if task.steps else ()
            report = trainer.train(task.num_steps, *span).after(before)
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
            seconds_before=before.seconds if before and was_ahead else 0.0,
        )


def starting_weights(task: RoundTask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the global weights as last received, and the weights to start from.

    They differ where a fragment was not synchronised, and there the worker goes on from its own,
    and where it keeps a share of its own (`outer.merge_alpha`). Raises LostStateError if its own
    are not on the disk and the task cannot do without.
    """
    pieces = task.split(task.carried, (task.shared, task.experts))
    if not task.merges:
        return pieces, pieces
    own_share = task.settings.outer.merge_alpha
    try:
        with STATES.open(_newest(task)) as stored:
            held, (received, current) = residents_in(stored), kept_weights(stored)
            if task.fragment < 0:
                mixed = merged(current, held, task.spec, pieces, task.residents, own_share)
                return pieces, mixed
            # Copies, since the server's pieces are laid over them.
            received = {key: value.clone() for key, value in received.items()}
            current = {key: value.clone() for key, value in current.items()}
    except (OSError, SafetensorError, KeyError) as error:
        if task.fragment < 0:  # All that it needs has come.
            return pieces, pieces
        raise LostStateError(
            f"worker {task.worker} has no weights of round {task.server_round - 1}"
        ) from error
    merge(received, task.carried, pieces, 0.0)
    merge(current, task.carried, pieces, own_share)
    return received, current


def _newest(task: RoundTask) -> Path:
    """Return where the state is that the worker has reached since its reply of the round before."""
    if task.continues and has_taken(_ahead(task)):
        return _ahead(task)
    return state_file(task.state_dir, task.server_round - 1)


def _ahead(task: RoundTask) -> Path:
    return state_file(task.state_dir, task.server_round - 1, AHEAD)


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
    stored = STATES.newest_before(task.state_dir, task.server_round)
    if stored:
        # What a delay led to is newer than any state of a round.
        trainer.restore(_newest(task) if has_taken(_ahead(task)) else stored)
    if task.moments:
        part = task.carried.parameters()
        moments = {name: task.split(part, vectors) for name, vectors in task.moments.items()}
        trainer.adopt_moments(moments, part)


def _save(task: RoundTask, trainer: LocalTrainer, received: State) -> None:
    """Write down what the worker's next round starts from; forget what none will ask for."""
    outer, keep = task.settings.outer, dict[str, Tensor]()
    if outer.fragments > 1 or outer.delay_steps or outer.merge_alpha:
        # All that one fragment alone needs of the global weights comes with the next task.
        known = received if outer.fragments > 1 else {}
        keep = named_weights(known, trainer.copied_weights())
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
