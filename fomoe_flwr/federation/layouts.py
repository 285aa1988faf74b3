"""The layouts of a run: who holds which experts in each round, given who is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from logging import INFO, WARNING

from flwr.common.logger import log

from fomoe_flwr.config import Settings
from fomoe_flwr.costs import expert_room
from fomoe_flwr.federation.pace import steps_between
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.round_state import RoundState
from fomoe_flwr.layout import Layout, Rehomed, check_layout, draw_layout, settle
from fomoe_flwr.parameters.shapes import num_sparse_layers


class Layouts:
    """Chooses the layout of every round.

    Parameters
    ----------
    settings
        The run's settings.
    state
        What earlier rounds left behind. The room in `state.context` is updated here.
    capacity_gib
        Memory in GiB that each worker's node reported last, with `layout.capacity_reported`.
    """

    def __init__(
        self, settings: Settings, state: RoundState, capacity_gib: Mapping[int, float]
    ) -> None:
        self.settings = settings
        self.state = state
        self.capacity_gib = capacity_gib

    def expected(self, server_round: int) -> Layout:
        """Return the layout of the next round if exactly the expected workers take part.

        It depends on the settings, the seed and the round, and on who was there before. Some kinds
        of layout also depend on what was measured.
        """
        return self._settle(server_round, self.state.attendance.expected()).layout

    def learn_room(self) -> None:
        """Learn how many experts fit into each worker, if nodes report it and none has yet."""
        layout, model = self.settings.layout, self.settings.model
        if not layout.capacity_reported or self.state.context.room:
            return
        gib = [self.capacity_gib[worker] for worker in range(layout.num_workers)]
        context = replace(self.state.context, room=expert_room(self.settings, gib))
        check_layout(layout, num_sparse_layers(model), model.num_experts, context)
        self.state.context = context
        log(INFO, "workers report %s GiB, room for %s experts of a layer", gib, context.room)

    def open_round(self, server_round: int, played: Collection[int]) -> RoundRecord:
        """Choose a round's layout and begin its record; `played` are the workers with a node."""
        self._refresh_room(played)
        present = self.state.attendance.present(server_round, played)
        rehomed = self._settle(server_round, present)
        layout, before = rehomed.layout, self.state.context.previous
        absent = tuple(w for w in range(layout.num_workers) if w not in present)
        if rehomed.moved:
            log(
                INFO,
                "round %s: %s experts re-homed (lower bound %s, no room for %s), workers away: %s",
                server_round,
                rehomed.moved,
                rehomed.lower_bound,
                rehomed.short,
                list(absent),
            )
        return RoundRecord(
            server_round,
            layout,
            played=frozenset(played),
            sent=frozenset(present).intersection(played),
            absent=absent,
            moved_experts=0 if before is None else layout.moved_from(before),
            rehomed=rehomed,
            steps={worker: self._steps(server_round, worker) for worker in played},
        )

    def _steps(self, server_round: int, worker: int) -> int:
        own = self.state.steps_at(self.settings, worker)
        return own or steps_between(self.settings, server_round)

    def _settle(self, server_round: int, present: Collection[int]) -> Rehomed:
        """Draw for all workers, then give the experts of absent workers to present ones."""
        settings = self.settings.layout
        drawn = self._draw(server_round)
        is_full = server_round <= settings.warm_rounds
        try:
            overlap = settings.num_workers if is_full else None
            return settle(drawn, present, settings, self.state.context, overlap)
        except ValueError as error:
            # The server keeps the values of their experts until a worker can train them again.
            log(WARNING, "round %s: experts of absent workers wait: %s", server_round, error)
            return Rehomed(drawn, moved=0, lower_bound=0, short=0)

    def _draw(self, server_round: int) -> Layout:
        settings, model = self.settings, self.settings.model
        shape = num_sparse_layers(model), model.num_experts
        if server_round <= settings.layout.warm_rounds:
            return Layout.full(*shape, settings.layout.num_workers)
        context = self.state.context
        if server_round == settings.layout.warm_rounds + 1:
            # The rounds before had full replicas: there is no earlier layout to stay close to.
            context = replace(context, previous=None)
        return draw_layout(settings.layout, *shape, settings.seed, server_round, context)

    def _refresh_room(self, played: Collection[int]) -> None:
        """Learn the room of workers that come back: another node may play them now."""
        context, away = self.state.context, self.state.attendance.missed
        back = [worker for worker in played if worker in away]
        if not self.settings.layout.capacity_reported or not back:
            return
        room = list(context.room)
        for worker in back:
            (room[worker],) = expert_room(self.settings, [self.capacity_gib[worker]])
        self.state.context = replace(context, room=tuple(room))
