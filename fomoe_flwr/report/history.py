"""The history of a run as its directory tells it, with the series that pictures are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fomoe_flwr import costs
from fomoe_flwr.config import Settings, read_settings
from fomoe_flwr.layout import Layout
from fomoe_flwr.run.directory import RunDirectory

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class History:
    """Everything a run wrote down so far."""

    run: RunDirectory
    settings: Settings
    summary: Mapping[str, Any]
    rounds: list[dict[str, Any]]
    routing: list[dict[str, Any]]
    layouts: dict[int, Layout]
    predicted: Mapping[str, Any]
    """The cost model's answer for these settings."""

    @staticmethod
    def read(run: RunDirectory) -> History:
        """Read a run directory. Raises SettingsError if it has no settings."""
        settings = read_settings(run.config)
        layouts = {int(r): Layout.from_json(v) for r, v in run.read_layouts().items()}
        return History(
            run,
            settings,
            run.read_summary(),
            run.read_metrics(),
            run.read_routing(),
            dict(sorted(layouts.items())),
            costs.summary(settings),
        )

    @property
    def tokens(self) -> list[float]:
        """Million training tokens of all workers at the end of every round."""
        return [row["tokens"] / 1e6 for row in self.rounds]

    @property
    def mebibytes(self) -> list[float]:
        """MiB up and down of all workers at the end of every round."""
        moved = (row["comm/bytes_up"] + row["comm/bytes_down"] for row in self.rounds)
        return [num / 2**20 for num in accumulate(moved)]

    @property
    def minutes(self) -> list[float]:
        """Minutes of all rounds up to the end of each; a pause before a resume does not count."""
        return [s / 60 for s in accumulate(row["round/seconds"] for row in self.rounds)]

    def heldout(self, x: list[float]) -> Points:
        """Return held-out loss against `x`, from the untrained model on."""
        untrained = self.summary.get("eval/loss_untrained")
        start = [(0.0, float(untrained))] if untrained is not None else []
        rows = zip(x, self.rounds, strict=True)
        return start + [(at, row["eval/loss"]) for at, row in rows if "eval/loss" in row]

    def training(self, x: list[float]) -> Points:
        """Return training loss against `x`."""
        return [(at, row["train/loss"]) for at, row in zip(x, self.rounds, strict=True)]
