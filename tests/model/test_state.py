"""The state as two flat vectors: one order on both sides, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fomoe_flwr.config import ModelSettings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import StateSpec, load_state, state_of
from fomoe_flwr.routing import RoutingMode

SHAPE = ModelSettings(
    num_layers=2,
    hidden_size=8,
    expert_size=4,
    num_heads=2,
    num_kv_heads=1,
    num_experts=5,
    top_k=2,
    vocab_size=260,
)
MODES = [mode.value for mode in RoutingMode]
ANY_RESIDENTS = st.lists(
    st.sets(st.integers(0, SHAPE.num_experts - 1)).map(lambda held: tuple(sorted(held))),
    min_size=SHAPE.num_layers,
    max_size=SHAPE.num_layers,
)


def spec_of(shape: ModelSettings) -> StateSpec:
    return StateSpec.of(shape, transformers_config(shape, 8))


def random_state(spec: StateSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        entry.key: torch.randn(entry.shape, generator=generator)
        for entry in (*spec.shared, *spec.expert)
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("routing", MODES)
def test_the_spec_names_every_parameter_once(family: str, routing: str, tied: bool) -> None:
    shape = replace(SHAPE, family=family, routing=routing, tie_embeddings=tied)
    spec = spec_of(shape)
    model = build_model(shape, transformers_config(shape, 8), seed=0)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {e.key: e.shape for e in (*spec.shared, *spec.expert)} == named
    assert len(spec.shared) + len(spec.expert) == len(named)
    assert (spec.num_layers, spec.num_experts) == (SHAPE.num_layers, SHAPE.num_experts)
    per_layer = ["gate_up_proj", "down_proj"] + ["weight"] * (routing == "partitioned")
    assert sorted(e.key.rpartition(".")[2] for e in spec.expert) == sorted(per_layer * 2)
    assert [e.layer for e in spec.expert] == sorted([0, 1] * len(per_layer))
    assert all(e.layer is None for e in spec.shared)


@pytest.mark.parametrize("routing", MODES)
def test_a_full_state_survives_pack_and_split(routing: str) -> None:
    spec = spec_of(replace(SHAPE, routing=routing))
    state = random_state(spec)
    everything = [range(SHAPE.num_experts)] * SHAPE.num_layers
    shared, experts = spec.pack_shared(state), spec.pack_experts(state)
    assert len(shared) == spec.shared_size
    assert len(experts) == spec.experts_size(everything)
    assert_same(spec.split_shared(shared) | spec.split_experts(experts, everything), state)
    assert torch.equal(spec.pack_experts(state, everything), experts)


@settings(max_examples=40, deadline=None)
@given(residents=ANY_RESIDENTS, routing=st.sampled_from(MODES))
def test_any_residents_survive_pack_and_split_in_ascending_order(
    residents: Residents, routing: str
) -> None:
    spec = spec_of(replace(SHAPE, routing=routing))
    state = random_state(spec)
    packed = spec.pack_experts(state, residents)
    assert packed.shape == (spec.experts_size(residents),)
    pieces = spec.split_experts(packed, residents)
    assert list(pieces) == [entry.key for entry in spec.expert]
    for entry in spec.expert:
        assert entry.layer is not None
        rows = [state[entry.key][expert] for expert in sorted(residents[entry.layer])]
        assert pieces[entry.key].shape == (len(rows), *entry.shape[1:])
        assert all(map(torch.equal, pieces[entry.key], rows))
    assert torch.equal(spec.pack_experts(pieces), packed)


def test_the_flat_order_is_key_then_expert_then_element() -> None:
    spec = spec_of(SHAPE)
    state = random_state(spec)
    residents = ((1, 4), (0, 2, 3))
    by_hand = [
        state[f"model.layers.{layer}.mlp.experts.{leaf}"][expert].flatten()
        for layer in range(2)
        for leaf in ("gate_up_proj", "down_proj")
        for expert in residents[layer]
    ]
    assert torch.equal(spec.pack_experts(state, residents), torch.cat(by_hand))


@settings(max_examples=20, deadline=None)
@given(residents=ANY_RESIDENTS.filter(all), routing=st.sampled_from(MODES))
def test_rows_cut_by_the_server_are_what_the_worker_packs(
    residents: Residents, routing: str
) -> None:
    shape = replace(SHAPE, routing=routing)
    spec = spec_of(shape)
    full = random_state(spec)
    shared, experts = spec.pack_shared(full), spec.pack_experts(full, residents)
    worker = build_model(shape, transformers_config(shape, 8), residents, empty=True)
    load_state(worker, spec.split_shared(shared) | spec.split_experts(experts, residents))
    own = state_of(worker)
    assert torch.equal(spec.pack_shared(own), shared)
    assert torch.equal(spec.pack_experts(own), experts)


def test_packing_copies_and_splitting_views() -> None:
    spec = spec_of(SHAPE)
    state = random_state(spec)
    shared = spec.pack_shared(state)
    shared.zero_()
    assert all(state[entry.key].any() for entry in spec.shared)
    spec.split_shared(shared)["model.norm.weight"].fill_(2.0)
    assert int(shared.sum()) == 2 * SHAPE.hidden_size


def test_packing_gives_fp32_whatever_the_model_has() -> None:
    spec = spec_of(SHAPE)
    half = {key: value.bfloat16() for key, value in random_state(spec).items()}
    assert spec.pack_shared(half).dtype is torch.float32
    assert spec.pack_experts(half).dtype is torch.float32


def variants() -> Iterator[ModelSettings]:
    yield SHAPE
    yield replace(SHAPE, routing="partitioned")
    yield replace(SHAPE, family="qwen3_moe")
    yield replace(SHAPE, tie_embeddings=False)
    for key in ("num_layers", "hidden_size", "expert_size", "num_experts", "vocab_size"):
        yield replace(SHAPE, **{key: 2 * getattr(SHAPE, key)})


def test_the_digest_tells_shapes_and_routing_apart() -> None:
    digests = [spec_of(shape).digest() for shape in variants()]
    assert len(set(digests)) == len(digests)
    assert digests == [spec_of(shape).digest() for shape in variants()]
    built = build_model(SHAPE, transformers_config(SHAPE, 8), seed=0)
    assert StateSpec.of_model(built, SHAPE).digest() == digests[0]


@pytest.mark.parametrize("off", [-1, 1])
def test_a_vector_of_another_size_is_refused(off: int) -> None:
    spec, residents = spec_of(SHAPE), ((0, 1), (2,))
    with pytest.raises(ValueError, match=rf"shared vector .* needs \[{spec.shared_size}\]"):
        spec.split_shared(torch.zeros(spec.shared_size + off))
    size = spec.experts_size(residents)
    with pytest.raises(ValueError, match=rf"expert vector .* needs \[{size}\]"):
        spec.split_experts(torch.zeros(size + off), residents)


def test_a_matrix_of_the_right_size_is_refused() -> None:
    spec = spec_of(SHAPE)
    with pytest.raises(ValueError, match="shared vector"):
        spec.split_shared(torch.zeros(1, spec.shared_size))
