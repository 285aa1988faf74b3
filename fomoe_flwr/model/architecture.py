"""The architecture of a model that is described elsewhere, as its stock class says it.

The class is built on the meta device and asked for shapes, sparse layers, experts and routers. What
it says goes into the settings, so nobody who has them needs the description.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.errors import one_line
from fomoe_flwr.model.blocks import NO_EXPERTS, FamilyError, checked_blocks, num_experts, trial
from fomoe_flwr.model.experts import form_of
from fomoe_flwr.model.families import class_of, transformers_config
from fomoe_flwr.model.shape_trial import WITHOUT_WORK, check_shapes
from fomoe_flwr.parameters.keys import has_layer, layer_of

ENTRIES_OF: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "num_experts": ("n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts"),
    "top_k": ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"),
    "expert_size": ("moe_intermediate_size", "intermediate_size"),
    "num_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "tie_embeddings": ("tie_word_embeddings",),
    "norm_topk": ("norm_topk_prob",),
    "init_std": ("initializer_range",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "max_positions": ("max_position_embeddings",),
    "base_hidden_size": ("base_hidden_size",),
    "base_num_layers": ("base_num_layers",),
}
"""Our names of a shape and those of transformers' families, the first that a family knows."""


_SAID = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_heads"), int),
    **dict.fromkeys(("num_shared_experts", "max_positions"), int),
    **dict.fromkeys(("base_hidden_size", "base_num_layers"), int),
    **dict.fromkeys(("tie_embeddings", "norm_topk"), bool),
    **dict.fromkeys(("init_std", "norm_eps", "rope_theta"), float),
}
"""Fields that a configuration alone says, if it does, and their types."""

_SPARSE_LAYERS = (
    *("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "enable_moe_block"),
    *("mlp_only_layers", "decoder_sparse_step", "mlp_layer_types", "layers_block_type"),
)
"""Entries that say which layers have experts."""

OF_A_FILE = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("_name_or_path", "_experts_implementation", "_attn_implementation", "output_router_logits"),
}
"""Entries that speak of a file or a machine, not of the model."""


def described_settings(config: PreTrainedConfig) -> ModelSettings:
    """Return the settings of the model that a transformers configuration describes.

    Raises SettingsError, by name and with the reason, for one that cannot be trained here.
    """
    model = _on_meta(config)
    try:
        blocks = checked_blocks(model)
    except FamilyError as error:
        why = str(error) if str(error) != NO_EXPERTS else _why_none(config)
        raise _refusal(config, why) from error
    first = blocks[0]
    form, down = form_of(first.experts), first.experts.down_proj
    asked = trial(blocks[-1].router, config.hidden_size)
    top_k = asked[2].shape[1] if asked else _entry(config, "top_k")
    if not top_k:
        raise SettingsError(
            f"a {config.model_type} configuration says not how many experts a token takes: set "
            "model.top_k"
        )
    shape: dict[str, Any] = {
        "name": config.model_type,
        "family": config.model_type,
        "num_layers": 1
        + max(layer_of(key) for key, _ in model.named_parameters() if has_layer(key)),
        "num_experts": num_experts(first.experts),
        "expert_size": down.shape[1 if form.is_transposed else 2],
        "top_k": top_k,
        **said(config),
    }
    heads = shape.get("num_heads", 1)
    shape["num_kv_heads"] = kv_heads = _entry(config, "num_kv_heads") or heads
    if heads % kv_heads:
        entry = ENTRIES_OF["num_kv_heads"][0]
        raise SettingsError(
            f"model.num_kv_heads={kv_heads} ({entry}) must divide model.num_heads={heads}: set both"
        )
    shape["head_size"] = _entry(config, "head_size") or 0
    try:
        check_shapes(model)
    except FamilyError as error:
        raise _refusal(config, str(error)) from error
    architecture = {
        "config": entries_of(config),
        "groups": _groups(model),
        "has_bias": first.bias is not None,
        "attended": _attended(config, shape),
    }
    return ModelSettings(**shape, architecture=architecture)


