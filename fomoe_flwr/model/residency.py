"""Residency: turn a stock model class into one that holds only some experts.

A ghost expert is never allocated: the model is built on the meta device, its expert parameters are
cut to `[R, ...]` there, and only then does memory appear. Which parameters are cut is decided by
`parameters.keys.is_expert_key` alone; a model of which that is not true is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fomoe_flwr.config import ModelSettings, RoutingMode
from fomoe_flwr.model.blocks import (
    FamilyError,
    MoeBlock,
    checked_blocks,
    moe_blocks,
    num_experts,
    score_function,
    trial,
)
from fomoe_flwr.model.experts import IMPLEMENTATION, register
from fomoe_flwr.model.families import class_of
from fomoe_flwr.model.head_loss import logit_multiplier
from fomoe_flwr.parameters.keys import is_expert_key

Residents = Sequence[Sequence[int]]
"""For every sparse layer the sorted ids of the experts that are held."""


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
    key by key; without it that is ordinary memory on `device`. Raises FamilyError for a model that
    cannot be trained here.
    """
    register()
    with torch.device("meta"), warnings.catch_warnings():
        # A stock block without shared experts still has their matrices, of no elements.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        built = class_of(config)._from_config(config, experts_implementation=IMPLEMENTATION)
    blocks = _known(built, model)
    built.logit_multiplier = logit_multiplier(built)
    if residents is not None:
        _cut(built, blocks, model, residents)
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


def _known(built: PreTrainedModel, model: ModelSettings) -> list[MoeBlock]:
    """Return the blocks of a whole model, and write down how their routers score."""
    try:
        blocks = checked_blocks(built)
    except FamilyError as error:
        raise FamilyError(f"model.family={model.family} cannot be trained: {error}") from error
    for block in blocks:
        block.router.score_function = score_function(block.router, built.config.hidden_size)
        for module in (block.router, block.owner):
            # Some blocks are the layer itself, which asks it whether to keep activations.
            if not isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(_draw_nothing)
    return blocks


def _draw_nothing(module: nn.Module, _: object) -> None:
    """Let a block route as when it does not train: noise would make runs differ by chance."""
    module.training = False


def _cut(
    model: PreTrainedModel, blocks: list[MoeBlock], settings: ModelSettings, residents: Residents
) -> None:
    """Replace, on meta, every per-expert parameter or buffer `[E, ...]` by one of `[R, ...]`."""
    routing, total = settings.routing_mode, num_experts(blocks[0].experts)
    for block, held in zip(blocks, residents, strict=True):
        if routing is RoutingMode.PARTITIONED:
            _narrow(model, block, settings, len(held), total)
        for name, tensor in (*block.owner.named_parameters(), *block.owner.named_buffers()):
            if is_expert_key(f"{block.path}.{name}", routing):
                owner_name, _, leaf = name.rpartition(".")
                shape = (len(held), *tensor.shape[1:])
                cut = torch.empty(shape, dtype=tensor.dtype, device="meta")
                value = nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut
                setattr(block.owner.get_submodule(owner_name), leaf, value)
        block.experts.num_experts = len(held)
        if routing is RoutingMode.SKIP_TOKEN:
            slots = torch.empty(total, dtype=torch.long, device="meta")
            block.experts.register_buffer("slot_of_expert", slots, persistent=False)
    if routing is RoutingMode.PARTITIONED:
        _check_narrowed(model, blocks, settings)


def _narrow(
    model: PreTrainedModel, block: MoeBlock, settings: ModelSettings, count: int, total: int
) -> None:
    """Make a router choose among `count` experts: what it picks are slots already."""
    if why := _whole_part(model, block, total):
        raise FamilyError(
            f"model.routing=partitioned is not possible with model.family={settings.family}: "
            f"{why}; use model.routing=skip_token"
        )
    for module in (block.router, block.owner):
        for name, value in vars(module).items():
            if type(value) is not int:
                continue
            if "expert" in name and value == total:
                setattr(module, name, count)
            elif ("top" in name or "per_tok" in name) and value == settings.top_k:
                setattr(module, name, min(value, count))


def _whole_part(model: PreTrainedModel, block: MoeBlock, total: int) -> str:
    """Say what of a router cannot be cut expert by expert; nothing if all can."""
    for name, value in (*block.router.named_parameters(), *block.router.named_buffers()):
        if not value.dim() or len(value) != total:
            return f"its router has {name}, which has no row for each expert"
    groups = getattr(model.config, "n_group", None)
    if groups not in (None, 1):
        return f"its router chooses among n_group={groups} groups of experts"
    return ""


def _check_narrowed(
    model: PreTrainedModel, blocks: list[MoeBlock], settings: ModelSettings
) -> None:
    """Refuse residents that are too few for a router: some rank a group by its best two."""
    fewest = min(blocks, key=lambda block: num_experts(block.experts))
    count = num_experts(fewest.experts)
    if count and trial(fewest.router, model.config.hidden_size) is None:
        raise FamilyError(
            f"model.family={settings.family} cannot route over {count} expert(s): with "
            "model.routing=partitioned every worker must hold more of each layer; raise "
            "layout.overlap"
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
    for block, experts in zip(moe_blocks(model), residents, strict=True):
        slots = getattr(block.experts, "slot_of_expert", None)
        if slots is not None:
            held = torch.tensor(experts, dtype=torch.long, device=slots.device)
            slots.fill_(len(experts))
            slots[held] = torch.arange(len(held), device=slots.device)
