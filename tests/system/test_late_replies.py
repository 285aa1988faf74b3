"""Replies that come after their round: folded into the one in which they come, or dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federated import Federate, Federation, assert_identical, failures
from micro import micro
from torch import Tensor

from fomoe_flwr.config import SettingsError
from fomoe_flwr.federation import client

pytestmark = pytest.mark.usefixtures("made_up_data")

USED = ["outer=average", "outer.late_replies=use", "outer.staleness_decay=0.25"]
WORDS = ["layout.num_workers=3", "layout.overlap=2", "rounds=5", "local.steps=2"]
Sent = dict[tuple[int, int], tuple[dict[str, Tensor], float, Any]]


def watched(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Note what every worker sends: pieces by key, tokens, residents."""
    inner, sent = client.run_round, Sent()

    def note(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        pieces = task.split(task.spec, (result.shared, result.experts))
        kept = {key: value.clone() for key, value in pieces.items()}
        sent[task.server_round, task.worker] = kept, result.report.tokens, task.residents
        return result

    monkeypatch.setattr(client, "run_round", note)
    return sent


@pytest.mark.parametrize("layout", ["fixed", "random"])
@pytest.mark.parametrize("late", [1, 2])
def test_a_late_reply_is_one_more_holder_with_less_weight(
    layout: str, late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = watched(monkeypatch)
    script = [f"federation.late_script=[[2,1,{late}]]", f"layout.kind={layout}"]
    script += ["layout.reshuffle_every=1"] if layout == "random" else []
    federation = Federation(micro(*USED, *WORDS, *script), tmp_path).run()
    comes = 2 + late
    assert [s.record.used_late for s in federation.rounds] == [
        [(1, late, sent[2, 1][1])] if s.record.server_round == comes else []
        for s in federation.rounds
    ]
    # It is at its task of round 2 until then.
    assert (2, 1) in sent
    assert not [r for r in range(3, comes + 1) if (r, 1) in sent]
    assert (comes + 1, 1) in sent
    before = federation.initial
    for snapshot in federation.rounds:
        now = snapshot.record.server_round
        replies = {(r, w): (1.0, *sent[r, w]) for r, w in sent if r == now and (r, w) != (2, 1)}
        if now == comes:
            replies[2, 1] = (0.25**late, *sent[2, 1])
        for entry in (*federation.spec.shared, *federation.spec.expert):
            if not before[entry.key].is_floating_point():
                continue
            want = expected(before[entry.key], entry.layer, entry.key, list(replies.values()))
            torch.testing.assert_close(snapshot.state[entry.key], want, rtol=0, atol=1e-5)
        before = snapshot.state


def expected(before: Tensor, layer: int | None, key: str, replies: list[Any]) -> Tensor:
    """Average by definition, row by row for experts."""
    if layer is None:
        total = sum(share * tokens for share, _, tokens, _ in replies)
        step = sum(share * tokens / total * pieces[key] for share, pieces, tokens, _ in replies)
        return before - step
    result = before.clone()
    for expert in range(len(before)):
        held = [
            (share * tokens, pieces[key][list(residents[layer]).index(expert)])
            for share, pieces, tokens, residents in replies
            if expert in residents[layer]
        ]
        if total := sum(weight for weight, _ in held):
            result[expert] -= sum(weight / total * piece for weight, piece in held)
    return result


def test_a_script_gives_the_same_run_twice(federate: Federate) -> None:
    script = "federation.late_script=[[1,0,2],[2,2,1],[4,1,1]]"
    one, other = (federate("outer=nesterov", *USED[1:], *WORDS, script) for _ in range(2))
    assert_identical(one.state, other.state)
    assert_identical(one.outer.tensors(), other.outer.tensors())
    assert {r: sorted(who) for r, who in failures(one).items()} == {
        1: [0],
        2: [0, 2],
        3: [0, 2],
        4: [1],
        5: [1],
    }


def test_dropped_ones_are_counted_and_change_nothing(federate: Federate) -> None:
    script = "federation.late_script=[[2,1,1]]"
    dropped = federate("outer=average", *WORDS, script)
    used = federate(*USED, *WORDS, script)
    assert [s.record.used_late for s in dropped.rounds] == [[]] * 5
    assert sum(s.record.late_replies for s in dropped.rounds) == 1
    assert_identical(dropped.rounds[1].state, used.rounds[1].state)
    key = "model.embed_tokens.weight"
    assert not torch.equal(dropped.rounds[2].state[key], used.rounds[2].state[key])
    rows = [s.record.metrics_row() for s in used.rounds]
    assert rows[2]["round/late_used"] == [[1, 1]]
    assert rows[2]["train/tokens"] == rows[0]["train/tokens"]
    plain = [s.record.metrics_row()["train/tokens"] for s in dropped.rounds]
    assert plain[2] == 2 * rows[0]["train/tokens"] // 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outer=local_adamw"], "outer.late_replies=use needs outer.name to be average or"),
        (["outer.fragments=2"], "needs outer.fragments to be 1 (got 2)"),
        (["outer.robust=median", "outer.weighting=uniform"], "needs outer.robust to be none"),
        (["privacy.clip_norm=1", "outer.weighting=uniform"], "needs privacy.clip_norm to be 0"),
        (["outer.staleness_decay=0"], "outer.staleness_decay=0"),
        (["outer.staleness_decay=1.5"], "outer.staleness_decay=1.5"),
        (["outer.late_replies=maybe"], "outer.late_replies=maybe"),
        (["federation.late_script=[[1,0]]"], "federation.late_script=[[1, 0]]"),
        (["federation.late_script=[[1,9,1]]"], "federation.late_script=[[1, 9, 1]]"),
        (["federation.late_script=[[1,0,0]]"], "federation.late_script=[[1, 0, 0]]"),
        (["federation.late_script=[3]"], "federation.late_script=[3]"),
        (["federation.late_script=[[1,0,true]]"], "federation.late_script=[[1, 0, True]]"),
    ],
)
def test_what_has_no_place_for_them_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        micro("outer=average", "outer.late_replies=use", *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
