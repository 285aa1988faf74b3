"""The architecture of a model that is described elsewhere, as its stock class says it.

The class is built on the meta device and asked for shapes, sparse layers, experts and routers. What
it says goes into the settings, so nobody who has them needs the description.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.errors import one_line
from fomoe_flwr.model.blocks import FamilyError, checked_blocks, num_experts, trial
from fomoe_flwr.model.experts import form_of
from fomoe_flwr.model.families import class_of, config_class
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
    "norm_eps": ("rms_norm_eps",),
}
"""Our names of a shape and those of transformers' families, the first that a family knows."""


_OF_A_FILE = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("_name_or_path", "_experts_implementation", "_attn_implementation", "output_router_logits"),
}
"""Entries that speak of a file or a machine, not of the model."""


def fresh_settings(model: ModelSettings, own: Iterable[str]) -> ModelSettings:
    """Return the settings of a new model of the family `model.config`.

    `own` are the fields of `model` that count; the rest is the family's default.
    """
    kind = config_class(model.config)
    known, entries, spoken = _known_entries(kind), dict[str, Any](), dict[str, str]()
    for name in sorted(set(own) & ENTRIES_OF.keys()):
        entry = next((e for e in ENTRIES_OF[name] if e in known), ENTRIES_OF[name][0])
        entries[entry], spoken[entry] = getattr(model, name), f"model.{name}"
    for entry, value in model.entries.items():
        entries[entry], spoken[entry] = value, f"model.entries.{entry}"
    described = described_settings(_made(model.config, kind, entries))
    # Some classes read entries that they do not list: then the model is another one with them.
    for entry in sorted(entries.keys() - known):
        others = {name: value for name, value in entries.items() if name != entry}
        without = described_settings(_made(model.config, kind, others))
        if without.architecture["groups"] == described.architecture["groups"]:
            raise SettingsError(
                f"{spoken[entry]}={entries[entry]} has no meaning for model.config={model.config}; "
                "entries of its own go into model.entries"
            )
    return described


def _made(family: str, kind: type[PreTrainedConfig], entries: dict[str, Any]) -> PreTrainedConfig:
    try:
        return kind(**entries)
    except Exception as error:  # each family refuses in its own way
        raise SettingsError(f"model.config={family} cannot be made: {one_line(error)}") from error


def described_settings(config: PreTrainedConfig) -> ModelSettings:
    """Return the settings of the model that a transformers configuration describes.

    Raises SettingsError, by name and with the reason, for one that cannot be trained here.
    """
    model = _on_meta(config)
    try:
        blocks = checked_blocks(model)
    except FamilyError as error:
        raise _refusal(config, str(error)) from error
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
        "num_shared_experts": 0,
        "pretrained": "",
    }
    for name in ("vocab_size", "hidden_size", "num_heads", "tie_embeddings", "init_std"):
        value = _entry(config, name)
        if value is not None:
            shape[name] = value
    heads = shape.get("num_heads", 1)
    shape["num_kv_heads"] = kv_heads = _entry(config, "num_kv_heads") or heads
    if heads % kv_heads:
        entry = ENTRIES_OF["num_kv_heads"][0]
        raise SettingsError(
            f"model.num_kv_heads={kv_heads} ({entry}) must divide model.num_heads={heads}: set both"
        )
    shape["head_size"] = _entry(config, "head_size") or 0
    architecture = {
        "config": entries_of(config),
        "groups": _groups(model),
        "has_bias": first.bias is not None,
        "attended": _attended(config, shape),
    }
    return ModelSettings(**shape, architecture=architecture)


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    kind = class_of(config)
    try:
        with torch.device("meta"):
            return kind._from_config(config)
    except Exception as error:  # each family refuses in its own way
        raise _refusal(config, f"{kind.__name__} cannot be built: {one_line(error)}") from error


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


def _known_entries(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the entries that a configuration class takes, its aliases included."""
    names = {name for name in vars(kind()) if not name.startswith("_")}
    taken = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    return names | taken | set(kind.attribute_map)


def entries_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries that say what the model computes."""
    entries = config.to_dict() | {"model_type": config.model_type}
    return {key: _plain(each) for key, each in entries.items() if key not in _OF_A_FILE}


def _plain(value: Any) -> Any:
    """Make a configuration a tree of what YAML and JSON know."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def _refusal(config: PreTrainedConfig, why: str) -> SettingsError:
    return SettingsError(f"a model of the family {config.model_type} cannot be trained: {why}")
