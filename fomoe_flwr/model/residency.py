"""Residency: turn a stock model class into one that holds only some experts.

A ghost expert is never allocated: the model is built on the meta device, its expert parameters are
cut to `[R, ...]` there, and only then does memory appear. Which parameters are cut is decided by
`parameters.keys.is_expert_key` alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fomoe_flwr.config import ModelSettings, RoutingMode
from fomoe_flwr.errors import InputError
from fomoe_flwr.model.experts import IMPLEMENTATION, register
from fomoe_flwr.model.families import FAMILIES
from fomoe_flwr.parameters.keys import is_expert_key, layer_of

Residents = Sequence[Sequence[int]]
"""For every layer the sorted ids of the experts that are held."""


Place = Callable[[str, Tensor], Tensor]
"""Makes the memory of a state key, given the tensor without memory whose place it takes."""


def build_model(
    model: ModelSettings,
    config: PreTrainedConfig,
    residents: Residents | None = None,
    *,
    device: str | torch.device = "cpu",
    seed: int | None = None,
    empty: bool = False,
    arrange: Callable[[PreTrainedModel], None] | None = None,
    place: Place | None = None,
) -> PreTrainedModel:
    """Build a model that holds `residents` per layer (None = all experts).

    The stock initialisation runs under `seed` (the caller's random state is left alone); with
    `empty=True` parameters are left uninitialised, for a caller that overwrites all of them.
    `arrange` gets the model before it has memory. `place` makes the memory of the model's state,
    key by key; without it that is ordinary memory on `device`.
    """
    register()
    family = FAMILIES[model.family]
    with torch.device("meta"), warnings.catch_warnings():
        # A stock block without shared experts still has their matrices, of no elements.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        built = family.model_class._from_config(config, experts_implementation=IMPLEMENTATION)
    for _, block in moe_blocks(built):
        block.gate.score_function = family.score_function
    if residents is not None:
        _cut(built, model, residents)
    if arrange is not None:
        arrange(built)
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        if torch.device(device).type != "meta":
            if place is None:
                built.to_empty(device=device)
            else:
                _settle(built, place)
            _initialise(built, empty)
    built.tie_weights()
    if residents is not None and torch.device(device).type != "meta":
        fill_slots(built, residents)
    return built


def build_skeleton(
    model: ModelSettings, config: PreTrainedConfig, device: torch.device
) -> PreTrainedModel:
    """Build the whole model without memory for its state; what is computed lies on `device`."""
    built = build_model(model, config, device="meta")
    for module in built.modules():
        for name in module._non_persistent_buffers_set:
            value = module._buffers[name]
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device=device)
    _initialise(built, empty=True)
    return built.eval()


def moe_blocks(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield (layer, block) for every layer that has a router `gate` and `experts`."""
    for name, module in model.named_modules():
        if hasattr(module, "gate") and hasattr(module, "experts"):
            yield layer_of(f".{name}."), module


def _cut(model: PreTrainedModel, settings: ModelSettings, residents: Residents) -> None:
    """Replace, on meta, every per-expert parameter or buffer `[E, ...]` by one of `[R, ...]`."""
    routing, family = settings.routing_mode, FAMILIES[settings.family]
    if routing is RoutingMode.PARTITIONED:
        fewest = min(map(len, residents))
        if fewest < family.min_scored_experts:
            raise InputError(
                f"model.family={settings.family} cannot route over {fewest} expert(s): with "
                f"model.routing=partitioned every worker must hold at least "
                f"{family.min_scored_experts} of each layer; raise layout.overlap"
            )
    state = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in state:
        if is_expert_key(name, routing):
            owner_name, _, leaf = name.rpartition(".")
            rows = len(residents[layer_of(name)])
            cut = torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
            value = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut
            setattr(model.get_submodule(owner_name), leaf, value)
    for layer, block in moe_blocks(model):
        count = len(residents[layer])
        block.experts.num_experts = count
        if routing is RoutingMode.PARTITIONED:
            # The router has rows for residents only, so what it picks are slots already.
            block.gate.num_experts = count
            block.gate.top_k = min(settings.top_k, count)
        else:
            block.experts.register_buffer(
                "slot_of_expert",
                torch.empty(settings.num_experts, dtype=torch.long, device="meta"),
                persistent=False,
            )


def _settle(model: PreTrainedModel, place: Place) -> None:
    """Give a model without memory the memory of `place` for its state, and ordinary for the rest.

    A weight that will be tied to another one gets ordinary memory: initialisation fills it too, so
    that all numbers are those of a model that is built at once.
    """
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    persistent = model.state_dict(keep_vars=True).keys()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for kind in (module._parameters, module._buffers):
            for name, value in kind.items():
                if value is None:
                    continue
                key = prefix + name
                is_kept = key in persistent and key not in tied
                made = place(key, value) if is_kept else torch.empty_like(value, device="cpu")
                if isinstance(value, nn.Parameter) and not isinstance(made, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=False)
                kind[name] = made


def _initialise(model: PreTrainedModel, empty: bool) -> None:
    if empty:
        # Rotary tables are buffers that initialisation would have filled: parameters are marked
        # as done, so that only those are.
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()


def fill_slots(model: PreTrainedModel, residents: Residents) -> None:
    """Write down which expert lies in which slot, for residents of the same numbers per layer.

    Nothing else in a model that was built for some residents depends on which they are.
    """
    for layer, block in moe_blocks(model):
        slots = getattr(block.experts, "slot_of_expert", None)
        if slots is not None:
            held = torch.tensor(residents[layer], dtype=torch.long, device=slots.device)
            slots.fill_(len(residents[layer]))
            slots[held] = torch.arange(len(held), device=slots.device)
