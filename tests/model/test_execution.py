"""How a step is computed does not change what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fomoe_flwr.config import (
    BalanceSettings,
    ExecutionSettings,
    LocalSettings,
    ModelSettings,
    Settings,
    load_settings,
)
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import state_of
from fomoe_flwr.worker.trainer import LocalReport, LocalTrainer

FAMILIES = ("olmoe", "qwen3-moe", "mixtral", "deepseek-v3", "glm4-moe", "fomoe")
LOCAL = LocalSettings(steps=3, lr=0.05, warmup_steps=0, schedule="constant", optimizer="sgd")
BALANCE = BalanceSettings(loss=0.05, z_loss=0.001)
RESIDENTS = ((0, 2, 5), (1, 3, 4))


class Given:
    """Batches made of a seed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(5)

    def next_batch(self) -> Tensor:
        return torch.randint(260, (4, 17), generator=self.generator)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        del state


def shape_of(family: str) -> ModelSettings:
    return load_settings(["preset=tiny", f"model={family}-tiny", "model.vocab_size=260"]).model


def trained(
    family: str, execution: Execution | None, local: LocalSettings = LOCAL, device: str = "cpu"
) -> tuple[dict[str, Tensor], LocalReport]:
    shape = replace(shape_of(family), num_experts=6, num_layers=2)
    model = build_model(
        shape, transformers_config(shape, 16), RESIDENTS, seed=3, device=torch.device(device)
    )
    if execution is not None:
        execution.prepare(model)
    trainer = LocalTrainer(
        model,
        Settings(model=shape, local=local, balance=BALANCE, rounds=100),
        RESIDENTS,
        lambda position: Given(torch.device(device)),
        execution=execution or Execution(),
    )
    report = trainer.train(local.steps)
    return {key: value.clone().cpu() for key, value in state_of(model).items()}, report


def assert_same(
    one: tuple[dict[str, Tensor], LocalReport],
    other: tuple[dict[str, Tensor], LocalReport],
    tolerance: float,
) -> None:
    for key, value in one[0].items():
        torch.testing.assert_close(other[0][key], value, rtol=tolerance, atol=tolerance)
    for name in ("loss", "balance_loss", "grad_norm"):
        want = getattr(one[1], name)
        assert getattr(other[1], name) == pytest.approx(want, rel=50 * tolerance), name
    assert other[1].routing.tokens == one[1].routing.tokens == 3 * 4 * 16
    for name in ("load", "ghosts", "all_ghost"):
        assert torch.equal(getattr(other[1].routing, name), getattr(one[1].routing, name)), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "execution",
    [
        Execution(chunked_loss=True),
        Execution(checkpoint_activations=True),
        Execution(experts="autograd"),
        Execution(experts="fused", chunked_loss=True, checkpoint_activations=True),
    ],
    ids=["chunked", "checkpointed", "autograd", "all"],
)
def test_the_result_is_the_same(family: str, execution: Execution) -> None:
    assert_same(trained(family, None), trained(family, execution), 1e-5)


def test_checkpointing_really_runs_layers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fomoe_flwr.model.experts import interface

    calls = []
    original = interface.make_dispatch

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(interface, "make_dispatch", spy)
    trained("olmoe", Execution(), replace(LOCAL, steps=1))
    once = len(calls)
    calls.clear()
    trained("olmoe", Execution(checkpoint_activations=True), replace(LOCAL, steps=1))
    assert (once, len(calls)) == (2, 4)


@pytest.mark.slow
def test_compiling_changes_nothing() -> None:
    assert_same(trained("olmoe", None), trained("olmoe", Execution(compiled=True)), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "execution",
    [
        Execution(experts="fused", chunked_loss=True),
        Execution(experts="static", chunked_loss=True, cuda_graph=True),
        Execution(experts="static", chunked_loss=True, compiled=True, cuda_graph=True),
    ],
    ids=["fused", "graph", "compiled-graph"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_result_is_the_same_on_a_gpu(
    family: str, execution: Execution, accumulate: int
) -> None:
    if accumulate == 2 and family not in ("olmoe", "fomoe"):
        pytest.skip("accumulation knows no families")
    # In fp32 grouped_mm waits for the device, so a graph cannot capture it.
    precision = "bfloat16" if execution.cuda_graph else "float32"
    local = replace(LOCAL, accumulate=accumulate, precision=precision)
    tolerance = 2e-2 if execution.cuda_graph else 2e-3
    plain = Execution(experts="autograd")
    one = trained(family, plain, local, "cuda")
    other = trained(family, execution, local, "cuda")
    for key, value in one[0].items():
        torch.testing.assert_close(other[0][key], value, rtol=tolerance, atol=tolerance)
    assert other[1].loss == pytest.approx(one[1].loss, rel=tolerance)
    # Near ties may fall the other way.
    moved = (other[1].routing.load - one[1].routing.load).abs().sum()
    assert moved <= 0.05 * one[1].routing.load.sum()
    assert int(other[1].routing.load.sum()) == int(one[1].routing.load.sum())


@pytest.mark.parametrize(
    ("settings", "device", "vocabulary", "expected"),
    [
        (ExecutionSettings(), "cpu", 4096, Execution()),
        (ExecutionSettings(), "cpu", 50304, Execution(chunked_loss=True)),
        (ExecutionSettings(loss="whole"), "cpu", 50304, Execution()),
        (ExecutionSettings(), "cuda", 4096, Execution(chunked_loss=True, compiled=True)),
        (ExecutionSettings(cuda_graph=True), "cpu", 4096, Execution()),
        (
            ExecutionSettings(cuda_graph=True, compile="off"),
            "cuda",
            4096,
            Execution(experts="static", chunked_loss=True, cuda_graph=True),
        ),
    ],
)
def test_auto_is_resolved_by_device_and_vocabulary(
    settings: ExecutionSettings, device: str, vocabulary: int, expected: Execution
) -> None:
    assert Execution.choose(settings, torch.device(device), vocabulary) == expected
