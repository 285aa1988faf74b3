"""What is synchronised when: every key once in F rounds, parts even, moments at their periods."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomoe_flwr.config import ModelSettings, OuterSettings
from fomoe_flwr.parameters.fragments import (
    FIRST_MOMENT,
    MOMENTS,
    SECOND_MOMENT,
    fragment_of_round,
    fragment_rows,
    moments_of_round,
)
from fomoe_flwr.parameters.keys import has_layer, layer_of
from fomoe_flwr.parameters.shapes import buffer_shapes, parameter_shapes

FAMILIES = ("olmoe", "deepseek_v3", "fomoe")


def rows_of(key: str, num_rows: int, fragments: int) -> list[list[int]]:
    """Return the rows of a key that each fragment carries."""
    return [
        list(range(*fragment_rows(key, num_rows, fragment, fragments)))
        for fragment in range(fragments)
    ]


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    | st.integers(0, 200).map("model.layers.{}.mlp.experts.down_proj".format),
    num_rows=st.integers(0, 500),
    fragments=st.integers(1, 20),
)
def test_fragments_cut_every_key_into_disjoint_parts_that_are_all_of_it(
    key: str, num_rows: int, fragments: int
) -> None:
    parts = rows_of(key, num_rows, fragments)
    # In order and without holes: concatenated they are the key itself.
    assert [row for part in parts for row in part] == list(range(num_rows))
    filled = [len(part) for part in parts if part]
    if has_layer(key):
        assert filled == [num_rows] * (num_rows > 0)
    else:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 12),
    fragments=st.integers(1, 12),
    vocab=st.integers(260, 400),
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
)
def test_fragments_of_a_model_are_as_even_as_whole_layers_allow(
    layers: int, fragments: int, vocab: int, family: str, tied: bool
) -> None:
    fragments = min(fragments, layers)
    model = ModelSettings(
        family=family, num_layers=layers, vocab_size=vocab, tie_embeddings=tied, hidden_size=32
    )
    shapes = parameter_shapes(model) | buffer_shapes(model)
    layer_size = sum(
        math.prod(shape) for key, shape in shapes.items() if has_layer(key) and layer_of(key) == 0
    )
    sizes, rows_outside = [], 0
    for fragment in range(fragments):
        size = 0
        for key, shape in shapes.items():
            start, stop = fragment_rows(key, shape[0], fragment, fragments)
            size += (stop - start) * math.prod(shape[1:])
        sizes.append(size)
    for key, shape in shapes.items():
        if not has_layer(key):
            rows_outside += math.prod(shape[1:])
    assert sum(sizes) == sum(map(math.prod, shapes.values()))
    # One layer more or less, and one row of each key outside the layers.
    assert max(sizes) - min(sizes) <= (layers % fragments > 0) * layer_size + rows_outside


@pytest.mark.parametrize("fragments", [1, 2, 3, 5])
def test_fragments_take_turns_from_the_first_round_on(fragments: int) -> None:
    outer = OuterSettings(fragments=fragments)
    rounds = [fragment_of_round(outer, server_round) for server_round in range(1, 31)]
    assert rounds[:fragments] == list(range(fragments))
    assert rounds[fragments:] == rounds[:-fragments]


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("name", ["average", "nesterov"])
def test_without_moments_there_are_none(name: str, fragments: int) -> None:
    outer = OuterSettings(name, fragments=fragments)
    assert {moments_of_round(outer, server_round) for server_round in range(1, 40)} == {()}


@pytest.mark.parametrize("fragments", [1, 3])
def test_local_adamw_sends_both_moments_in_every_round(fragments: int) -> None:
    outer = OuterSettings("local_adamw", fragments=fragments)
    for server_round in range(1, 40):
        assert moments_of_round(outer, server_round) == MOMENTS


def test_des_loc_sends_each_moment_at_its_period() -> None:
    outer = OuterSettings("des_loc", first_moment_every=3, second_moment_every=6)
    rounds = range(1, 19)
    first = [r for r in rounds if FIRST_MOMENT in moments_of_round(outer, r)]
    second = [r for r in rounds if SECOND_MOMENT in moments_of_round(outer, r)]
    assert first == [3, 6, 9, 12, 15, 18]
    assert second == [6, 12, 18]


@pytest.mark.parametrize("periods", [(1, 1), (3, 6), (2, 3)])
@pytest.mark.parametrize("fragments", [1, 2, 3, 4])
def test_des_loc_counts_the_synchronisations_of_a_fragment(
    fragments: int, periods: tuple[int, int]
) -> None:
    outer = OuterSettings(
        "des_loc",
        fragments=fragments,
        first_moment_every=periods[0],
        second_moment_every=periods[1],
    )
    turns: Counter[int] = Counter()
    for server_round in range(1, 8 * fragments + 1):
        fragment = fragment_of_round(outer, server_round)
        turns[fragment] += 1
        wanted = [m for m, p in zip(MOMENTS, periods, strict=True) if turns[fragment] % p == 0]
        assert list(moments_of_round(outer, server_round)) == wanted


def test_des_loc_with_both_periods_one_is_local_adamw() -> None:
    des_loc = OuterSettings("des_loc", first_moment_every=1, second_moment_every=1)
    for server_round in range(1, 10):
        assert moments_of_round(des_loc, server_round) == MOMENTS
