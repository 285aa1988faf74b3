"""What a step keeps for backward, predicted and as autograd keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fomoe_flwr.config import ExecutionSettings, ModelSettings, Settings, load_settings
from fomoe_flwr.costs import memory_bytes, parameter_counts, summary
from fomoe_flwr.costs.activations import (
    Step,
    activation_bytes,
    kept_bytes,
    peak_bytes,
    received_bytes,
    step_of,
)
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.families import FAMILIES, transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.worker.training_model import token_loss

SHAPE = ModelSettings(
    num_layers=3,
    hidden_size=128,
    expert_size=64,
    num_experts=16,
    top_k=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=500,
)
BATCH, SEQUENCE = 4, 64


def kept_by_autograd(model: ModelSettings, held: int, checkpointed: bool) -> tuple[int, float]:
    """Return the bytes of storages that a forward pass saves, and the resident share."""
    residents = (tuple(range(held)),) * model.num_layers
    built = build_model(model, transformers_config(model, SEQUENCE), residents, seed=0).train()
    execution = ExecutionSettings(loss="whole", checkpoint_activations=checkpointed)
    settings = Settings(model=model, execution=execution)
    Execution.choose(settings, torch.device("cpu")).prepare(built)
    probe = RouterProbe(built, model.num_experts, residents)
    own = {t.untyped_storage().data_ptr() for t in (*built.parameters(), *built.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    windows = torch.randint(0, model.vocab_size, (BATCH, SEQUENCE + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_loss(built, windows)
    assert loss.requires_grad
    size = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    return size, 1.0 - probe.counts.ghost_fraction


@pytest.mark.parametrize("held", [16, 8, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_what_is_predicted(
    family: str, held: int, of_family: Callable[[ModelSettings, str], ModelSettings]
) -> None:
    model = of_family(SHAPE, family)
    found, share = kept_by_autograd(model, held, checkpointed=False)
    step = Step(BATCH, SEQUENCE, resident_share=share, flash_attention=family != "deepseek_v3")
    logits = 4 * BATCH * SEQUENCE * model.vocab_size
    assert kept_bytes(model, step) + logits == pytest.approx(found, rel=0.02)


def test_checkpointed_layers_keep_their_inputs() -> None:
    found, _ = kept_by_autograd(SHAPE, 16, checkpointed=True)
    step = Step(BATCH, SEQUENCE, checkpointed=True)
    logits = 4 * BATCH * SEQUENCE * SHAPE.vocab_size
    assert kept_bytes(SHAPE, step) + logits == pytest.approx(found, rel=0.02)


PLAIN = Step(BATCH, SEQUENCE)
HELD = parameter_counts(SHAPE).total


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_peak_is_never_below_the_state_with_all_gradients(optimizer: str) -> None:
    for step in (PLAIN, replace(PLAIN, batch_size=1, sequence_length=8)):
        peak = peak_bytes(SHAPE, optimizer, HELD, step)
        on_top = activation_bytes(SHAPE, optimizer, HELD, step)
        assert peak == memory_bytes(HELD, optimizer) + on_top
        assert on_top > 0


def test_what_makes_a_step_smaller_makes_its_peak_smaller() -> None:
    step, model = Step(16, 512), replace(SHAPE, vocab_size=8000)
    held = parameter_counts(model).total
    peak = peak_bytes(model, "adamw", held, step)
    for smaller in (
        replace(step, batch_size=8),
        replace(step, sequence_length=256),
        replace(step, resident_share=0.5),
        replace(step, chunk_bytes=2**16),
        replace(step, checkpointed=True),
    ):
        assert peak_bytes(model, "adamw", held, smaller) < peak, smaller
    half = replace(step, precision="bfloat16")
    assert 0.5 < kept_bytes(SHAPE, half) / kept_bytes(SHAPE, step) < 1
    assert peak_bytes(model, "adamw", held, replace(step, accumulates=True)) == peak + 4 * held


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("loss", ["auto", "whole", "chunked"])
@pytest.mark.parametrize("compiled", ["auto", "on", "off"])
def test_the_predicted_step_is_the_one_that_is_executed(
    device: str, loss: str, compiled: str
) -> None:
    settings = load_settings(
        ["preset=demo", f"execution.loss={loss}", f"execution.compile={compiled}"]
    )
    step = step_of(settings, 0.5, device)
    execution = Execution.choose(settings, torch.device(device))
    assert (step.chunk_bytes > 0) == execution.chunked_loss
    assert step.compiled == execution.compiled


def test_the_cost_sheet_names_the_largest_workers_peak() -> None:
    words = ["preset=tiny", "layout.kind=weighted", "layout.num_workers=3", "local.device=cpu"]
    words += ["layout.overlap=1", "layout.residents=[4,3,1]", "model.num_experts=8"]
    settings = load_settings(words)
    sheet = summary(settings)
    held = sheet["params/resident"]
    assert isinstance(held, int)
    step = step_of(settings, 0.5, "cpu")
    peak = peak_bytes(settings.model, "adamw", held, step) + received_bytes(held, "cpu")
    assert sheet["memory/worker_peak_bytes"] == peak
    assert "memory/worker_peak_bytes" not in summary(
        load_settings([*words, "costs.bytes_per_parameter=12"])
    )
