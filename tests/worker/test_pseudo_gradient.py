"""The pseudo-gradient: one subtraction, whatever lies where."""

from __future__ import annotations

import pytest
import torch
from micro import micro_model
from torch import Tensor

from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.worker.pseudo_gradient import difference, pack

SHAPE = micro_model()
RESIDENTS = ((0, 2, 5), (1,))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def state(seed: int) -> dict[str, Tensor]:
    model = build_model(SHAPE, transformers_config(SHAPE, 8), RESIDENTS, seed=seed)
    return {key: value.clone() for key, value in state_of(model).items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fragment", [-1, 0, 1])
def test_the_difference_is_received_minus_trained(
    device: str, dtype: torch.dtype, fragment: int
) -> None:
    spec = StateSpec.of(SHAPE, transformers_config(SHAPE, 8)).fragment(fragment, 2)
    received = state(1)
    trained = {key: value.to(device, dtype) for key, value in state(2).items()}
    rounded = {key: value.to(dtype).float() for key, value in received.items()}
    by_hand = {key: rounded[key] - trained[key].float().cpu() for key in received}
    want = pack(spec, by_hand)
    got = difference(spec, received, trained, RESIDENTS)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert all(torch.equal(received[key], value) for key, value in state(1).items())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_packed_from_anywhere(device: str) -> None:
    spec = StateSpec.of(SHAPE, transformers_config(SHAPE, 8))
    whole = build_model(SHAPE, transformers_config(SHAPE, 8), seed=1)
    full = {key: value.clone() for key, value in state_of(whole).items()}
    want = torch.cat([full[e.key][list(RESIDENTS[e.layer or 0])].flatten() for e in spec.expert])
    for dtype in (torch.float32, torch.float64):
        there = {key: value.to(device, dtype) for key, value in full.items()}
        assert torch.equal(spec.pack_experts(there, RESIDENTS), want)
