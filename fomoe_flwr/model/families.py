"""Model families: how our names for a shape map to each transformers configuration.

A family needs the v5 experts interface of transformers, nothing else: its stock class carries the
model, so a checkpoint we export is an ordinary one. `fomoe`, the paper's block, is a class of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fomoe_flwr.config import ModelSettings
from fomoe_flwr.model.fomoe import FomoeConfig, FomoeForCausalLM
from fomoe_flwr.parameters.shapes import head_size, latent_sizes


def _olmoe(model: ModelSettings) -> dict[str, Any]:
    return {"intermediate_size": model.expert_size, "num_experts": model.num_experts}


def _qwen3_moe(model: ModelSettings) -> dict[str, Any]:
    return {
        "head_dim": head_size(model),
        # Every layer is sparse, so the dense width is never used; it must still be a number.
        "intermediate_size": model.expert_size,
        "moe_intermediate_size": model.expert_size,
        "num_experts": model.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def _mixtral(model: ModelSettings) -> dict[str, Any]:
    return {
        "head_dim": head_size(model),
        "intermediate_size": model.expert_size,
        "num_local_experts": model.num_experts,
        "sliding_window": None,
    }


def _all_sparse(model: ModelSettings) -> dict[str, Any]:
    """Return what the DeepSeek-V3 line of configurations has in common, without its extras."""
    return {
        "intermediate_size": model.expert_size,
        "moe_intermediate_size": model.expert_size,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "first_k_dense_replace": 0,
        # One group: routing limited to groups of experts has no meaning for a part of them.
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_mtp_layers": 0,
    }


def _deepseek_v3(model: ModelSettings) -> dict[str, Any]:
    sizes = latent_sizes(model)
    return _all_sparse(model) | {
        "q_lora_rank": sizes.query_rank,
        "kv_lora_rank": sizes.key_value_rank,
        "qk_nope_head_dim": sizes.head,
        "qk_rope_head_dim": sizes.rotary,
        "v_head_dim": sizes.head,
    }


def _glm4_moe(model: ModelSettings) -> dict[str, Any]:
    return _all_sparse(model) | {"head_dim": head_size(model)}


def _fomoe(model: ModelSettings) -> dict[str, Any]:
    return {
        "head_dim": head_size(model),
        "moe_intermediate_size": model.expert_size,
        "num_experts": model.num_experts,
        "base_hidden_size": model.base_hidden_size,
        "base_num_layers": model.base_num_layers,
    }


@dataclass(frozen=True)
class Family:
    """One line of models and what the rest of the package must know about it."""

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    own_settings: Callable[[ModelSettings], dict[str, Any]]
    """Configuration entries that only this family has, or names differently."""
    score_function: str = "softmax"
    """How the router makes scores of logits: `softmax` or `sigmoid`."""
    min_scored_experts: int = 0
    """Fewest experts that the router can score; DeepSeek's ranks a group by its best two."""


FAMILIES: dict[str, Family] = {
    "olmoe": Family(OlmoeForCausalLM, OlmoeConfig, _olmoe),
    "qwen3_moe": Family(Qwen3MoeForCausalLM, Qwen3MoeConfig, _qwen3_moe),
    "mixtral": Family(MixtralForCausalLM, MixtralConfig, _mixtral),
    "deepseek_v3": Family(
        DeepseekV3ForCausalLM, DeepseekV3Config, _deepseek_v3, "sigmoid", min_scored_experts=2
    ),
    "glm4_moe": Family(
        Glm4MoeForCausalLM, Glm4MoeConfig, _glm4_moe, "sigmoid", min_scored_experts=2
    ),
    "fomoe": Family(FomoeForCausalLM, FomoeConfig, _fomoe, "sigmoid"),
}


def model_class(family: str) -> type[PreTrainedModel]:
    """Return the transformers class of a family."""
    return FAMILIES[family].model_class


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
    family = FAMILIES[model.family]
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
    if model.norm_eps:
        common["rms_norm_eps"] = model.norm_eps
    if model.rope_theta:
        common["rope_theta"] = model.rope_theta
    return family.config_class(**(common | family.own_settings(model)))
