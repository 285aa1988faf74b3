"""A partial model allocates its residents only, and computes what the stock class computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from micro import micro_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fomoe_flwr import costs
from fomoe_flwr.config import (
    BIASED_FAMILIES,
    SHARED_EXPERT_FAMILIES,
    LocalSettings,
    ModelSettings,
    RoutingMode,
)
from fomoe_flwr.errors import InputError
from fomoe_flwr.layout import Layout
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.families import FAMILIES, model_class, transformers_config
from fomoe_flwr.model.residency import Residents, build_model
from fomoe_flwr.model.state import load_state, state_of
from fomoe_flwr.parameters.keys import is_expert_key, layer_of
from fomoe_flwr.worker.optimizer import make_optimizer
from fomoe_flwr.worker.training_model import token_loss

SHAPE = micro_model()
LAYOUT = Layout(6, (((0, 2, 5), (1, 3, 4)), ((1, 4), (0, 2, 3, 5))))
MODES = [mode.value for mode in RoutingMode]


@pytest.fixture(params=[(f, t) for f in FAMILIES for t in (True, False)], ids=str)
def shape(
    request: pytest.FixtureRequest, of_family: Callable[[ModelSettings, str], ModelSettings]
) -> ModelSettings:
    family, tied = request.param
    return replace(of_family(SHAPE, family), tie_embeddings=tied)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Fill fresh memory with NaN, so that a parameter nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class CpuShapes(TorchDispatchMode):
    """Records the shape of every CPU tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self.seen.add(tuple(leaf.shape))
        return out


def built(shape: ModelSettings, residents: Residents | None = None, **how: Any) -> PreTrainedModel:
    return build_model(shape, transformers_config(shape, 8), residents, **how)


def stock(shape: ModelSettings, implementation: str = "grouped_mm") -> PreTrainedModel:
    """Build transformers' own model with the weights of `full`."""
    config = transformers_config(shape, 8)
    model = model_class(shape.family)._from_config(config, experts_implementation=implementation)
    model.load_state_dict(built(shape, seed=3).state_dict())
    return model


def partial(shape: ModelSettings, residents: Residents) -> PreTrainedModel:
    """Build a worker's model with its rows of the weights of `stock`."""
    model = built(shape, residents, empty=True)
    load_state(model, resident_rows(state_of(built(shape, seed=3)), shape, residents))
    return model


def resident_rows(
    full: dict[str, Tensor], shape: ModelSettings, residents: Residents
) -> dict[str, Tensor]:
    return {
        key: value[list(residents[layer_of(key)])]
        if is_expert_key(key, shape.routing_mode)
        else value
        for key, value in full.items()
    }


def windows(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE.vocab_size, (2, 10), generator=generator)


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=windows(), use_cache=False).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    token_loss(model, windows()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def zero_ghosts(model: nn.Module, residents: Residents) -> None:
    with torch.no_grad():
        for layer, block in enumerate(moe_blocks(model)):
            for expert in set(range(SHAPE.num_experts)) - set(residents[layer]):
                block.experts.down_proj[expert] = 0.0


def mask_ghosts(model: PreTrainedModel, residents: Residents) -> None:
    """Give the stock routers a logit of minus infinity for every ghost."""

    def masked(
        layer: int, family: str, norm: bool, top_k: int
    ) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            bias = torch.full((SHAPE.num_experts,), -torch.inf)
            bias[list(residents[layer])] = 0.0
            is_sigmoid = family in BIASED_FAMILIES
            scored = (output[0] + bias).sigmoid() if is_sigmoid else (output[0] + bias).softmax(-1)
            scores, chosen = scored.topk(top_k)
            if norm:
                scores = scores / scores.sum(-1, keepdim=True)
            return output[0] + bias, scores, chosen

        return hook

    for layer, block in enumerate(moe_blocks(model)):
        family = model.config.model_type
        norm = family == "mixtral" or block.router.norm_topk_prob
        block.router.register_forward_hook(masked(layer, family, norm, block.router.top_k))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], atol: float) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=atol, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("worker", [0, 1])
