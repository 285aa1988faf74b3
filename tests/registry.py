"""Every causal MoE model that the installed transformers knows, at a tiny size.

The families are read from transformers itself: whatever has the experts interface is in.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

HIDDEN, LAYERS, EXPERTS, TOP_K, VOCABULARY = 32, 4, 8, 2, 300

_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "moe_shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
}
"""Entries for every family that knows them."""

_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
_OWN: dict[str, dict[str, Any]] = {
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR
    | {
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 1,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Entries that one family needs besides, or instead."""


def families() -> list[str]:
    """List the model types whose causal language model has the experts interface."""
    found: dict[str, list[str]] = {}
    for kind, name in CONFIG_MAPPING.items():
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        model = MODEL_FOR_CAUSAL_LM_MAPPING[name]
        model = model[0] if isinstance(model, tuple) else model
        source = inspect.getsource(sys.modules[model.__module__])
        is_theirs = model.__module__.startswith("transformers.")
        is_text = is_theirs and model.__name__.endswith("ForCausalLM")
        if is_text and "@use_experts_implementation" in source:
            # A model of pictures and text has its text part's class, under a second name.
            found.setdefault(model.__name__, []).append(kind)
    return sorted(max(kinds, key=lambda kind: kind.endswith("_text")) for kinds in found.values())


def tiny(family: str) -> PreTrainedConfig:
    """Return a tiny configuration of a family."""
    kind = CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    entries = {name: value for name, value in _TINY.items() if name in known}
    if "qk_rope_head_dim" in entries:  # latent attention: its heads have two widths
        entries |= {"num_key_value_heads": 4}
        entries.pop("head_dim", None)
    return kind(**entries | _OWN.get(family, {}))
