"""One comparison of a prediction with a measurement, and the table of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from measurement import markdown


@dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    case: str
    """Overrides; those of `BASE` are called base, those of `PAIR` pair."""
    predicted: float
    measured: float
    unit: str
    tolerance: float
    """Largest relative difference; 0 means none at all."""

    @property
    def difference(self) -> float:
        """Relative to what was measured."""
        if self.measured == self.predicted:
            return 0.0
        return (self.predicted - self.measured) / self.measured if self.measured else float("inf")

    @property
    def is_within(self) -> bool:
        """Whether the difference is no larger than allowed."""
        return abs(self.difference) <= self.tolerance


def table(rows: Sequence[Row]) -> str:
    """Write rows as Markdown; bytes only as a sum, for they differ nowhere or the run failed."""
    shown = [row for row in rows if row.what != "bytes" or not row.is_within]
    lines: list[Sequence[object]] = []
    exact = [row for row in rows if row.what == "bytes"]
    if exact:
        cases = len({row.case.rpartition(", round")[0] for row in exact})
        lines.append(
            (
                "bytes",
                f"{cases} federations, {len(exact)} sums of a round",
                f"{sum(row.predicted for row in exact):,.0f} B",
                f"{sum(row.measured for row in exact):,.0f} B",
                f"{sum(row.predicted != row.measured for row in exact)} differ",
                "",
            )
        )
    for row in shown:
        number = ",.0f" if row.unit == "B" else ".4g"
        lines.append(
            (
                row.what,
                f"`{row.case}`",
                f"{row.predicted:{number}} {row.unit}",
                f"{row.measured:{number}} {row.unit}",
                f"{row.difference:+.1%}",
                "" if row.is_within else "outside",
            )
        )
    return markdown(("what", "case", "predicted", "measured", "difference", ""), lines)
