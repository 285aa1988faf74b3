"""Who is held out: a function of a document's own content, whatever else there is."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data.corpus import read_splits
from fomoe_flwr.data.holdout import (
    HELDOUT_SPLITS,
    MANY_PIECES,
    SPLITS,
    Split,
    TooFewTextsError,
    assign_sides,
)

Groups = list[list[str]]
FIND = re.compile(r"Sentence \d+ says")


def sides(
    groups: Groups, fraction: float = 0.02, missing: tuple[Split, ...] = HELDOUT_SPLITS
) -> dict[str, str]:
    """Return {text: split}; a text has one."""
    found = assign_sides(groups, missing, fraction)
    pairs = {
        (text, split)
        for group, splits in zip(groups, found.splits, strict=True)
        for text, split in zip(group, splits, strict=True)
    }
    assert len(dict(pairs)) == len(pairs), "one text, two sides"
    return dict(pairs)


def drawn(draw: random.Random) -> list[str]:
    """Return a row, a short file or a long one; some texts come often."""
    size = draw.choice([1, 1, 1, 3, MANY_PIECES, 60])
    return [f"text {draw.randrange(800)}" for _ in range(size)]


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("seed", range(20))
def test_more_documents_never_move_one_that_is_held_out_into_training(
    seed: int, fraction: float
) -> None:
    draw = random.Random(seed)
    # From one long file on nothing is topped up, so the rule holds without exception.
    groups: Groups = [[f"text {n}" for n in range(2 * MANY_PIECES)]]
    before = sides(groups, fraction)
    assert {"test", "validation", "train"} == set(before.values())
    for _ in range(25):
        groups.insert(draw.randrange(len(groups) + 1), drawn(draw))
        found = assign_sides(groups, HELDOUT_SPLITS, fraction)
        assert not found.topped_up
        after = sides(groups, fraction)
        moved = {t for t, side in before.items() if side != "train" and after[t] == "train"}
        assert not moved
        before = after


@pytest.mark.parametrize("seed", range(20))
def test_rows_keep_their_split_whatever_else_there_is(seed: int) -> None:
    draw = random.Random(seed)
    rows = [f"row {number}" for number in draw.sample(range(10**6), 600)]
    few = [[row] for row in rows[:300]]
    assert not assign_sides(few, HELDOUT_SPLITS, 0.05).topped_up
    many = sides([[row] for row in draw.sample(rows, len(rows))], 0.05)
    assert sides(few, 0.05).items() <= many.items()


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.49])
@pytest.mark.parametrize("count", [3, 4, 5, 10, 16, 40])
@pytest.mark.parametrize("is_one_file", [False, True])
def test_few_texts_give_every_split(count: int, fraction: float, is_one_file: bool) -> None:
    texts = [f"some text {n}" for n in range(count)]
    groups = [texts] if is_one_file else [[text] for text in texts]
    assert {"train", "validation", "test"} == set(sides(groups, fraction).values())
    assert {"train", "test"} == set(sides(groups, fraction, ("test",)).values())


def test_a_split_that_no_text_chose_is_named() -> None:
    rows = [[f"row {n}"] for n in range(10)]
    assert assign_sides(rows, HELDOUT_SPLITS, 1e-6).topped_up == ("test", "validation")


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "b"], ["a", "b", " a\n"]])
def test_fewer_texts_than_splits_are_refused(texts: list[str]) -> None:
    with pytest.raises(TooFewTextsError):
        assign_sides([[text] for text in texts], HELDOUT_SPLITS, 0.02)


def test_texts_that_differ_in_white_space_alone_lie_on_one_side() -> None:
    rows = [[f"row {n}\nand more"] for n in range(100)]
    found = assign_sides(rows + [[f" row {n}\r\nand  more\n"] for n in range(100)], ("test",), 0.2)
    assert found.splits[:100] == found.splits[100:]


def test_a_share_is_held_out() -> None:
    found = list(sides([[f"row {n}"] for n in range(20_000)], 0.02).values())
    assert all(0.017 < found.count(split) / len(found) < 0.023 for split in HELDOUT_SPLITS)


def test_files_that_are_added_never_move_held_out_text_into_training(tmp_path: Path) -> None:
    def sentences(first: int, count: int) -> list[str]:
        return [f"Sentence {n} says one thing that no other does." for n in range(first, count)]

    def held_out() -> set[str]:
        parts, topped_up = read_splits(DataSettings(path=str(tmp_path)))
        found = {s: {d for each in parts[s] for d in FIND.findall(each.text)} for s in SPLITS}
        assert not topped_up
        assert not found["train"] & (found["test"] | found["validation"])
        return found["test"] | found["validation"]

    (tmp_path / "m.txt").write_text("\n".join(sentences(0, 2000)))
    before = held_out()
    assert before
    added = {
        "a.txt": "\n".join(sentences(2000, 9000)),
        "copy.txt": "\n".join(sentences(0, 2000)),
        "short.txt": "Sentence 9001",
        "z.jsonl": "\n".join(json.dumps({"text": text}) for text in sentences(9002, 9900)),
    }
    for name, text in added.items():
        (tmp_path / name).write_text(text)
        after = held_out()
        assert before <= after
        before = after
