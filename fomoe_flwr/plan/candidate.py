"""One choice of sites, overlap and local steps: whether it fits, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fomoe_flwr.codecs.sizes import CodecPair
from fomoe_flwr.config import Settings
from fomoe_flwr.costs import (
    RoundSeconds,
    num_buffers,
    parameter_counts,
    star_seconds,
    state_bytes,
    state_factor,
    token_flops,
)
from fomoe_flwr.parameters.shapes import num_sparse_layers
from fomoe_flwr.plan.sites import NamedSite


@dataclass(frozen=True)
class Unfit:
    """Why a choice is impossible."""

    reason: str


@dataclass(frozen=True)
class Candidate:
    """A choice that fits: worker i is played by `sites[i]`."""

    sites: tuple[NamedSite, ...]
    overlap: int
    local_steps: int
    residents: tuple[int, ...]
    """Experts of a layer that each worker holds."""
    batch_size: int
    accumulate: int
    round: RoundSeconds
    rounds: int
    memory_bytes: tuple[float, ...]
    """Training state of each worker."""
    bytes_per_round: float
    """Up and down, over all workers."""

    @property
    def seconds(self) -> float:
        """Time to the token budget."""
        return self.rounds * self.round.total

    @property
    def is_even(self) -> bool:
        """Whether all workers hold the same number of experts."""
        return len(set(self.residents)) == 1


@dataclass(frozen=True)
class Work:
    """What every worker does in a round."""

    local_steps: int
    step_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of a round on one worker."""
        return self.local_steps * self.step_tokens


class Model:
    """The sizes that a plan needs, worked out once: they depend on the model, not on sites."""

    def __init__(self, settings: Settings, headroom: float) -> None:
        self.settings = settings
        self.headroom = headroom
        counts = parameter_counts(settings.model)
        self.shared = counts.shared
        self.per_expert = counts.per_expert_per_layer * num_sparse_layers(settings.model)
        """Parameters that one resident of every layer adds."""
        self.buffers = num_buffers(settings.model)
        self.state_bytes = state_bytes(settings)
        length = settings.data.sequence_length
        self.idle_flops = token_flops(settings.model, length, 0).train
        self.expert_flops = token_flops(settings.model, length, 1).train - self.idle_flops
        self.states = state_factor(settings.outer)

    def room(self, site: NamedSite) -> int:
        """Return how many experts of each layer a site can hold beside what is shared."""
        free = (1 - self.headroom) * site.memory_bytes - self.state_bytes * self.shared
        most = math.floor(free / (self.state_bytes * self.per_expert))
        return max(0, min(self.settings.model.num_experts, most))

    def memory(self, residents: int) -> float:
        """Return the training state of a worker with so many residents in each layer."""
        return self.state_bytes * (self.shared + residents * self.per_expert)

    def token_flops(self, residents: int) -> float:
        """Return training FLOPs of a token on such a worker, at uniform routing."""
        model = self.settings.model
        executed = float(min(model.top_k, residents))
        if model.routing == "skip_token":
            executed = model.top_k * residents / model.num_experts
        return self.idle_flops + executed * self.expert_flops

    def round_bytes(self, residents: int, codecs: CodecPair) -> float:
        """Return the bytes that such a worker receives, or returns, in one round.

        A codec's blocks are not rounded up to whole ones here, as they are on the wire.
        """
        shared = self.states * self.shared + self.buffers
        experts = self.states * residents * self.per_expert
        return (
            shared * codecs.shared.bytes_per_element + experts * codecs.experts.bytes_per_element
        ) / self.settings.outer.fragments

    def down_bytes(self, residents: int) -> float:
        """Return the bytes that such a worker receives in one round."""
        return self.round_bytes(residents, self.settings.wire.codecs_down)

    def up_bytes(self, residents: int) -> float:
        """Return the bytes that such a worker returns in one round."""
        return self.round_bytes(residents, self.settings.wire.codecs_up)

    def compute_seconds(self, site: NamedSite, residents: int, work: Work) -> float:
        """Return how long a site trains in a round."""
        flops = work.step_tokens * self.token_flops(residents)
        return work.local_steps * site.site.step_seconds(flops, self.memory(residents))

    def site_seconds(self, site: NamedSite, residents: int, work: Work) -> float:
        """Return how long a site alone takes for a round."""
        down, up = [self.down_bytes(residents)], [self.up_bytes(residents)]
        compute = [self.compute_seconds(site, residents, work)]
        return star_seconds([site.site], down, up, compute).total


