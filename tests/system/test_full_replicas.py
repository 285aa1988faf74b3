"""Every outer mode with full overlap, against its definition on full replicas."""

from __future__ import annotations

import pytest
import torch
from federated import (
    OUTER,
    Federate,
    Weights,
    assert_identical,
    failures,
    fragment_part,
)
from stock import stock, stock_adamw, stock_loss
from torch import nn

from fomoe_flwr.config import Settings
from fomoe_flwr.federation import client
from fomoe_flwr.parameters.fragments import MOMENTS
from fomoe_flwr.worker.optimizer import learning_rate

pytestmark = pytest.mark.usefixtures("made_up_data")


def full_replicas(settings: Settings, initial: Weights) -> Weights:
    """Every outer mode by its definition, on full replicas of stock transformers and torch models.

    A worker goes on from its own weights where a fragment was not synchronised; the server's are
    those of the last synchronisation.
    """
    local, outer = settings.local, settings.outer
    fragments, total = outer.fragments, settings.rounds * local.steps
    workers = range(settings.layout.num_workers)
    globally = {key: value.clone() for key, value in initial.items()}
    models = [stock(settings.model, initial) for _ in workers]
    adams = [stock_adamw(model, local) for model in models]
    texts = [client._node_data(settings, i, "", None).batches(0) for i in workers]  # type: ignore[arg-type]
    pieces = {
        (key, f): nn.Parameter(fragment_part(key, value, f, fragments))
        for key, value in globally.items()
        for f in range(fragments)
        if len(fragment_part(key, value, f, fragments))
    }
    momentum = outer.momentum if outer.name == "nesterov" else 0.0
    steps = {
        place: torch.optim.SGD([piece], lr=outer.lr, momentum=momentum, nesterov=momentum > 0)
        for place, piece in pieces.items()
    }
    turns = dict.fromkeys(range(fragments), 0)
    for server_round in range(settings.rounds):
        for model, adam, text in zip(models, adams, texts, strict=True):
            for step in range(local.steps):
                for group in adam.param_groups:
                    group["lr"] = learning_rate(local, server_round * local.steps + step, total)
                adam.zero_grad()
                windows = text.next_batch()
                loss = stock_loss(model, windows, settings.model, settings.balance.loss)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), local.grad_clip)
                adam.step()
        fragment = server_round % fragments
        turns[fragment] += 1
        replicas = [dict(model.named_parameters()) for model in models]
        with torch.no_grad():
            for (key, f), piece in pieces.items():
                if f != fragment:
                    continue
                copies = [fragment_part(key, own[key], f, fragments) for own in replicas]
                piece.grad = piece - torch.stack(copies).mean(0)
                steps[key, f].step()
                for own in copies:
                    own.copy_(piece)
                due = {
                    "exp_avg": turns[f] % outer.first_moment_every == 0,
                    "exp_avg_sq": turns[f] % outer.second_moment_every == 0,
                }
                for moment in MOMENTS:
                    if outer.name == "local_adamw" or (outer.name == "des_loc" and due[moment]):
                        values = [
                            fragment_part(key, adam.state[own[key]][moment], f, fragments)
                            for adam, own in zip(adams, replicas, strict=True)
                        ]
                        mean = torch.stack(values).mean(0)
                        for value in values:
                            value.copy_(mean)
    return globally


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("outer", OUTER)
def test_with_full_overlap_every_outer_mode_is_its_full_replica_method(
    outer: str, fragments: int, federate: Federate
) -> None:
    federation = federate(
        *OUTER[outer],
        "layout.overlap=3",
        f"outer.fragments={fragments}",
        "rounds=7",
        "local.weight_decay=0.1",
    )
    assert failures(federation) == {}
    expected = full_replicas(federation.settings, federation.initial)
    for key, value in expected.items():
        assert (value - federation.initial[key]).abs().max() > 1e-3, key
        torch.testing.assert_close(
            federation.state[key], value, rtol=0, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("outer", OUTER)
def test_full_overlap_is_the_full_replica_experiment_bit_by_bit(
    outer: str, federate: Federate
) -> None:
    partial = federate("experiment=fomoe", *OUTER[outer], "layout.overlap=3", "layout.kind=random")
    for experiment in ("photon", "diloco"):
        whole = federate(f"experiment={experiment}", *OUTER[outer], "layout.overlap=3")
        assert_identical(whole.state, partial.state)
        assert whole.traffic == partial.traffic


def test_the_outer_modes_differ(federate: Federate) -> None:
    ends = [federate(*words, "rounds=3").state["model.norm.weight"] for words in OUTER.values()]
    assert len({tuple(end.tolist()) for end in ends}) == len(OUTER)
