"""Every family of transformers with the experts interface: equal to stock, or refused by name.

A family that is added to transformers is tested here without a change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import EXPERTS, HIDDEN, VOCABULARY, families, tiny
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fomoe_flwr.config import LocalSettings, ModelSettings, Settings
from fomoe_flwr.errors import InputError
from fomoe_flwr.model.architecture import described_settings
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.families import class_of, transformers_config
from fomoe_flwr.model.pretrained import check_weights, read_pretrained
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import StateSpec, load_state, state_of
from fomoe_flwr.parameters.keys import layer_of
from fomoe_flwr.parameters.shapes import buffer_shapes, parameter_shapes
from fomoe_flwr.worker.optimizer import make_optimizer
from fomoe_flwr.worker.training_model import token_loss

FAMILIES = families()
REFUSED = {
    "zaya": "has no router that can be told",
}
"""Families that are refused, and why."""

NOT_PARTITIONED = {
    "deepseek_v4": "its router has tid2eid, which has no row for each expert",
    "ernie4_5_moe": r"moe_statics\.e_score_correction_bias, which has no row for each expert",
    "gemma4_text": "its router has scale, which has no row for each expert",
    "inkling_text": "its router has weight, which has no row for each expert",
}
"""Families that are refused with `model.routing=partitioned` only."""

LENGTH = 24
"""More than the sliding windows of 8."""


def words(seed: int = 0) -> Tensor:
    return torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@cache
def settings_of(family: str) -> ModelSettings:
    return described_settings(tiny(family))


def config_of(family: str) -> PreTrainedConfig:
    return transformers_config(settings_of(family), LENGTH)


def stock(family: str) -> PreTrainedModel:
    """Build transformers' own model, with its loop over the experts."""
    config = config_of(family)
    torch.manual_seed(3)
    made = class_of(config)._from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, value in made.named_parameters():
            # Some begin at zero; a difference would not show.
            if not bool(value.any()):
                value.normal_(std=HIDDEN**-0.5)
            if "experts" in name and "shared" not in name and value.dim() == 3:
                value.mul_(5)
        for value in made.buffers():
            if value.dtype == torch.long and value.dim() == 2:  # the experts of each word
                rows = torch.arange(len(value))[:, None] + torch.arange(value.shape[1])
                value.copy_(rows % EXPERTS)
    return made


def ours(
    family: str, weights: dict[str, Tensor], residents: Residents | None = None, **changes: str
) -> PreTrainedModel:
    shape = replace(settings_of(family), **changes)
    made = build_model(shape, config_of(family), residents)
    load_state(made, cut(made, weights, residents))
    return made


def cut(
    model: PreTrainedModel, weights: dict[str, Tensor], residents: Residents | None
) -> dict[str, Tensor]:
    """Take the rows of the residents where a model has no others."""
    row_of = {block.layer: row for row, block in enumerate(moe_blocks(model))}
    held = {}
    for key, own in state_of(model).items():
        if key in weights and residents is not None and own.shape != weights[key].shape:
            held[key] = weights[key][list(residents[row_of[layer_of(key)]])]
        elif key in weights:
            held[key] = weights[key]
    return held


def half(family: str) -> Residents:
    """Return other residents in every sparse layer."""
    rows = len(list(moe_blocks(stock(family))))
    return tuple(tuple(range(row % 2, EXPERTS, 2)) for row in range(rows))


@contextmanager
def ghosts_skipped(model: nn.Module, residents: Residents) -> Iterator[None]:
    """Take what chosen ghosts would add out of the stock model's loop."""

    def skip(held: tuple[int, ...]) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, chosen, weight = inputs
            is_held = torch.isin(chosen, torch.tensor(held))
            return x, chosen, weight * is_held

        return hook

    handles = [
        block.experts.register_forward_pre_hook(skip(tuple(held)))
        for block, held in zip(moe_blocks(model), residents, strict=True)
    ]
    yield
    for handle in handles:
        handle.remove()


