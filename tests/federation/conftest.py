"""Settings, workers and processes that several tests of the federation use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from warm_post import Post
from watched import WORKERS

from fomoe_flwr.config import Settings, load_settings
from fomoe_flwr.federation import client
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.worker.round import RoundResult, RoundTask
from fomoe_flwr.worker.trainer import LocalReport


@pytest.fixture
def make_settings(small_text: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(*overrides: str) -> Settings:
        return load_settings(
            [
                "preset=tiny",
                f"data.path={small_text}",
                f"output_dir={tmp_path}",
                f"layout.num_workers={WORKERS}",
                "local.steps=1",
                "local.batch_size=2",
                "local.threads=1",
                "federation.node_wait_seconds=0",
                *overrides,
            ]
        )

    return make


@pytest.fixture
def quick_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace local training by a random update; everything else of a worker stays real."""

    def instead(task: RoundTask, open_batches: object) -> RoundResult:
        generator = torch.Generator().manual_seed(100 * task.server_round + task.worker)
        shared, experts = (
            torch.randn(vector.shape, generator=generator) * 1e-2
            for vector in (task.shared, task.experts)
        )
        tokens = 60 + task.worker
        nobody = torch.zeros(task.spec.num_layers, dtype=torch.long)
        load = torch.ones(task.spec.num_layers, task.spec.num_experts, dtype=torch.long)
        routing = RoutingCounts(load=load, ghosts=nobody, all_ghost=nobody, tokens=tokens)
        report = LocalReport(6.0, 6.0, 1.0, 1.0, 1e-3, tokens, 0.1, routing)
        return RoundResult(shared, experts, {}, report, False, 0)

    monkeypatch.setattr(client, "run_round", instead)


@pytest.fixture
def post(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    # A short path: a socket's must fit into about a hundred bytes.
    post = Post(tmp_path_factory.mktemp("p"))
    yield post
    for process in post.processes:
        process.kill()
        process.wait()
