"""A worker's cache changes how long a round takes, and not one bit of what it gives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federated import Federation, Weights, assert_identical, use_made_up_data
from micro import micro
from torch import Tensor

from fomoe_flwr.config import DataSettings, Settings
from fomoe_flwr.data.source import NodeData, prepare_tokenizer
from fomoe_flwr.data.tokenizer import tokenizer_json
from fomoe_flwr.errors import RunError
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.model.state import load_state, state_of
from fomoe_flwr.worker import cache as worker_cache
from fomoe_flwr.worker.cache import CACHE, MOST_ENTRIES, WorkerCache
from fomoe_flwr.worker.trainer import LocalTrainer
from fomoe_flwr.worker.training_model import token_loss

CPU = torch.device("cpu")
FIRST: Residents = ((0, 1, 2), (3, 4, 5))
SECOND: Residents = ((1, 3, 5), (0, 1, 4))
LARGER: Residents = ((0, 1, 2, 3), (3, 4, 5))


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    CACHE.clear()
    yield
    CACHE.clear()


def lent(cache: WorkerCache, settings: Settings, residents: Residents) -> int:
    with cache.model(settings, residents, CPU) as training:
        return id(training.model)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("layout.kind=fixed",),
        ("layout.kind=random", "layout.overlap=1"),
        ("layout.kind=random", "outer=local_adamw"),
        ("layout.kind=weighted", "layout.residents=[6,4,2]"),
        ("model=fomoe-tiny", "layout.kind=random"),
        ("model=glm4-moe-tiny", "layout.kind=random", "balance=loss_free"),
        ("layout.kind=fixed", "outer.fragments=2"),
    ],
    ids=lambda words: " ".join(words),
)
def test_rounds_are_the_same_bit_by_bit_with_the_cache_and_without(
    overrides: tuple[str, ...], routing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_data(monkeypatch)
    settings = micro("rounds=3", f"model.routing={routing}", *overrides)
    kept = Federation(settings, tmp_path / "kept").run()
    forgetful = Federation(settings, tmp_path / "forgetful")
    answer = forgetful.grid._answer

    def answer_anew(message: object) -> object:
        CACHE.clear()
        return answer(message)  # type: ignore[arg-type]

    monkeypatch.setattr(forgetful.grid, "_answer", answer_anew)
    forgetful.run()
    for got, want in zip(kept.rounds, forgetful.rounds, strict=True):
        assert_identical(got.state, want.state)
        assert_identical(got.outer, want.outer)
        assert got.record.replies.keys() == want.record.replies.keys() == {0, 1, 2}
        for worker, metrics in got.record.replies.items():
            other = want.record.replies[worker]
            times = {"seconds": 0.0, "overhead_seconds": 0.0}
            assert metrics | times == other | times


def test_two_runs_in_one_process_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_data(monkeypatch)
    settings = [micro("layout.kind=random"), micro("layout.kind=random", "model.hidden_size=24")]
    alone = []
    for index, each in enumerate(settings):
        CACHE.clear()
        alone.append(Federation(each, tmp_path / f"alone-{index}").run())
    CACHE.clear()
    together = [Federation(each, tmp_path / f"beside-{i}") for i, each in enumerate(settings)]
    inner = together[0].grid._answer

    def answer_after_the_other(message: object) -> object:
        # Before every task of the first run, a whole round of the second one.
        Federation(settings[1], tmp_path / os.urandom(4).hex()).run()
        return inner(message)  # type: ignore[arg-type]

    monkeypatch.setattr(together[0].grid, "_answer", answer_after_the_other)
    for got, want in zip(together, alone, strict=True):
        assert_identical(got.run().rounds[-1].state, want.rounds[-1].state)


def test_a_model_is_built_once_for_residents_of_the_same_numbers() -> None:
    cache, settings = WorkerCache(), micro()
    with cache.model(settings, FIRST, CPU) as training:
        built = training
    with cache.model(settings, SECOND, CPU) as training:
        assert training is built
        model = training.model
        fresh = build_model(settings.model, model.config, SECOND, empty=True)
        assert_identical(buffers(model), buffers(fresh))
    with cache.model(settings, LARGER, CPU) as training:
        assert training is not built
        assert training.model.model.layers[0].mlp.experts.down_proj.shape[0] == 4


def buffers(model: torch.nn.Module) -> Weights:
    return dict(model.named_buffers())


@pytest.mark.parametrize(
    "change",
    [
        "model.hidden_size=24",
        "model.routing=partitioned",
        "data.sequence_length=16",
        "local.lr=1",
        "balance.loss=0.5",
    ],
)
def test_another_setting_gets_another_model(change: str) -> None:
    cache = WorkerCache()
    with cache.model(micro(), FIRST, CPU) as first, cache.model(micro(change), FIRST, CPU) as other:
        assert first is not other


def test_a_lent_model_is_not_lent_twice() -> None:
    cache, settings = WorkerCache(), micro()
    lent(cache, settings, FIRST)
    with cache.model(settings, FIRST, CPU) as one, cache.model(settings, FIRST, CPU) as other:
        assert one is not other


def test_a_model_of_a_failed_round_is_not_used_again() -> None:
    cache, settings = WorkerCache(), micro()
    lenders = []

    def fail() -> None:
        with cache.model(settings, FIRST, CPU) as spoilt:
            lenders.append(spoilt.model)
            RouterProbe(spoilt.model, 6, FIRST)
            raise RunError("diverged")

    with pytest.raises(RunError, match="diverged"):
        fail()
    with cache.model(settings, FIRST, CPU) as training:
        assert training.model is not lenders[0]
        training.close()
        assert not any(module._forward_hooks for module in training.model.modules())


def test_a_model_comes_back_without_gradients() -> None:
    cache, settings = WorkerCache(), micro()
    with cache.model(settings, FIRST, CPU) as training:
        model = training.model
        fresh = build_model(settings.model, model.config, FIRST, seed=1)
        load_state(model, state_of(fresh))
        token_loss(model, torch.zeros(1, 9, dtype=torch.long)).backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
    with cache.model(settings, FIRST, CPU) as again:
        assert again.model is model
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_cache_keeps_one_model_and_few_of_the_rest() -> None:
    cache = WorkerCache()
    for seed in range(3 * MOST_ENTRIES):
        settings = micro(f"seed={seed}", f"model.hidden_size={16 + 8 * seed}")
        assert cache.settings(settings.to_dict()) == settings
        cache.spec(settings)
        lent(cache, settings, FIRST)
    assert len(cache._models) == 1
    assert len(cache._settings._kept) == len(cache._specs._kept) == MOST_ENTRIES


def test_settings_are_checked_once_and_wrong_ones_every_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, fields = WorkerCache(), micro().to_dict()
    checked: list[object] = []
    inner = worker_cache.settings_from_dict
    monkeypatch.setattr(
        worker_cache, "settings_from_dict", lambda given: [checked.append(given), inner(given)][1]
    )
    assert cache.settings(fields) is cache.settings(dict(reversed(fields.items())))
    assert len(checked) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="rounds=0"):
            cache.settings({**fields, "rounds": 0})
    assert len(checked) == 3


def node_data(path: Path) -> NodeData:
    data = DataSettings(path=str(path), sequence_length=16)
    settings = replace(micro(), data=data, model=replace(micro().model, vocab_size=300))
    text = tokenizer_json(prepare_tokenizer(settings))
    return NodeData(data, settings.local, 0, 1, 1, 3, text)


def first_batch(cache: WorkerCache, data: NodeData) -> Tensor:
    return cache.batches(data, 0).next_batch()


def test_text_is_read_once_as_long_as_its_files_stay(
    small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.txt"
    path.write_text(small_text.read_text(encoding="utf-8"), encoding="utf-8")
    cache, data = WorkerCache(), node_data(path)
    reads: list[object] = []
    inner = NodeData.read
    monkeypatch.setattr(NodeData, "read", lambda self: [reads.append(self), inner(self)][1])
    batch = first_batch(cache, data)
    assert torch.equal(batch, data.batches(0).next_batch())
    assert torch.equal(batch, first_batch(cache, data))
    other = replace(data, worker=2, part=2)
    assert torch.equal(first_batch(cache, other), other.batches(0).next_batch())
    assert sum(each is data for each in reads) == 2  # of which one was without the cache
    path.write_text(small_text.read_text(encoding="utf-8").upper(), encoding="utf-8")
    assert not torch.equal(batch, first_batch(cache, data))


def test_a_position_is_the_readers_own(small_text: Path) -> None:
    cache, data = WorkerCache(), node_data(small_text)
    one, other = cache.batches(data, 0), cache.batches(data, 0)
    first = one.next_batch()
    one.next_batch()
    assert torch.equal(first, other.next_batch())


def test_gradients_and_moments_are_gone_before_the_pseudo_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fomoe_flwr.worker import round as worker_round

    use_made_up_data(monkeypatch)
    trainers: list[LocalTrainer] = []
    seen: list[int] = []
    trained: list[int] = []
    difference, train = worker_round.difference, LocalTrainer.train

    def note_memory(*args: object) -> object:
        left = [p for p in trainers[-1].model.parameters() if p.grad is not None]
        seen.append(len(left) + len(trainers[-1].optimizer.state))
        return difference(*args)  # type: ignore[arg-type]

    def note_state(trainer: LocalTrainer, steps: int) -> object:
        report = train(trainer, steps)
        trainers.append(trainer)
        trained.append(len(trainer.optimizer.state))
        return report

    monkeypatch.setattr(LocalTrainer, "train", note_state)
    monkeypatch.setattr(worker_round, "difference", note_memory)
    Federation(micro("rounds=1"), tmp_path).run()
    assert len(trained) == 3
    assert min(trained) > 0
    assert seen == [0, 0, 0]
