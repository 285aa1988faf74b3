"""The federation against references: stock `transformers` models, torch and Flower's FedAvg.

The references (`stock.py`, and `reference` below) know nothing of `run_round`, `HolderMean` and
`OuterStep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from local_rounds import (
    ALL,
    EVERYBODY,
    EXPERTS,
    LOCAL,
    RING,
    WORKERS,
    Given,
    Weights,
    assert_close,
    assert_trained,
    federate,
    initial,
    local_rounds,
    settings_of,
)
from micro import SEQUENCE
from stock import stock, stock_adamw, stock_loss
from torch import nn

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import OuterSettings, Settings
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.worker.optimizer import learning_rate

FAMILIES = ["olmoe", "qwen3_moe"]


MODES = ["skip_token", "partitioned"]


def silence(model: nn.Module, held: Residents) -> None:
    """Make the ghosts of a stock model add nothing."""
    with torch.no_grad():
        for layer, block in enumerate(moe_blocks(model)):
            for expert in set(range(EXPERTS)) - set(held[layer]):
                block.experts.down_proj[expert] = 0.0


def forget_ghost_gradients(model: nn.Module, held: Residents) -> None:
    for layer, block in enumerate(moe_blocks(model)):
        for expert in set(range(EXPERTS)) - set(held[layer]):
            block.experts.down_proj.grad[expert] = 0.0
            block.experts.gate_up_proj.grad[expert] = 0.0


def reference(settings: Settings, residents: Sequence[Residents]) -> Weights:
    """FoMoE in skip-token routing by its definition: full stock models whose ghosts are silent."""
    local, weights = settings.local, initial(settings.model)
    models = [stock(settings.model, weights) for _ in residents]
    adams = [stock_adamw(model, local) for model in models]
    batches = [Given(worker) for worker in range(len(residents))]
    for server_round in range(settings.rounds):
        trained = []
        for model, adam, given, held in zip(models, adams, batches, residents, strict=True):
            model.load_state_dict(weights, strict=False)
            silence(model, held)
            for step in range(local.steps):
                rate = learning_rate(
                    local, server_round * local.steps + step, settings.rounds * local.steps
                )
                for group in adam.param_groups:
                    group["lr"] = rate
                adam.zero_grad()
                windows = given.next_batch()
                stock_loss(model, windows, settings.model, settings.balance.loss).backward()
                forget_ghost_gradients(model, held)
                nn.utils.clip_grad_norm_(model.parameters(), local.grad_clip)
                adam.step()
                silence(model, held)
            trained.append({k: p.detach().clone() for k, p in model.named_parameters()})
        for key in weights:
            if ".experts." not in key:
                weights[key] = torch.stack([own[key] for own in trained]).mean(0)
                continue
            layer = int(key.split(".")[2])
            for expert in range(EXPERTS):
                rows = [
                    own[key][expert]
                    for own, held in zip(trained, residents, strict=True)
                    if expert in held[layer]
                ]
                weights[key][expert] = torch.stack(rows).mean(0)
    return weights


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize(("family", "tied"), [("olmoe", True), ("qwen3_moe", False)])
def test_full_replicas_with_plain_average_are_local_sgd_of_stock_models(
    family: str, tied: bool, routing: str, tmp_path: Path
) -> None:
    settings = settings_of(family=family, tie_embeddings=tied, routing=routing)
    state = federate(settings, EVERYBODY, tmp_path)
    assert_trained(state, settings.model, 1e-3)
    assert_close(state, reference(settings, EVERYBODY), atol=1e-5)


@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_partial_replicas_are_stock_models_with_silent_ghosts(
    family: str, norm_topk: bool, tmp_path: Path
) -> None:
    settings = settings_of(family=family, norm_topk=norm_topk)
    state = federate(settings, RING, tmp_path)
    assert_trained(state, settings.model, 1e-3)
    assert_close(state, reference(settings, RING), atol=1e-5)


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_worker_in_rounds_is_one_uninterrupted_loop(
    family: str, routing: str, tmp_path: Path
) -> None:
    settings = settings_of(rounds=4, family=family, routing=routing)
    local, total = settings.local, 4 * LOCAL.steps
    state = federate(settings, [ALL], tmp_path)
    model, given = stock(settings.model, initial(settings.model)), Given(0)
    adam = stock_adamw(model, local)
    for step in range(total):
        for group in adam.param_groups:
            group["lr"] = learning_rate(local, step, total)
        adam.zero_grad()
        windows = given.next_batch()
        stock_loss(model, windows, settings.model, settings.balance.loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), local.grad_clip)
        adam.step()
    assert_trained(state, settings.model, 1e-3)
    assert_close(state, dict(state_of(model)), atol=1e-6)


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_local_sgd_step_of_full_replicas_is_data_parallel_training(
    family: str, routing: str, tmp_path: Path
) -> None:
    settings = settings_of(rounds=4, family=family, routing=routing)
    settings.local = replace(
        LOCAL,
        steps=1,
        optimizer="sgd",
        lr=0.5,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        grad_clip=0.0,
    )
    settings.balance.loss = 0.0
    state = federate(settings, EVERYBODY, tmp_path)
    model = stock(settings.model, initial(settings.model))
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [Given(worker) for worker in range(WORKERS)]
    for _ in range(4):
        sgd.zero_grad()
        large = torch.cat([given.next_batch() for given in batches])
        stock_loss(model, large, settings.model, 0.0).backward()
        sgd.step()
    assert_trained(state, settings.model, 1e-4)
    assert_close(state, dict(state_of(model)), atol=1e-6)


@pytest.mark.parametrize("outer", ["average", "nesterov"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_everything_resident_the_routing_modes_agree(
    family: str, outer: str, tmp_path: Path
) -> None:
    states = {}
    for routing in MODES:
        settings = settings_of(family=family, routing=routing)
        settings.outer = OuterSettings(outer, lr=0.7, momentum=0.9)
        states[routing] = federate(settings, EVERYBODY, tmp_path / routing)
    assert_trained(states["partitioned"], settings.model, 1e-3)
    assert_close(states["skip_token"], states["partitioned"], atol=1e-6)


@pytest.mark.parametrize("weights", [(1, 1, 1), (96, 32, 480)], ids=str)
def test_plain_average_is_flowers_fedavg(
    weights: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    settings = settings_of()
    spec = StateSpec.of(settings.model, transformers_config(settings.model, SEQUENCE))
    state, mean, replies = initial(settings.model), HolderMean(spec), []
    results = local_rounds(settings, spec, state, EVERYBODY, 1, tmp_path)
    for worker, (result, weight) in enumerate(zip(results, weights, strict=True)):
        mean.fold(result.shared, result.experts, ALL, weight)
        trained = spec.split_shared(spec.pack_shared(state) - result.shared)
        trained |= spec.split_experts(spec.pack_experts(state) - result.experts, ALL)
        asked = Message(RecordDict(), dst_node_id=worker + 1, message_type="train")
        content = RecordDict(
            {
                "arrays": ArrayRecord(trained),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        replies.append(Message(content, reply_to=asked))
    arrays, _ = FedAvg().aggregate_train(1, replies)
    assert arrays is not None
    OuterStep(OuterSettings("average", lr=1.0)).apply(state, mean)
    assert_trained(state, settings.model, 1e-3)
    assert_close(state, dict(arrays.to_torch_state_dict()), atol=1e-6)
