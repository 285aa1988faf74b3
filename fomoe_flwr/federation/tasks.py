"""Tasks: what the server sends at the beginning of a round. Every worker gets its own slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flwr.app import Array, Message, MessageType, RecordDict
from torch import Tensor

from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.codecs.vectors import seed_of
from fomoe_flwr.config import Settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.round_state import RoundState
from fomoe_flwr.federation.seats import RunIdentity
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.layout import Layout
from fomoe_flwr.model.state import State, StateSpec
from fomoe_flwr.parameters.fragments import fragment_of_round, moments_of_round


class TaskWriter:
    """Writes the tasks of a run from the global weights and the outer state."""

    def __init__(
        self,
        settings: Settings,
        spec: StateSpec,
        state: State,
        outer: OuterStep,
        identity: RunIdentity,
        probe: Tensor | None,
    ) -> None:
        self.settings = settings
        self.spec = spec
        self.state = state
        self.outer = outer
        self.identity = identity
        self.probe = probe

    def write(
        self,
        server_round: int,
        layout: Layout,
        nodes: Mapping[int, int],
        round_state: RoundState,
        keep_rounds: Sequence[int],
    ) -> Iterator[Message]:
        """Yield one message for each worker in `nodes` (worker -> node), in worker order.

        Each message is made when it is asked for. A caller that drops it before asking for the
        next one holds the shared part and the experts of one worker, never of two. `keep_rounds`
        are the rounds whose inner state workers must keep.
        """
        # Workers that get the same part share one encoded vector, so it is uploaded once.
        shared: dict[tuple[int, str], Array] = {}
        for worker in sorted(nodes):
            content = self._content(worker, server_round, layout, round_state, keep_rounds, shared)
            ttl = self.settings.federation.round_timeout_seconds
            messages = [Message(content, nodes[worker], MessageType.TRAIN, ttl=ttl)]
            del content
            yield messages.pop()  # which is nobody's but the caller's

    def _content(
        self,
        worker: int,
        server_round: int,
        layout: Layout,
        round_state: RoundState,
        keep_rounds: Sequence[int],
        shared: dict[tuple[int, str], Array],
    ) -> RecordDict:
        """Write one task; encode the shared vectors that `shared` does not have yet."""
        down, residents = self.settings.wire.codecs_down, layout.of_worker(worker)
        fragment = self._fragment_for(worker, server_round, layout, round_state)
        carried = self._moments_for(fragment, server_round)
        header = TaskHeader(
            settings=self.settings.to_dict(),
            spec_digest=self.spec.digest(),
            tokenizer_digest=self.identity.tokenizer_digest,
            run_key=self.identity.key,
            worker=worker,
            server_round=server_round,
            layout_digest=layout.digest(),
            residents=residents,
            keep_rounds=keep_rounds,
            fragment=fragment,
            moments=list(carried),
            pooled_share=(
                round_state.pooled_share() if self.settings.balance.form == "global" else None
            ),
            probe=[] if self.probe is None else self.probe.tolist(),
            continues=server_round > 1 and worker in round_state.current,
            steps=round_state.steps_at(self.settings, worker),
        )
        content = RecordDict({wire.TASK: header.record()})
        part = self.spec.fragment(fragment, self.settings.outer.fragments)
        for name, values in {wire.WEIGHTS: self.state, **carried}.items():
            spec = part if name == wire.WEIGHTS else part.parameters()
            if (fragment, name) not in shared:
                seed = seed_of(self.settings.seed, server_round, name)
                packed = spec.pack_shared(values, self.outer.home.scratch)
                shared[fragment, name] = wire.encode(packed, down.shared, seed)
            seed = seed_of(self.settings.seed, server_round, name, worker)
            packed = spec.pack_experts(values, residents, self.outer.home.scratch)
            experts = wire.encode(packed, down.experts, seed)
            content[name] = wire.arrays_of(shared[fragment, name], experts)
        return content

    def _fragment_for(
        self, worker: int, server_round: int, layout: Layout, round_state: RoundState
    ) -> int:
        """Return the fragment that a worker needs, or -1 where it needs its whole slice.

        A worker whose last reply counted needs only the fragment that was synchronised then. Its
        disk has the rest, provided that its residents are the same.
        """
        outer, before = self.settings.outer, round_state.context.previous
        if outer.fragments == 1 or server_round == 1 or worker not in round_state.current:
            return -1
        if before is None or before.of_worker(worker) != layout.of_worker(worker):
            return -1
        return fragment_of_round(outer, server_round - 1)

    def _moments_for(self, fragment: int, server_round: int) -> dict[str, State]:
        """Return the moments that the round before averaged, in the part that this task carries."""
        if server_round == 1:
            return {}
        names = moments_of_round(self.settings.outer, server_round - 1)
        part = self.spec.fragment(fragment, self.settings.outer.fragments)
        wanted = [entry.key for entry in (*part.shared, *part.expert) if entry.is_parameter]
        return {
            name: self.outer.moments[name]
            for name in names
            if all(key in self.outer.moments[name] for key in wanted)
        }