def _why_none(config: PreTrainedConfig) -> str:
    """Say why a model may have no experts: what its class is, or what its entries are."""
    found = {entry: _read(config, entry) for entry in _SPARSE_LAYERS}
    words = [f"{entry}={value}" for entry, value in found.items() if value is not None]
    if words:
        return f"no layer of it is sparse ({', '.join(words)})"
    if _entry(config, "num_experts") is None:
        return f"{NO_EXPERTS}; model.upcycle makes a MoE of a dense Llama, Mistral or Qwen3"
    return NO_EXPERTS


def said(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that a configuration says, by the names of its entries alone."""
    found: dict[str, Any] = {}
    for name, kind in _SAID.items():
        value = _rope_theta(config) if name == "rope_theta" else _entry(config, name)
        if isinstance(value, int | float) and isinstance(value, bool) == (kind is bool):
            found[name] = kind(value)
    return found


def unsaid(model: ModelSettings) -> set[str]:
    """Return the fields of which a model's configuration says nothing."""
    return _SAID.keys() - said(transformers_config(model, 0))


def _rope_theta(config: PreTrainedConfig) -> Any:
    parameters = _read(config, "rope_parameters")
    if isinstance(parameters, Mapping):
        # Some have angles of each kind of layer: then there is no base for all.
        return parameters.get("rope_theta")
    return _read(config, "rope_theta")


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    kind = class_of(config)
    try:
        with torch.device("meta"):
            return kind._from_config(config, experts_implementation=WITHOUT_WORK)
    except Exception as error:  # each family refuses in its own way
        why = f"{kind.__name__} cannot be built: {one_line(error)}"
        own = vars(config).keys() - vars(PreTrainedConfig()).keys()
        empty = sorted(e for e in own if vars(config)[e] is None and not e.endswith("token_id"))
        if isinstance(error, TypeError) and empty:
            words = ", ".join(empty)
            why = f"{kind.__name__} cannot be built without {words}: give them by model.entries"
        raise _refusal(config, why) from error


def _groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Write down the tensors of a model, layers that are alike together."""
    parameters = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    buffers = {key: value for key, value in model.named_buffers() if key in persistent}
    layers: dict[int, dict[str, dict[str, list[int]]]] = {}
    for kind, tensors in (("parameters", parameters), ("buffers", buffers)):
        for key, value in tensors.items():
            number = layer_of(key) if has_layer(key) else -1
            layer = layers.setdefault(number, {"parameters": {}, "buffers": {}})
            layer[kind][key] = list(value.shape)
    groups: dict[str, dict[str, Any]] = {}
    for number in sorted(layers):
        own, kept = layers[number]["parameters"], layers[number]["buffers"]
        # Alike are layers whose names differ in the number alone.
        shapes = {**own, **kept}.items()
        alike = repr([(key.replace(f".{number}.", ".#.", 1), shape) for key, shape in shapes])
        group = groups.setdefault(alike, {"layers": [], "parameters": own, "buffers": kept})
        if number >= 0:
            group["layers"].append(number)
    return list(groups.values())


def _attended(config: PreTrainedConfig, shape: dict[str, Any]) -> int:
    """Return the widths of a key and a value of an attention head."""
    head = shape["head_size"] or shape["hidden_size"] // max(1, shape.get("num_heads") or 1)
    nope, rope = (_read(config, f"qk_{part}_head_dim") for part in ("nope", "rope"))
    key = nope + rope if nope and rope else head
    return int(key + (_read(config, "v_head_dim") or head))


def _entry(config: PreTrainedConfig, name: str) -> Any:
    found = (_read(config, entry) for entry in ENTRIES_OF[name])
    return next((value for value in found if value is not None), None)


def _read(config: PreTrainedConfig, entry: str) -> Any:
    try:
        return getattr(config, entry, None)
    except Exception:  # an entry of its own for each layer
        return None


def entries_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries that say what the model computes."""
    entries = config.to_dict() | {"model_type": config.model_type}
    return {key: _plain(each) for key, each in entries.items() if key not in OF_A_FILE}


def _plain(value: Any) -> Any:
    """Make a configuration a tree of what YAML and JSON know."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _refusal(config: PreTrainedConfig, why: str) -> SettingsError:
    return SettingsError(f"a model of the family {config.model_type} cannot be trained: {why}")
