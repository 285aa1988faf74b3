"""Names and shapes of every family's parameters, in closed form: no torch, no model is built.

The names are those of transformers. A test compares each family with the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fomoe_flwr.config import BIASED_FAMILIES, ModelSettings, SettingsError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LatentSizes:
    """Widths of DeepSeek's latent attention, derived from the shape that all families share."""

    head: int
    """Query, key and value width of a head, without the rotary part."""
    rotary: int
    query_rank: int
    key_value_rank: int


def head_size(model: ModelSettings) -> int:
    """Return the width of an attention head."""
    return model.head_size or model.hidden_size // model.num_heads


def latent_sizes(model: ModelSettings) -> LatentSizes:
    """Derive latent attention: rotary half a head (even), queries compressed to D/2, keys to D/4.

    DeepSeek-V3 itself (D = 7168) has half a head, D/4.7 and D/14; small models have no such slack.
    """
    head = head_size(model)
    return LatentSizes(
        head=head,
        rotary=2 * -(-head // 4),
        query_rank=max(1, model.hidden_size // 2),
        key_value_rank=max(1, model.hidden_size // 4),
    )


def parameter_shapes(model: ModelSettings) -> Shapes:
    """Return name and shape of every parameter, as `transformers` has them.

    Experts are stacked along the first axis. Raises SettingsError for a family without cost model.
    """
    if model.family not in _LAYERS:
        raise SettingsError(
            f"model.family={model.family} has no cost model: it is not one of {', '.join(_LAYERS)}"
        )
    shapes: Shapes = {"model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    layer_shapes = _LAYERS[model.family](model)
    for layer in range(model.num_layers):
        shapes |= {f"model.layers.{layer}.{key}": shape for key, shape in layer_shapes.items()}
    if model.family == "fomoe":
        shapes["model.embed_norm.weight"] = (model.hidden_size,)
    shapes["model.norm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def one_layer_shapes(model: ModelSettings) -> Shapes:
    """Return the shapes outside the layers and those of one layer: all layers are alike."""
    return parameter_shapes(replace(model, num_layers=1))


def buffer_shapes(model: ModelSettings) -> Shapes:
    """Return name and shape of every persistent buffer: it travels, but nothing trains it."""
    if model.family not in BIASED_FAMILIES:
        return {}
    return {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias": (model.num_experts,)
        for layer in range(model.num_layers)
    }


def _attention(model: ModelSettings) -> Shapes:
    hidden, head = model.hidden_size, head_size(model)
    query, key_value = model.num_heads * head, model.num_kv_heads * head
    return {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
    }


def _latent_attention(model: ModelSettings) -> Shapes:
    hidden, heads, sizes = model.hidden_size, model.num_heads, latent_sizes(model)
    return {
        "self_attn.q_a_proj.weight": (sizes.query_rank, hidden),
        "self_attn.q_a_layernorm.weight": (sizes.query_rank,),
        "self_attn.q_b_proj.weight": (heads * (sizes.head + sizes.rotary), sizes.query_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (sizes.key_value_rank + sizes.rotary, hidden),
        "self_attn.kv_a_layernorm.weight": (sizes.key_value_rank,),
        "self_attn.kv_b_proj.weight": (heads * 2 * sizes.head, sizes.key_value_rank),
        "self_attn.o_proj.weight": (hidden, heads * sizes.head),
    }


def _experts(model: ModelSettings, up: str = "gate_up_proj") -> Shapes:
    experts, size, hidden = model.num_experts, model.expert_size, model.hidden_size
    return {
        "mlp.gate.weight": (experts, hidden),
        f"mlp.experts.{up}": (experts, size if up == "up_proj" else 2 * size, hidden),
        "mlp.experts.down_proj": (experts, hidden, size),
    }


def _shared_experts(model: ModelSettings) -> Shapes:
    hidden, size = model.hidden_size, model.num_shared_experts * model.expert_size
    return {
        "mlp.shared_experts.gate_proj.weight": (size, hidden),
        "mlp.shared_experts.up_proj.weight": (size, hidden),
        "mlp.shared_experts.down_proj.weight": (hidden, size),
    }


def _norms(model: ModelSettings, *more: str) -> Shapes:
    names = ("input_layernorm", "post_attention_layernorm", *more)
    return {f"{name}.weight": (model.hidden_size,) for name in names}


def _head_norms(query: int, key: int) -> Shapes:
    return {"self_attn.q_norm.weight": (query,), "self_attn.k_norm.weight": (key,)}


def _olmoe(model: ModelSettings) -> Shapes:
    # OLMoE normalises queries and keys over all heads at once ...
    head = head_size(model)
    norms = _head_norms(model.num_heads * head, model.num_kv_heads * head)
    return _attention(model) | norms | _experts(model) | _norms(model)


def _qwen3_moe(model: ModelSettings) -> Shapes:
    # ... Qwen3-MoE normalises each head, with one weight for all heads.
    norms = _head_norms(head_size(model), head_size(model))
    return _attention(model) | norms | _experts(model) | _norms(model)


def _mixtral(model: ModelSettings) -> Shapes:
    return _attention(model) | _experts(model) | _norms(model)


def _deepseek_v3(model: ModelSettings) -> Shapes:
    return _latent_attention(model) | _experts(model) | _shared_experts(model) | _norms(model)


def _glm4_moe(model: ModelSettings) -> Shapes:
    return _attention(model) | _experts(model) | _shared_experts(model) | _norms(model)


def _fomoe(model: ModelSettings) -> Shapes:
    norms = _norms(model, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return _attention(model) | _experts(model, "up_proj") | norms


_LAYERS: dict[str, Callable[[ModelSettings], Shapes]] = {
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "fomoe": _fomoe,
}