def test_weights_gradients_and_moments_are_those_of_residents_to_the_byte(
    shape: ModelSettings, routing: str, worker: int
) -> None:
    shape = replace(shape, routing=routing)
    model = built(shape, LAYOUT.of_worker(worker), seed=0)
    expected = 4 * costs.resident_counts(shape, LAYOUT)[worker]
    assert storage_bytes(model.parameters()) == expected

    optimizer = make_optimizer(model, LocalSettings())
    token_loss(model, windows()).backward()
    optimizer.step()
    # Stock matrices of no elements (shared experts that there are none of) have no moments.
    held = [p for p in model.parameters() if p.numel()]
    assert storage_bytes(p.grad for p in held if p.grad is not None) == expected
    moments = chain.from_iterable(
        (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in held
    )
    assert storage_bytes(moments) == 2 * expected
    everything = chain.from_iterable(state.values() for state in optimizer.state.values())
    assert storage_bytes(everything) == 2 * expected + 4 * len(held)


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("empty", [True, False])
def test_no_tensor_of_all_experts_ever_exists(
    shape: ModelSettings, routing: str, empty: bool
) -> None:
    shape = replace(shape, routing=routing)
    built(shape, device="meta")  # tries the router, once for all that are alike
    with CpuShapes() as spy:
        model = built(shape, LAYOUT.of_worker(0), empty=empty, seed=0)
        if not empty:
            optimizer = make_optimizer(model, LocalSettings())
            token_loss(model, windows()).backward()
            optimizer.step()
    assert (3, 8 if shape.family == "fomoe" else 16, 16) in spy.seen
    experts = [s for s in spy.seen if len(s) == 3 and sorted(s[1:]) in ([16, 16], [8, 16])]
    assert max(s[0] for s in experts) == 3
    assert ((6, 16) in spy.seen) == (routing == "skip_token")


def test_a_full_model_is_what_the_spy_would_catch() -> None:
    with CpuShapes() as spy:
        built(SHAPE, seed=0)
    assert {(6, 16, 16), (6, 16, 8), (6, 16)} <= spy.seen


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_skip_token_equals_stock_with_the_ghosts_outputs_zeroed(
    shape: ModelSettings, worker: int, norm_topk: bool, implementation: str
) -> None:
    if shape.family == "mixtral" and not norm_topk:
        pytest.skip("Mixtral always renormalises")
    shape, residents = replace(shape, norm_topk=norm_topk), LAYOUT.of_worker(worker)
    ours, reference = partial(shape, residents), stock(shape, implementation)
    zero_ghosts(reference, residents)
    torch.testing.assert_close(logits(ours), logits(reference), rtol=0, atol=1e-5)
    expected = resident_rows(gradients(reference), shape, residents)
    assert_close(gradients(ours), expected, atol=1e-5)


@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("residents", [((0, 2, 5), (1, 4)), ((3,), (0, 1, 2, 4, 5))], ids=str)
def test_partitioned_equals_stock_with_the_ghosts_logits_at_minus_infinity(
    shape: ModelSettings, norm_topk: bool, residents: Residents
) -> None:
    if shape.family == "mixtral" and not norm_topk:
        pytest.skip("Mixtral always renormalises")
    shape = replace(shape, routing="partitioned", norm_topk=norm_topk)
    if shape.family in SHARED_EXPERT_FAMILIES and min(map(len, residents)) < 2:
        with pytest.raises(InputError, match=r"cannot route over 1 expert\(s\).*raise layout"):
            partial(shape, residents)
        return
    ours, reference = partial(shape, residents), stock(shape)
    mask_ghosts(reference, residents)
    for layer, block in enumerate(moe_blocks(ours)):
        assert block.router.weight.shape == (len(residents[layer]), SHAPE.hidden_size)
        assert block.router.top_k == min(SHAPE.top_k, len(residents[layer]))
    torch.testing.assert_close(logits(ours), logits(reference), rtol=0, atol=1e-5)
    expected = resident_rows(gradients(reference), shape, residents)
    assert_close(gradients(ours), expected, atol=1e-5)


@pytest.mark.parametrize("residents", [None, [range(6), range(6)]], ids=["None", "all"])
def test_with_everything_resident_both_modes_are_the_stock_model(
    shape: ModelSettings, residents: Residents | None
) -> None:
    expected = stock(shape)
    for routing in MODES:
        ours = built(replace(shape, routing=routing), residents, seed=3)
        torch.testing.assert_close(logits(ours), logits(expected), rtol=0, atol=4e-6)
        assert_close(gradients(ours), gradients(expected), atol=4e-6)


@pytest.mark.parametrize("residents", [None, LAYOUT.of_worker(0)], ids=["full", "partial"])
def test_building_is_deterministic_and_leaves_the_callers_random_state(
    shape: ModelSettings, residents: Residents | None
) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = (state_of(built(shape, residents, seed=s)) for s in (1, 1, 2))
    built(shape, residents)
    built(shape, residents, empty=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(first, second, atol=0.0)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("routing", MODES)
def test_an_empty_model_has_its_buffers_and_only_lacks_parameters(
    shape: ModelSettings, routing: str
) -> None:
    shape, residents = replace(shape, routing=routing), LAYOUT.of_worker(1)
    model = built(shape, residents, empty=True)
    assert all(p.isnan().all() for p in model.parameters())
    load_state(model, resident_rows(state_of(built(shape, seed=3)), shape, residents))
    buffers = dict(model.named_buffers())
    slots = {name: buffers.pop(name) for name in list(buffers) if name.endswith("slot_of_expert")}
    expected = resident_rows(dict(stock(shape).named_buffers()), shape, residents)
    assert expected
    assert_close(buffers, expected, atol=0.0)
    table = [[3, 0, 3, 1, 2, 3], [0, 4, 1, 2, 4, 3]]
    assert [s.tolist() for s in slots.values()] == (table if routing == "skip_token" else [])
    assert logits(model).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("routing", MODES)
def test_gradient_checkpointing_gives_the_same_gradients(
    shape: ModelSettings, routing: str
) -> None:
    model = partial(replace(shape, routing=routing), LAYOUT.of_worker(0)).train()
    calls: list[int] = []
    for layer, block in enumerate(moe_blocks(model)):
        block.experts.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
    plain = gradients(model)
    assert calls == [0, 1]
    model.gradient_checkpointing_enable()
    assert_close(gradients(model), plain, atol=1e-7)
    assert calls[2:] == [0, 1, 1, 0]


@pytest.mark.parametrize("routing", MODES)
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "fomoe"])
def test_the_selection_bias_travels_with_the_router_rows(
    routing: str, family: str, of_family: Callable[[ModelSettings, str], ModelSettings]
) -> None:
    shape, residents = replace(of_family(SHAPE, family), routing=routing), LAYOUT.of_worker(0)
    reference, full = stock(shape), state_of(built(shape, seed=3))
    for layer, block in enumerate(moe_blocks(reference)):
        # Large enough to decide alone; in both layers it picks a resident and a ghost.
        bias = torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0, 0.0]).roll(-layer)
        block.router.e_score_correction_bias.copy_(bias)
        full[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = bias
    ours = built(shape, residents, empty=True)
    load_state(ours, resident_rows(full, shape, residents))
    for layer, block in enumerate(moe_blocks(ours)):
        rows = list(residents[layer]) if routing == "partitioned" else list(range(6))
        expected = torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0, 0.0]).roll(-layer)[rows]
        assert torch.equal(block.router.e_score_correction_bias, expected)
    if routing == "skip_token":
        zero_ghosts(reference, residents)
        torch.testing.assert_close(logits(ours), logits(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("routing", MODES)
def test_a_partial_model_generates(shape: ModelSettings, routing: str) -> None:
    model = partial(replace(shape, routing=routing), LAYOUT.of_worker(0)).eval()
    expected = windows()[:1, :4]
    out = model.generate(
        expected, attention_mask=torch.ones_like(expected), max_new_tokens=3, do_sample=False
    )
    with torch.no_grad():
        for _ in range(3):
            scores = model(input_ids=expected, use_cache=False).logits[:, -1]
            expected = F.pad(expected, (0, 1))
            expected[:, -1] = scores.argmax(-1)
    assert out.tolist() == expected.tolist()
