"""Names and shapes of a model's parameters: no torch, no model is built.

Of the families of our presets in closed form: the names are those of transformers, and a test
compares each family with the model itself. Of any other model its class says them
(`model.architecture`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.parameters.keys import is_any_expert_key

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


@dataclass(frozen=True)
class LayerGroup:
    """Decoder layers that are alike, or (without numbers) what lies outside of all."""

    numbers: tuple[int, ...]
    shapes: Shapes
    """Shapes of one layer's parameters, under the names of the first."""
    buffers: Shapes
    """Shapes of its persistent buffers: they travel, but nothing trains them."""

    @property
    def copies(self) -> int:
        """How many times the model has these tensors."""
        return max(1, len(self.numbers))

    @property
    def is_sparse(self) -> bool:
        """Whether these layers have experts."""
        return any(is_any_expert_key(key) for key in self.shapes)

    def named(self, shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) for every layer of the group."""
        if not self.numbers:
            yield from shapes.items()
        for number in self.numbers:
            for key, shape in shapes.items():
                yield key.replace(f".{self.numbers[0]}.", f".{number}.", 1), shape


def layer_groups(model: ModelSettings) -> list[LayerGroup]:
    """Return a model's tensors, layers that are alike together; experts on the first axis.

    Raises SettingsError for a family whose shape the settings do not name.
    """
    if model.architecture:
        return [
            LayerGroup(
                tuple(group["layers"]),
                {key: tuple(shape) for key, shape in group["parameters"].items()},
                {key: tuple(shape) for key, shape in group["buffers"].items()},
            )
            for group in model.architecture["groups"]
        ]
    if model.family not in _LAYERS:
        raise SettingsError(
            f"model.family={model.family} has no cost model: it is not one of {', '.join(_LAYERS)}"
        )
    outside: Shapes = {"model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    if model.family == "fomoe":
        outside["model.embed_norm.weight"] = (model.hidden_size,)
    outside["model.norm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        outside["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    shapes = {f"model.layers.0.{key}": s for key, s in _LAYERS[model.family](model).items()}
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    buffers: Shapes = {bias: (model.num_experts,)} if model.has_selection_bias else {}
    return [
        LayerGroup((), outside, {}),
        LayerGroup(tuple(range(model.num_layers)), shapes, buffers),
    ]


def num_sparse_layers(model: ModelSettings) -> int:
    """Return how many layers have experts: the rows of a layout."""
    if not model.architecture:
        return model.num_layers
    return sum(len(group.numbers) for group in layer_groups(model) if group.is_sparse)


def parameter_shapes(model: ModelSettings) -> Shapes:
    """Return name and shape of every parameter, as `transformers` has them."""
    return {k: s for group in layer_groups(model) for k, s in group.named(group.shapes)}


def buffer_shapes(model: ModelSettings) -> Shapes:
    """Return name and shape of every persistent buffer."""
    return {k: s for group in layer_groups(model) for k, s in group.named(group.buffers)}


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
