"""Golden histories: what a micro run did when it was last looked at, in a few numbers.

They say nothing about right or wrong (the equivalence tests do), but that nothing changed unseen:
layout kind x outer step x routing mode, and fragments. After a change that is meant:

    pytest tests/system/test_golden.py --regenerate-golden

and the difference of `tests/golden/` shows what it did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import Federation
from micro import micro
from torch import Tensor

from fomoe_flwr.files import save_text
from fomoe_flwr.layout import Layout

FOLDER = Path(__file__).resolve().parents[1] / "golden"

TOLERANCE = 1e-4
"""Relative. Other processors and versions of torch add up in another order: rounding of 1e-7 of
every number, which six steps of Adam grow less than tenfold (test below). What tells outer steps,
layouts and routing modes apart is 1e-3 and more (test below, too)."""

LAYOUTS = {
    "fixed": ["layout.kind=fixed"],
    "random": ["layout.kind=random"],
    "rolling": ["layout.kind=rolling"],
    "balanced": ["layout.kind=balanced"],
    "weighted": ["layout=weighted", "layout.residents=[6,4,2]"],
    "explicit": ["layout.kind=explicit"],
    "fragments": ["layout.kind=fixed", "outer.fragments=2"],
}
OUTER = {
    "average": ["outer=average"],
    "nesterov": ["outer=nesterov"],
    "local_adamw": ["outer=local_adamw"],
    "des_loc": ["outer=des_loc", "outer.first_moment_every=1", "outer.second_moment_every=2"],
}
ROUTING = ("skip_token", "partitioned")
PARTS = {
    "embed": "embed_tokens",
    "attention": "self_attn",
    "router": ".gate.",
    "expert": ".experts.",
}

BY_HAND = Layout(
    6,
    (
        ((0, 1, 2, 3), (2, 3, 4, 5), (0, 1, 4, 5)),
        ((0, 2, 4), (0, 1, 2, 3, 4, 5), (1, 3, 5)),
    ),
)
"""Unequal holders, unequal layers."""


pytestmark = pytest.mark.usefixtures("made_up_data")


def norm_of(tensors: list[Tensor]) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors)) ** 0.5


def history(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run three rounds; return losses and norms, of weights and of how far they moved."""
    federation = Federation(micro("rounds=3", "balance=recommended", *overrides), folder).run()
    assert not any(snapshot.record.failures for snapshot in federation.rounds)
    found: dict[str, Any] = {"loss": []}
    for snapshot in federation.rounds:
        losses = [reply["loss"] for reply in snapshot.record.replies.values()]
        found["loss"].append(sum(losses) / len(losses))
    for name, part in PARTS.items():
        keys = [key for key in federation.state if part in key]
        assert keys
        found[f"norm/{name}"] = norm_of([federation.state[key] for key in keys])
        moved = [federation.state[key] - federation.initial[key] for key in keys]
        found[f"moved/{name}"] = norm_of(moved)
    return found


def histories(kind: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    words = LAYOUTS[kind]
    if kind == "explicit":
        path = folder / "layout.json"
        path.write_text(json.dumps(BY_HAND.to_json()), encoding="utf-8")
        words = [*words, f"layout.path={path}"]
    for outer, outer_words in OUTER.items():
        for routing in ROUTING:
            name = f"{outer}/{routing}"
            yield name, history(folder / name, *words, *outer_words, f"model.routing={routing}")


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """List what differs by more than the tolerance, for people."""
    found = []
    for name in sorted(got.keys() | want.keys()):
        if name not in got or name not in want:
            found.append(f"{name}: only {'now' if name in got else 'in the golden file'}")
            continue
        for key in sorted(got[name].keys() | want[name].keys()):
            now, then = got[name].get(key), want[name].get(key)
            if now != pytest.approx(then, rel=TOLERANCE):
                found.append(f"{name} {key}: {now}, golden {then}")
    return found


@pytest.mark.parametrize("kind", LAYOUTS)
def test_histories_are_golden(kind: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    found = {
        name: {
            key: [float(f"{x:.8g}") for x in value] if key == "loss" else float(f"{value:.8g}")
            for key, value in each.items()
        }
        for name, each in histories(kind, tmp_path)
    }
    path = FOLDER / f"{kind}.json"
    if pytestconfig.getoption("--regenerate-golden"):
        FOLDER.mkdir(exist_ok=True)
        save_text(json.dumps(found, indent=1) + "\n", path)
        return
    golden = json.loads(path.read_text(encoding="utf-8"))
    changed = differences(found, golden)
    assert not changed, (
        f"{len(changed)} numbers of {path.name} changed; if that is meant, run "
        "`pytest tests/system/test_golden.py --regenerate-golden`:\n" + "\n".join(changed)
    )


@pytest.mark.parametrize("outer", OUTER)
def test_rounding_stays_far_below_the_tolerance(outer: str, tmp_path: Path) -> None:
    words = ["rounds=3", "balance=recommended", *OUTER[outer]]
    exact = Federation(micro(*words), tmp_path / "exact")
    noisy = Federation(micro(*words), tmp_path / "noisy")
    generator = torch.Generator().manual_seed(0)
    for value in noisy.state.values():
        value *= 1 + 1e-6 * torch.randn(value.shape, generator=generator)
    ends = [federation.run().rounds[-1] for federation in (exact, noisy)]
    losses = [sum(reply["loss"] for reply in end.record.replies.values()) for end in ends]
    # Ten times the noise of rounding, and it is below a tenth of the tolerance.
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE / 10)
    for part in PARTS.values():
        moved = [
            norm_of([end.state[k] - exact.initial[k] for k in end.state if part in k])
            for end in ends
        ]
        assert moved[0] == pytest.approx(moved[1], rel=TOLERANCE)


def test_no_two_golden_histories_are_within_the_tolerance() -> None:
    golden = {
        f"{kind}/{name}": each
        for kind in LAYOUTS
        for name, each in json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8")).items()
    }
    assert len(golden) == len(LAYOUTS) * len(OUTER) * len(ROUTING)
    for one, other in combinations(golden, 2):
        first, second = golden[one], golden[other]
        apart = max(abs(first[key] / second[key] - 1) for key in first if key.startswith("moved/"))
        assert apart > 10 * TOLERANCE, (one, other)
