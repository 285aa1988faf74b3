"""Model families: how our names for a shape map to each transformers configuration.

A family needs the v5 experts interface of transformers, nothing else: its stock class carries the
model, so a checkpoint we export is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fomoe_flwr.config import ModelSettings


def _olmoe(model: ModelSettings, common: dict[str, Any]) -> PreTrainedConfig:
    return OlmoeConfig(
        **common,
        intermediate_size=model.expert_size,
        num_experts=model.num_experts,
    )


def _qwen3_moe(model: ModelSettings, common: dict[str, Any]) -> PreTrainedConfig:
    head_size: dict[str, Any] = {"head_dim": model.hidden_size // model.num_heads}
    return Qwen3MoeConfig(
        **common,
        **head_size,
        # Every layer is sparse, so the dense width is never used; it must still be a number.
        intermediate_size=model.expert_size,
        moe_intermediate_size=model.expert_size,
        num_experts=model.num_experts,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        use_sliding_window=False,
    )


FAMILIES: dict[
    str,
    tuple[type[PreTrainedModel], Callable[[ModelSettings, dict[str, Any]], PreTrainedConfig]],
] = {
    "olmoe": (OlmoeForCausalLM, _olmoe),
    "qwen3_moe": (Qwen3MoeForCausalLM, _qwen3_moe),
}


def model_class(family: str) -> type[PreTrainedModel]:
    """Return the stock transformers class of a family."""
    return FAMILIES[family][0]


def transformers_config(
    model: ModelSettings,
    sequence_length: int,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedConfig:
    """Translate a shape into its family's transformers configuration.

    The balance loss is ours (`model.router_probe`), so the stock one is switched off. Token ids
    matter to an export only: training has neither padding nor generation.
    """
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_experts_per_tok": model.top_k,
        "norm_topk_prob": model.norm_topk,
        "max_position_embeddings": max(sequence_length, 2048),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "eos_token_id": eos_token_id,
        "bos_token_id": None,
        "pad_token_id": pad_token_id,
        "attention_dropout": 0.0,
        "output_router_logits": False,
    }
    return FAMILIES[model.family][1](model, common)
