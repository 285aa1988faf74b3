"""Every family in training mode: nothing is drawn at random, and any precision does a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registry import VOCABULARY, families, tiny
from torch import Tensor
from transformers import PreTrainedModel

from fomoe_flwr.config import LocalSettings
from fomoe_flwr.errors import InputError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import cast_parameters
from fomoe_flwr.parallel.torch_team import TorchTeam
from fomoe_flwr.worker.optimizer import make_optimizer
from fomoe_flwr.worker.training_model import token_loss

FAMILIES = [family for family in families() if family != "zaya"]
NOISE = {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "attention_dropout": 0.3}


def words() -> Tensor:
    return torch.randint(5, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


def trained(family: str, **entries: Any) -> PreTrainedModel:
    config = tiny(family)
    for name, value in entries.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return build_model(
        described_settings(config), transformers_config(described_settings(config), 24), seed=0
    ).train()


@pytest.mark.parametrize("entries", [{}, NOISE], ids=["as_it_is", "with_noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_drawn_at_random(family: str, entries: dict[str, float]) -> None:
    model = trained(family, **entries)
    before = torch.random.get_rng_state()
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses.append(token_loss(model, words()))
        losses[-1].backward()
    torch.random.set_rng_state(before)
    assert torch.equal(*losses)


def test_the_router_of_phimoe_learns() -> None:
    model = trained("phimoe")
    token_loss(model, words()).backward()
    routers = {k: p.grad for k, p in model.named_parameters() if k.endswith("router.weight")}
    assert len(routers) == 4
    assert any(bool(gradient.any()) for gradient in routers.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bfloat16_parameters(family: str) -> None:
    model = trained(family)
    want = float(token_loss(model, words()))
    cast_parameters(model, "bfloat16_parameters")
    loss = token_loss(model, words(), "bfloat16_parameters")
    loss.backward()
    make_optimizer(model, LocalSettings(lr=1e-3, precision="bfloat16_parameters")).step()
    assert float(loss) == pytest.approx(want, rel=0.05)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_weights_of_two_types_are_not_split() -> None:
    model = trained("inkling2_text")
    cast_parameters(model, "bfloat16_parameters")
    team = TorchTeam.__new__(TorchTeam)
    team.name = "fsdp"
    with pytest.raises(InputError, match=r"local\.parallel=fsdp must be ddp or none"):
        team.arrange(model)
