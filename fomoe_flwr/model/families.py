"""Model families: how our names for a shape map to a transformers configuration, and its class.

A family needs the v5 experts interface of transformers, nothing else: its stock class carries the
model, so a checkpoint we export is an ordinary one. `fomoe`, the paper's block, is a class of ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    logging,
)

from fomoe_flwr.config import ModelSettings, SettingsError, did_you_mean
from fomoe_flwr.model.fomoe import FomoeConfig, FomoeForCausalLM
from fomoe_flwr.parameters.shapes import head_size, latent_sizes

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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


FAMILIES: dict[str, Callable[[ModelSettings], dict[str, Any]]] = {
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "fomoe": _fomoe,
}
"""Families whose shape the settings name, with the entries that only this family has, or names
differently. All others come with a whole configuration (`model.config`, `model.pretrained`)."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers says to itself from a person who gets one line from us."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def config_class(family: str, setting: str = "model.family") -> type[PreTrainedConfig]:
    """Return the configuration class of a family. Raises SettingsError for one that is unknown."""
    if family == FomoeConfig.model_type:
        return FomoeConfig
    if family not in CONFIG_MAPPING:
        raise SettingsError(
            f"{setting}={family} is not a model type that the installed transformers knows"
            f"{did_you_mean(family, CONFIG_MAPPING)}"
        )
    found: type[PreTrainedConfig] = CONFIG_MAPPING[family]
    return found


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return what a model of pictures and text says of its text; any other is its own part."""
    found: PreTrainedConfig = config.get_text_config()
    return found


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the causal language model of a configuration. Raises SettingsError without one."""
    if isinstance(config, FomoeConfig):
        return FomoeForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise SettingsError(
            f"the family {config.model_type} has no causal language model in transformers: choose "
            "another by model.config or model.pretrained"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    made: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return made


def model_class(family: str) -> type[PreTrainedModel]:
    """Return the transformers class of a family."""
    return class_of(config_class(family)())


def transformers_config(model: ModelSettings, sequence_length: int) -> PreTrainedConfig:
    """Translate a shape into its family's transformers configuration.

    The balance loss is ours (`model.router_probe`), so the stock one is switched off. It has no
    token ids, which matter to an export only: training has neither padding nor generation.
    """
    if model.architecture:
        return _described(model)
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_experts_per_tok": model.top_k,
        "norm_topk_prob": model.norm_topk,
        "max_position_embeddings": model.max_positions or max(sequence_length, 2048),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        **dict.fromkeys(TOKEN_IDS),
        "attention_dropout": 0.0,
        "output_router_logits": False,
    }
    if model.norm_eps:
        common["rms_norm_eps"] = model.norm_eps
    if model.rope_theta:
        common["rope_theta"] = model.rope_theta
    return config_class(model.family)(**(common | FAMILIES[model.family](model)))


def _described(model: ModelSettings) -> PreTrainedConfig:
    """Return the configuration that a checkpoint or a family's defaults came with.

    Dropout is off: copies of an expert on several workers would differ by chance.
    """
    entries = model.architecture["config"]
    config = config_class(model.family).from_dict(entries)
    for name, value in vars(config).items():
        if "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    for name in TOKEN_IDS:
        setattr(config, name, None)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    return config
