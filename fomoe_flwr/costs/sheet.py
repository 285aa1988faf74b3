"""Lines of a cost sheet: a number, and the formula that it came from with its numbers put in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Number = float | int


@dataclass(frozen=True)
class Line:
    """One result: its value, and how it follows from `terms`.

    `formula` is an arithmetic expression over the names of `terms`, empty for what is simply given.
    """

    key: str
    value: Number | str
    formula: str = ""
    terms: Mapping[str, Number] = field(default_factory=dict)
    unit: str = ""

    @property
    def substituted(self) -> str:
        """Return the formula with the numbers in the places of their names."""
        return re.sub(
            r"\b[a-z_]\w*", lambda found: _term(found[0], self.terms, found[0]), self.formula
        )


def show(lines: list[Line], explain: bool = False) -> str:
    """Write a sheet for people; `explain` adds each formula, and the numbers put in."""
    rows = []
    for line in lines:
        rows.append(f"{line.key:<32}{shown(line.value):>22} {line.unit}".rstrip())
        if explain and line.formula:
            rows += [f"    = {line.formula}", f"    = {line.substituted}"]
    return "\n".join(rows)


def shown(value: Number | str) -> str:
    """Write a number: whole ones in full, others to five digits."""
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.5g}" if abs(value) < 1e6 else f"{value:.5g}"


def quotient(theirs: float, ours: float) -> float:
    """Return how many times ours theirs is; both are 0 where a ring's only worker sends nothing."""
    if ours:
        return theirs / ours
    return math.inf if theirs else 1.0


def _term(name: str, terms: Mapping[str, Number], otherwise: str) -> str:
    return shown(terms[name]) if name in terms else otherwise
