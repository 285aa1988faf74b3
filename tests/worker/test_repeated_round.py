"""One worker's round, done again, from a stream, or in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from local_rounds import ALL, LOCAL, RING, Given, initial, local_rounds, settings_of
from micro import SEQUENCE

from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.worker.round import RoundTask, run_round


def test_a_repeated_round_gives_the_same_reply(tmp_path: Path) -> None:
    settings = settings_of()
    spec = StateSpec.of(settings.model, transformers_config(settings.model, SEQUENCE))
    state = initial(settings.model)
    for server_round in (1, 2):
        results = [
            next(local_rounds(settings, spec, state, RING, server_round, tmp_path))
            for _ in range(2)
        ]
        assert torch.equal(results[0].shared, results[1].shared)
        assert torch.equal(results[0].experts, results[1].experts)
        assert results[0].inner_state_fresh == (server_round == 1)


@pytest.mark.parametrize("keep_inner_state", [True, False])
def test_a_stream_that_always_opens_at_its_beginning_goes_on_at_its_cursor(
    keep_inner_state: bool, tmp_path: Path
) -> None:
    settings = settings_of()
    settings.local = replace(LOCAL, keep_inner_state=keep_inner_state)
    spec = StateSpec.of(settings.model, transformers_config(settings.model, SEQUENCE))
    state = initial(settings.model)
    replies = {}
    for kind in ("indexed", "stream"):
        for server_round in (1, 2):
            task = RoundTask(
                settings=settings,
                spec=spec,
                worker=0,
                server_round=server_round,
                residents=ALL,
                shared=spec.pack_shared(state),
                experts=spec.pack_experts(state),
                state_dir=tmp_path / kind,
                keep_rounds=[],
            )
            replies[kind, server_round] = run_round(
                task, lambda position, kind=kind: Given(0, position if kind == "indexed" else 0)
            ).shared
    for server_round in (1, 2):
        assert torch.equal(replies["stream", server_round], replies["indexed", server_round])


@pytest.mark.parametrize("lr", [1e-12, 0.05])
def test_bfloat16_parameters_do_not_send_the_rounding_of_what_they_received(
    lr: float, tmp_path: Path
) -> None:
    settings = settings_of(rounds=1)
    settings.local = replace(settings.local, precision="bfloat16_parameters", lr=lr)
    spec = StateSpec.of(settings.model, transformers_config(settings.model, SEQUENCE))
    state = initial(settings.model)
    rounded = {key: value.bfloat16().float() for key, value in state.items()}
    assert any(not torch.equal(rounded[key], value) for key, value in state.items())
    (result,) = local_rounds(settings, spec, state, [ALL], 1, tmp_path / "exact")
    (other,) = local_rounds(settings, spec, rounded, [ALL], 1, tmp_path / "rounded")
    assert torch.equal(result.shared, other.shared)
    assert torch.equal(result.experts, other.experts)
    assert bool(result.experts.any()) == (lr > 1e-3)
