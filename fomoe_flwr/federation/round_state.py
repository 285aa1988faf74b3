"""The state between two rounds: what the next one depends on besides weights and outer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fomoe_flwr.config import LayoutSettings, Settings
from fomoe_flwr.costs import layout_context
from fomoe_flwr.federation.attendance import Attendance
from fomoe_flwr.federation.pace import speeds_of, steps_at
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.layout import LayoutContext


@dataclass
class RoundState:
    """What the next round depends on. A checkpoint stores what `to_json` returns."""

    context: LayoutContext
    """What the next layout depends on."""
    attendance: Attendance
    current: set[int] = field(default_factory=set)
    """Workers whose reply counted in the round before. Their disks hold the weights of then."""
    load: Tensor | None = None
    """[num_layers, num_experts] assignments of the round before, of all workers."""
    speeds: dict[int, float] = field(default_factory=dict)
    """Steps per second of every worker in its last reply."""

    @classmethod
    def at_start(cls, settings: Settings) -> RoundState:
        """Return the state before the first round."""
        layout = settings.layout
        attendance = Attendance(layout.num_workers, layout.rehome_after)
        return cls(layout_context(settings), attendance)

    def steps_at(self, settings: Settings, worker: int) -> int:
        """Return the steps that a round gives a worker of its own; 0 where all take the same."""
        return steps_at(settings, worker, self.speeds) if settings.local.round_seconds else 0

    def note(self, settings: Settings, record: RoundRecord) -> None:
        """Note what a round leaves behind; to be called after its outer step."""
        self.speeds |= speeds_of(settings, record.replies)
        self.current = set(record.replies)
        self.attendance.note(record.server_round, record.played, record.sent, record.replies)
        self.load = record.load
        self.context = self.context.after(
            settings.layout, record.server_round, record.layout, record.load.tolist()
        )

    def pooled_share(self) -> list[list[float]] | None:
        """Return [num_layers][num_experts] shares of assignments; None before the first round."""
        if self.load is None:
            return None
        total = self.load.sum(1, keepdim=True).clamp(min=1)
        shares: list[list[float]] = (self.load.double() / total).tolist()
        return shares

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dictionaries."""
        return {
            "current_workers": sorted(self.current),
            "load": None if self.load is None else self.load.tolist(),
            "layout_context": self.context.to_json(),
            "attendance": self.attendance.to_json(),
            "speeds": {str(worker): speed for worker, speed in sorted(self.speeds.items())},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], settings: LayoutSettings) -> RoundState:
        """Read what `to_json` wrote."""
        load = None if data["load"] is None else torch.tensor(data["load"])
        context = LayoutContext.from_json(data["layout_context"])
        attendance = Attendance.from_json(
            data["attendance"], settings.num_workers, settings.rehome_after
        )
        speeds = {int(worker): float(speed) for worker, speed in data.get("speeds", {}).items()}
        return cls(context, attendance, set(data["current_workers"]), load, speeds)
