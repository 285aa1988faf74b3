"""The state as two flat vectors: one order on both sides, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import micro_model
from torch import Tensor

from fomoe_flwr.config import ModelSettings, RoutingMode
from fomoe_flwr.model.families import FAMILIES, transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import Entry, StateSpec, load_state, state_of
from fomoe_flwr.parameters.shapes import buffer_shapes, parameter_shapes
from fomoe_flwr.worker.merging import merge

SHAPE = micro_model(num_experts=5)  # An odd number: no layout is even.
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
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", MODES)
def test_the_spec_names_every_parameter_and_travelling_buffer_once(
    family: str,
    routing: str,
    tied: bool,
    of_family: Callable[[ModelSettings, str], ModelSettings],
) -> None:
    shape = replace(of_family(SHAPE, family), routing=routing, tie_embeddings=tied)
    spec = spec_of(shape)
    model = build_model(shape, transformers_config(shape, 8), seed=0)
    named = {name: tuple(p.shape) for name, p in model.named_parameters()}
    buffers = buffer_shapes(shape)
    assert named == parameter_shapes(shape)
    assert {e.key for e in (*spec.shared, *spec.expert) if not e.is_parameter} == set(buffers)
    named |= buffers
    assert {e.key: e.shape for e in (*spec.shared, *spec.expert)} == named
    assert len(spec.shared) + len(spec.expert) == len(named)
    assert (spec.num_layers, spec.num_experts) == (SHAPE.num_layers, SHAPE.num_experts)
    per_layer = ["up_proj" if family == "fomoe" else "gate_up_proj", "down_proj"]
    if routing == "partitioned":
        per_layer += ["weight"] + ["e_score_correction_bias"] * bool(buffers)
    assert sorted(e.key.rpartition(".")[2] for e in spec.expert) == sorted(per_layer * 2)
    assert sorted(e.layer for e in spec.expert) == sorted([0, 1] * len(per_layer))
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


FRAGMENTS = [1, 2, 3]
DEEP = replace(SHAPE, num_layers=5, vocab_size=263)
HELD = ((0, 3), (1, 2, 4), (0,), (2, 3), (0, 1, 2, 3, 4))


def deep_spec(family: str, routing: str, of_family: Callable[..., ModelSettings]) -> StateSpec:
    return spec_of(replace(of_family(DEEP, family), routing=routing))


@pytest.mark.parametrize("num_fragments", FRAGMENTS)
@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "fomoe"])
def test_the_union_of_all_fragments_is_the_whole(
    family: str, routing: str, num_fragments: int, of_family: Callable[..., ModelSettings]
) -> None:
    spec = deep_spec(family, routing, of_family)
    parts = [spec.fragment(fragment, num_fragments) for fragment in range(num_fragments)]
    assert sum(part.shared_size for part in parts) == spec.shared_size
    assert sum(part.experts_size(HELD) for part in parts) == spec.experts_size(HELD)
    experts = [entry for part in parts for entry in part.expert]
    assert sorted(experts, key=repr) == sorted(spec.expert, key=repr)
    whole = random_state(spec)
    for entry in spec.shared:
        pieces = [
            found.of(whole) for part in parts for found in part.shared if found.key == entry.key
        ]
        assert torch.equal(torch.cat(pieces), whole[entry.key])
    assert len({part.digest() for part in parts}) == num_fragments
    assert {(p.num_layers, p.num_experts) for p in parts} == {(DEEP.num_layers, DEEP.num_experts)}


def test_one_fragment_is_the_spec_itself() -> None:
    spec = spec_of(SHAPE)
    assert spec.fragment(0, 1) is spec


@pytest.mark.parametrize("num_fragments", FRAGMENTS)
@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("residents", [None, HELD], ids=["server", "worker"])
def test_a_fragment_is_packed_split_and_laid_over_a_state_without_a_trace_elsewhere(
    residents: Residents | None,
    routing: str,
    num_fragments: int,
    of_family: Callable[..., ModelSettings],
) -> None:
    spec = deep_spec("deepseek_v3", routing, of_family)
    everything = [range(DEEP.num_experts)] * DEEP.num_layers
    held = residents or everything

    def state_of_side(seed: int) -> dict[str, Tensor]:
        """Return the server's state, or a worker's, whose expert keys have its residents' rows."""
        full = random_state(spec, seed)
        if residents is None:
            return full
        return spec.split_shared(spec.pack_shared(full)) | spec.split_experts(
            spec.pack_experts(full, residents), residents
        )

    source, target = state_of_side(1), state_of_side(2)
    places = {key: value.data_ptr() for key, value in target.items()}
    for fragment in range(num_fragments):
        before = {key: value.clone() for key, value in target.items()}
        part = spec.fragment(fragment, num_fragments)
        shared, experts = part.pack_shared(source), part.pack_experts(source)
        assert shared.shape == (part.shared_size,)
        assert experts.shape == (part.experts_size(held),)
        pieces = part.split_shared(shared) | part.split_experts(experts, held)
        merge(target, part, pieces, 0.0)
        carried = {entry.key: entry for entry in (*part.shared, *part.expert)}
        for key, value in target.items():
            expected = before[key]
            if key in carried:
                entry = carried[key]
                rows = slice(entry.start, entry.start + entry.shape[0])
                expected[rows] = source[key][rows]
            assert torch.equal(value, expected), key
    assert_same(target, source)
    assert places == {key: value.data_ptr() for key, value in target.items()}


@pytest.mark.parametrize("routing", MODES)
def test_a_servers_cut_of_a_fragment_is_what_the_worker_packs(
    routing: str, of_family: Callable[..., ModelSettings]
) -> None:
    spec = deep_spec("glm4_moe", routing, of_family)
    full = random_state(spec)
    own = spec.split_shared(spec.pack_shared(full)) | spec.split_experts(
        spec.pack_experts(full, HELD), HELD
    )
    for fragment in range(2):
        part = spec.fragment(fragment, 2)
        assert torch.equal(part.pack_shared(full), part.pack_shared(own))
        assert torch.equal(part.pack_experts(full, HELD), part.pack_experts(own))


def test_parameters_leave_out_buffers_and_nothing_else(
    of_family: Callable[..., ModelSettings],
) -> None:
    for family, routing in (("olmoe", "skip_token"), ("fomoe", "partitioned")):
        shape = replace(of_family(DEEP, family), routing=routing)
        for spec in (spec_of(shape), spec_of(shape).fragment(1, 2)):
            own = spec.parameters()
            left_out = {e.key for e in (*spec.shared, *spec.expert)} - {
                e.key for e in (*own.shared, *own.expert)
            }
            assert left_out == {
                e.key for e in (*spec.shared, *spec.expert) if e.key in buffer_shapes(shape)
            }
            assert bool(left_out) == (family == "fomoe")


def test_an_entry_views_its_rows() -> None:
    state = {"embed": torch.arange(10.0).view(5, 2), "bias": torch.arange(5.0)}
    some = Entry("embed", (2, 2), None, start=3)
    view = some.of(state)
    assert view.tolist() == [[6.0, 7.0], [8.0, 9.0]]
    view.zero_()
    assert state["embed"][3:].eq(0).all()
    assert state["embed"][:3].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert Entry("bias", (5,), None).of(state) is state["bias"]
    # A worker's stack is shorter than the entry's shape: it is viewed as it is.
    stack = {"model.layers.0.experts.w": torch.ones(2, 3)}
    view = Entry("model.layers.0.experts.w", (6, 3), 0).of(stack)
    view.zero_()
    assert view.shape == (2, 3)
    assert stack["model.layers.0.experts.w"].eq(0).all()
