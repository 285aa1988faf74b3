"""The federation against references written with stock transformers, torch and Flower's FedAvg.

Legend: worker rounds run through `worker.run_round`, means and steps through `HolderMean` and
`OuterStep`, exactly as the strategy composes them; the references know none of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor, nn
from transformers import PreTrainedModel

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.outer_step import OuterStep
from fomoe_flwr.config import DataSettings, LocalSettings, ModelSettings, OuterSettings, Settings
from fomoe_flwr.model.families import model_class, transformers_config
from fomoe_flwr.model.residency import Residents, build_model, moe_blocks
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.worker.round import RoundResult, RoundTask, run_round
from fomoe_flwr.worker.training import learning_rate

WORKERS, EXPERTS, LAYERS, SEQUENCE, BATCH = 3, 6, 2, 8, 4
MODEL = ModelSettings(
    num_layers=LAYERS,
    hidden_size=16,
    expert_size=8,
    num_heads=2,
    num_kv_heads=1,
    num_experts=EXPERTS,
    top_k=2,
    vocab_size=260,
    init_std=0.2,
)
BALANCE = 0.01
LOCAL = LocalSettings(
    steps=3,
    lr=3e-3,
    warmup_steps=2,
    weight_decay=0.1,
    eps=1e-6,
    device="cpu",
    threads=1,
)
ALL: Residents = [range(EXPERTS)] * LAYERS
EVERYBODY = [ALL] * WORKERS
RING = [((0, 1, 2, 3), (0, 2, 4, 5)), ((2, 3, 4, 5), (0, 1, 2, 3)), ((0, 1, 4, 5), (1, 3, 4, 5))]
FAMILIES = ["olmoe", "qwen3_moe"]
MODES = ["skip_token", "partitioned"]

Weights = dict[str, Tensor]


class Given:
    """A worker's own batches, the same ones for federation and reference."""

    def __init__(self, worker: int, position: int = 0) -> None:
        self.worker, self.position = worker, position

    def next_batch(self) -> Tensor:
        self.position += 1
        generator = torch.Generator().manual_seed(1000 * self.worker + self.position)
        return torch.randint(0, 260, (BATCH, SEQUENCE + 1), generator=generator)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def settings_of(rounds: int = 3, **model: Any) -> Settings:
    return Settings(
        rounds=rounds,
        model=replace(MODEL, **model),
        data=DataSettings(sequence_length=SEQUENCE),
        local=replace(LOCAL),
        outer=OuterSettings("average"),
    )


def initial(model: ModelSettings) -> Weights:
    built = build_model(model, transformers_config(model, SEQUENCE), seed=4)
    return {key: value.clone() for key, value in state_of(built).items()}


def local_rounds(
    settings: Settings,
    spec: StateSpec,
    state: Weights,
    residents: Sequence[Residents],
    server_round: int,
    folder: Path,
) -> Iterator[RoundResult]:
    for worker, held in enumerate(residents):
        task = RoundTask(
            settings=settings,
            spec=spec,
            worker=worker,
            server_round=server_round,
            residents=held,
            shared=spec.pack_shared(state),
            experts=spec.pack_experts(state, held),
            state_dir=folder / f"worker-{worker}",
            keep_rounds=[],
        )
        yield run_round(task, lambda position, worker=worker: Given(worker, position))


def federate(settings: Settings, residents: Sequence[Residents], folder: Path) -> Weights:
    spec = StateSpec.of(settings.model, transformers_config(settings.model, SEQUENCE))
    state, outer = initial(settings.model), OuterStep(settings.outer)
    for server_round in range(1, settings.rounds + 1):
        mean = HolderMean(spec)
        results = local_rounds(settings, spec, state, residents, server_round, folder)
        for held, result in zip(residents, results, strict=True):
            mean.fold(result.shared, result.experts, held, result.report.tokens)
        outer.apply(state, mean)
    return state


def stock(model: ModelSettings, weights: Weights) -> PreTrainedModel:
    config = transformers_config(model, SEQUENCE)
    built = model_class(model.family)._from_config(config, experts_implementation="eager")
    missing, unexpected = built.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tie_embeddings else [])
    return built.train()


def stock_adamw(model: nn.Module, local: LocalSettings) -> torch.optim.AdamW:
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        matrix = "_proj" in name
        (decayed if matrix else plain).append(parameter)
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": local.weight_decay}, {"params": plain}],
        lr=local.lr,
        betas=(local.beta1, local.beta2),
        eps=local.eps,
        weight_decay=0.0,
    )


def stock_loss(model: PreTrainedModel, windows: Tensor, balance_loss: float) -> Tensor:
    out = model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten())
    balance = torch.zeros(())
    for logits in out.router_logits:
        probability = logits.softmax(-1)
        chosen = F.one_hot(probability.topk(MODEL.top_k).indices, EXPERTS).sum(1).float()
        share = chosen.mean(0) / MODEL.top_k
        balance = balance + EXPERTS * (share * probability.mean(0)).sum() / LAYERS
    return loss + balance_loss * balance


def silence(model: nn.Module, held: Residents) -> None:
    """Make the ghosts of a stock model add nothing."""
    with torch.no_grad():
        for layer, block in moe_blocks(model):
            for expert in set(range(EXPERTS)) - set(held[layer]):
                block.experts.down_proj[expert] = 0.0


def forget_ghost_gradients(model: nn.Module, held: Residents) -> None:
    for layer, block in moe_blocks(model):
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
                stock_loss(model, given.next_batch(), BALANCE).backward()
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


def assert_close(got: Weights, want: Weights, atol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, k=key: k + m)


def assert_trained(state: Weights, model: ModelSettings, at_least: float) -> None:
    """Every tensor has moved by far more than any tolerance in use."""
    for key, value in initial(model).items():
        assert (state[key] - value).abs().max() > at_least, key


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
        stock_loss(model, given.next_batch(), BALANCE).backward()
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
        stock_loss(model, large, 0.0).backward()
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
