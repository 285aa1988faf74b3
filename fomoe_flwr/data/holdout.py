"""The side of a document: training, validation or test, by its own content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
HELDOUT_SPLITS: tuple[Split, ...] = ("test", "validation")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# A file of so many pieces gives every split at least one.
MANY_PIECES = 16


@dataclass(frozen=True)
class Sides:
    """The split of every text, by group and place in it."""

    splits: list[list[Split]]
    topped_up: tuple[Split, ...]
    """Splits that no text chose by itself, so that one had to be taken: it depends on the rest."""


class TooFewTextsError(ValueError):
    """Fewer different texts than splits; `args` are both numbers."""


def assign_sides(
    groups: Sequence[Sequence[str]], missing: Sequence[Split], fraction: float
) -> Sides:
    """Choose a split for every text of every group: a row, a short file, the pieces of a long one.

    A text lies at a place in 0..1, the hash of its words. Places below `fraction` are test, those
    up to twice as far are validation, the others train. A group of `MANY_PIECES` has a text in
    each held-out split: its lowest, if it has none. So every group chooses by itself, and a text
    that any group holds out is held out everywhere: further groups never move it into training.
    A split that is still empty takes the lowest text of the split that has most.
    Only the `missing` splits are cut out. Raises TooFewTextsError.
    """
    places = [[_place(text) for text in group] for group in groups]
    sides: dict[float, Split] = {place: "train" for group in places for place in group}
    for held in ("validation", "test"):  # The later wins where groups differ.
        for group in places:
            sides.update(dict.fromkeys(_choices(group, missing, fraction).get(held, ()), held))
    wanted: tuple[Split, ...] = ("train", *missing)
    if len(sides) < len(wanted):
        raise TooFewTextsError(len(sides), len(wanted))
    topped_up = []
    for split in (*missing, "train"):
        if split not in sides.values():
            topped_up.append(split)
            having = list(sides.values())
            donor = max(wanted, key=having.count)
            sides[min(place for place, side in sides.items() if side == donor)] = split
    splits = [[sides[place] for place in group] for group in places]
    return Sides(splits, tuple(topped_up))


def _choices(
    group: Sequence[float], missing: Sequence[Split], fraction: float
) -> dict[str, set[float]]:
    """Return what a group holds out by itself."""
    chosen: dict[str, set[float]] = {}
    for number, held in enumerate(HELDOUT_SPLITS):
        if held in missing:
            free = set(group).difference(*chosen.values())
            own = {p for p in free if number * fraction <= p < (number + 1) * fraction}
            if not own and len(set(group)) >= MANY_PIECES:
                own = {min(free)}
            chosen[held] = own
    return chosen


def _place(text: str) -> float:
    """Return a hash of the words in 0..1, so that line ends and blanks make no difference."""
    digest = hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).digest()
    # 48 bits: exact in a float, and never 1.0.
    return int.from_bytes(digest[:6], "big") / 2**48
