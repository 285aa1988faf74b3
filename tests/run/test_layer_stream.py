"""The layer stream: what a model computes does not depend on where its weights wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fomoe_flwr.config import load_settings
from fomoe_flwr.data.tokens import TokenBlocks
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model, build_skeleton
from fomoe_flwr.model.router_probe import chosen_experts
from fomoe_flwr.model.state import state_of
from fomoe_flwr.run.evaluation import EvalReport, evaluate
from fomoe_flwr.run.layer_stream import LayerStream

CPU = torch.device("cpu")
FAMILIES = ("tiny", "qwen3-moe-tiny", "mixtral-tiny", "deepseek-v3-tiny", "glm4-moe-tiny")
MODELS = (*FAMILIES, "fomoe-tiny")
LENGTH = 16


class Bench:
    """One model with its weights in it, and one that takes them when it is called."""

    def __init__(self, model: str, batch_size: int = 3, device: torch.device = CPU) -> None:
        words = [] if model == "tiny" else [f"model={model}"]
        shape = load_settings(["preset=tiny", *words, "model.init_std=0.2"]).model
        config = transformers_config(shape, LENGTH)
        self.shape, self.model = shape, build_model(shape, config, seed=1)
        self.model.eval()
        self.state = state_of(self.model)
        skeleton = build_skeleton(shape, config, device)
        self.stream = LayerStream(skeleton, self.state, device, batch_size)
        tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 7 * LENGTH + 1)
        domains = np.array([0, 0, 0, 1, 1, 1, 1], dtype=np.int16)
        self.blocks = TokenBlocks(tokens.astype(np.uint16), domains, ("a", "b"), LENGTH)
        self.indices = np.arange(7)
        self.byte_lengths = np.arange(shape.vocab_size) % 5 + 1
        self.windows = torch.from_numpy(self.blocks.window(self.indices))

    def score(self, model: PreTrainedModel, rows: int = 0) -> EvalReport:
        return evaluate(model, self.blocks, self.indices, self.byte_lengths, 3, rows)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_stream_gives_the_whole_models_hidden_states(model: str, batch_size: int) -> None:
    bench = Bench(model, batch_size)
    ids = bench.windows[:, :-1]
    with torch.no_grad():
        whole = torch.cat(
            [bench.model.base_model(input_ids=part).last_hidden_state for part in ids.split(1)]
        )
        with bench.stream.open() as streamed:
            for _ in range(2):  # Weights come anew for every call.
                found = streamed.base_model(input_ids=ids, use_cache=False).last_hidden_state
                torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_chooses_the_whole_models_experts(model: str) -> None:
    bench = Bench(model)
    ids, experts, top_k = bench.windows[:, :-1], bench.shape.num_experts, bench.shape.top_k
    whole = chosen_experts(bench.model, ids, experts, top_k, batch_size=3)
    with bench.stream.open() as streamed:
        found = chosen_experts(streamed, ids, experts, top_k, batch_size=len(ids))
    assert torch.equal(found, whole)


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_scores_as_the_whole_model_does(model: str) -> None:
    bench = Bench(model)
    whole = bench.score(bench.model)
    for rows in (3, 4, 7):
        with bench.stream.open() as streamed:
            found = bench.score(streamed, rows)
        assert found.tokens == whole.tokens
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        assert found.domain_bits_per_byte == pytest.approx(whole.domain_bits_per_byte, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_scores_and_chooses_as_the_cpu_does(model: str) -> None:
    bench = Bench(model, device=torch.device("cuda"))
    whole = bench.score(bench.model)
    with bench.stream.open() as streamed:
        found = bench.score(streamed, 7)
    assert found.loss == pytest.approx(whole.loss, rel=1e-4)
    with bench.stream.whole() as whole_there:
        assert bench.score(whole_there).loss == pytest.approx(whole.loss, rel=1e-4)
    assert all(p.is_meta for p in bench.stream.skeleton.parameters())


def test_nothing_stays_on_the_device_and_new_weights_count() -> None:
    bench = Bench("tiny")
    ids = bench.windows[:, :-1]
    with torch.no_grad(), bench.stream.open() as streamed:
        before = streamed.base_model(input_ids=ids, use_cache=False).last_hidden_state.clone()
    assert all(p.is_meta for p in bench.stream.skeleton.parameters())
    with torch.no_grad():
        for value in bench.state.values():
            value.mul_(1.5)
        with bench.stream.open() as streamed:
            after = streamed.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert not torch.allclose(before, after)
    assert not any("forward" in vars(layer) for layer in bench.stream._layers)


def test_a_call_that_fails_leaves_the_stream_usable() -> None:
    bench = Bench("tiny")
    with pytest.raises(RuntimeError, match="stop"), bench.stream.open():
        raise RuntimeError("stop")
    with torch.no_grad(), bench.stream.open() as streamed:
        assert streamed.base_model(input_ids=bench.windows[:, :-1], use_cache=False) is not None


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_no_axis_but_the_windows_is_as_long_as_they_are_many(tokens: int) -> None:
    assert tokens == 1 or Bench("tiny").stream.rows(tokens) != tokens