def outcome(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and gradients of a loss that depends on all of them."""
    model.eval()  # phimoe draws at random when it trains
    logits = model(input_ids=words(), use_cache=False).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * probe).sum().backward()
    return logits.detach(), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    scale = float(want.abs().max()) + 1e-6
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-3, msg=lambda m: what + m)


def known(family: str) -> None:
    """End the test of a family that is refused, for the reason that is written down."""
    if family in REFUSED:
        with pytest.raises(InputError, match=REFUSED[family]) as refusal:
            settings_of(family)
        pytest.skip(f"refused: {refusal.value}")


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_residents_a_model_is_the_stock_model(family: str) -> None:
    known(family)
    reference = stock(family)
    logits, gradients = outcome(reference)
    got, own = outcome(ours(family, state_of(reference)))
    assert_close(got, logits, "logits")
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert_close(own[key], gradient, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_ghosts_add_nothing(family: str) -> None:
    known(family)
    reference, residents = stock(family), half(family)
    weights = state_of(reference)
    with ghosts_skipped(reference, residents):
        logits, gradients = outcome(reference)
    model = ours(family, weights, residents)
    got, own = outcome(model)
    assert_close(got, logits, "logits")
    for key, gradient in cut(model, gradients, residents).items():
        if key in own:
            assert_close(own[key], gradient, key)
    apart = (logits - outcome(ours(family, weights))[0]).abs().max()
    assert apart > 1e-3 * logits.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_that_is_prepared_has_the_stock_loss(family: str) -> None:
    known(family)
    reference = stock(family).eval()
    model = ours(family, state_of(reference)).eval()
    Execution(experts="fused").prepare(model)
    want = token_loss(reference, words())
    for chunked in (False, True):
        loss = token_loss(model, words(), chunked=chunked)
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_half_of_the_experts_trains(family: str, routing: str) -> None:
    known(family)
    reference, residents = stock(family), half(family)
    if routing == "partitioned" and family in NOT_PARTITIONED:
        with pytest.raises(InputError, match=NOT_PARTITIONED[family]) as refusal:
            ours(family, state_of(reference), residents, routing=routing)
        pytest.skip(f"refused: {refusal.value}")
    model = ours(family, state_of(reference), residents, routing=routing).train()
    optimizer = make_optimizer(model, LocalSettings(lr=1e-3))
    losses = []
    for _ in range(3):
        loss = token_loss(model, words())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_in_the_settings_are_the_stock_class_s(family: str) -> None:
    known(family)
    shape, state = settings_of(family), state_of(stock(family))
    spec = StateSpec.of(shape, config_of(family))
    assert parameter_shapes(shape) | buffer_shapes(shape) == {
        k: tuple(v.shape) for k, v in state.items()
    }
    assert {e.key for e in (*spec.shared, *spec.expert)} == state.keys()
    assert spec.num_layers == len(list(moe_blocks(stock(family))))
    Settings(model=shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the names and in the form that a released checkpoint of the family has."""
    known(family)
    reference, residents = stock(family), half(family)
    weights = {key: value.float() for key, value in state_of(reference).items()}
    reference.save_pretrained(tmp_path)
    shape = settings_of(family)
    config = config_of(family)
    capsys.readouterr()
    check_weights(replace(shape, pretrained=str(tmp_path)))
    assert "warning: " not in capsys.readouterr().err
    got = read_pretrained(tmp_path, shape, StateSpec.of(shape, config))
    assert got.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(got[key], value), key
    model = build_model(shape, config, residents, empty=True)
    part = read_pretrained(tmp_path, shape, StateSpec.of(shape, config), residents)
    for key, value in cut(model, weights, residents).items():
        assert torch.equal(part[key], value), key


def test_most_families_pass() -> None:
    assert len(FAMILIES) - len(REFUSED) >= 48 or len(FAMILIES) < 50