def fit(
    model: Model,
    sites: Sequence[NamedSite],
    overlap: int,
    local_steps: int,
    batch: int,
    tokens: float,
    server_bits_per_second: float = math.inf,
) -> Candidate | Unfit:
    """Place the experts so that the round ends soonest, within every site's memory.

    `batch` is the sequences of one step over all workers, `tokens` the budget. Experts are given
    out one by one, each to the site that it delays least, so a slow site gets fewer than a fast
    one. No site's round gets shorter with more experts, so this makes the longest round as short as
    can be.
    """
    settings, num_experts = model.settings, model.settings.model.num_experts
    rooms = [model.room(site) for site in sites]
    for site, room in zip(sites, rooms, strict=True):
        if not room:
            return Unfit(
                f"{site.name} has {site.memory_bytes / 2**30:.4g} GiB, the shared parameters and "
                f"one expert of each layer take {_needed(model, 1) / 2**30:.4g} GiB with headroom"
            )
    needed = num_experts * overlap
    if needed < len(sites):
        return Unfit(f"{needed} expert places a layer are too few for {len(sites)} workers")
    if sum(rooms) < needed:
        return Unfit(
            f"the sites have room for {sum(rooms)} experts of a layer together, "
            f"{num_experts} experts on {overlap} holders need {needed}"
        )
    micro, accumulate = _split_batch(settings.local.batch_size, math.ceil(batch / len(sites)))
    work = Work(local_steps, micro * accumulate * settings.data.sequence_length)
    residents = _place(model, sites, rooms, needed, work)
    down = [model.down_bytes(held) for held in residents]
    up = [model.up_bytes(held) for held in residents]
    seconds = star_seconds(
        [each.site for each in sites],
        down,
        up,
        [model.compute_seconds(s, h, work) for s, h in zip(sites, residents, strict=True)],
        server_bits_per_second,
        settings.costs.hidden_share,
    )
    return Candidate(
        sites=tuple(sites),
        overlap=overlap,
        local_steps=local_steps,
        residents=tuple(residents),
        batch_size=micro,
        accumulate=accumulate,
        round=seconds,
        rounds=max(1, math.ceil(tokens / (work.tokens * len(sites)))),
        memory_bytes=tuple(model.memory(held) for held in residents),
        bytes_per_round=sum(down) + sum(up),
    )


def _place(
    model: Model, sites: Sequence[NamedSite], rooms: Sequence[int], needed: int, work: Work
) -> list[int]:
    even, left = divmod(needed, len(sites))
    is_alike = len({(site.memory_bytes, site.site) for site in sites}) == 1
    if is_alike and not left:
        return [even] * len(sites)
    held = [1] * len(sites)
    ends = [model.site_seconds(site, 2, work) for site in sites]
    for _ in range(needed - len(sites)):
        open_to = [worker for worker in range(len(sites)) if held[worker] < rooms[worker]]
        worker = min(open_to, key=lambda each: ends[each])
        held[worker] += 1
        ends[worker] = model.site_seconds(sites[worker], held[worker] + 1, work)
    # Where an even layout takes no longer, it is the better one: experts see as much data.
    longest = max(model.site_seconds(s, h, work) for s, h in zip(sites, held, strict=True))
    if not left and all(even <= room for room in rooms):
        evenly = max(model.site_seconds(site, even, work) for site in sites)
        if evenly <= 1.01 * longest:
            return [even] * len(sites)
    return held


def _split_batch(micro: int, sequences: int) -> tuple[int, int]:
    """Part a worker's sequences of a step into equal micro-batches, none above the given one."""
    accumulate = math.ceil(sequences / micro)
    return math.ceil(sequences / accumulate), accumulate


def _needed(model: Model, residents: int) -> float:
    return model.memory(residents) / (1 - model.headroom)
