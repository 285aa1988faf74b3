"""The FoMoE decoder (arXiv 2606.19025) as a transformers model.

Exported beside the weights, so it may import torch, transformers and the configuration beside it.

The paper leaves open which normalisation it uses: RMSNorm with a weight here, as in today's
decoders. CompleteP's rules for router and experts are those of arXiv 2508.09752: experts are hidden
matrices, the router is an output matrix, whose logits are divided by m_d.

Shape legend: B sequences, S positions, T = B * S tokens, D model width, H heads, P head width,
E experts, K chosen experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_fomoe import FomoeConfig


class FomoeRMSNorm(nn.Module):
    """Root-mean-square normalisation; of a zero vector, as all-ghost tokens give, it makes zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis, in fp32."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(positions_BS: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each [B, 1, S, P], of the rotary angles in fp32."""
    pairs = torch.arange(0, width, 2, device=positions_BS.device, dtype=torch.float32)
    angles = positions_BS[:, None, :, None].float() * theta ** -(pairs / width)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x_BHSP: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + P/2) of a head by its angle."""
    cosine, sine = tables
    left, right = x_BHSP.float().chunk(2, -1)
    turned = torch.cat((left, right), -1) * cosine + torch.cat((-right, left), -1) * sine
    return turned.to(x_BHSP.dtype)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_others: Any,
) -> tuple[Tensor, Tensor]:
    """Attend without any kernel; chosen by `attn_implementation="eager"`."""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.float().softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class FomoeAttention(nn.Module):
    """Multi-head attention with rotary positions; its logits are divided by the head width."""

    def __init__(self, config: FomoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = 1.0 / config.head_dim
        self.is_causal = True
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        tables: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the positions; extends the cache if there is one. Return weights where there are."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        query, key, value = (
            project(x_BSD).view(heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, tables), rotate(key, tables)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, plain_attention
        )
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(mixed.reshape(*x_BSD.shape[:2], -1)), weights


class FomoeRouter(nn.Module):
    """Sigmoid scores of all experts; the chosen ones are not renormalised (paper section 3.2).

    `e_score_correction_bias` takes part in the choice only; the paper has none, so it stays zero
    unless loss-free balancing moves it (arXiv 2408.15664).
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.multiplier = 1.0 / config.width_multiplier
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [T, E], weights [T, K] and indices [T, K]."""
        logits_TE = F.linear(x_TD, self.weight).float() * self.multiplier
        score_TE = logits_TE.sigmoid()
        index_TK = (score_TE + self.e_score_correction_bias).topk(self.top_k, -1).indices
        weight_TK = score_TE.gather(1, index_TK)
        if self.norm_topk_prob:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return logits_TE, weight_TK.to(x_TD.dtype), index_TK


@use_experts_implementation(has_gate=False)
class FomoeExperts(nn.Module):
    """Experts of two matrices: W2 act(W1 x)."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Loop over the experts; chosen by `experts_implementation="eager"`."""
        out_TD = torch.zeros_like(x_TD)
        # One unbind: indexing in the loop would make backward quadratic in the experts.
        pairs = zip(self.up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        for expert, (up_FD, down_DF) in enumerate(pairs):
            token_N, choice_N = (top_k_index == expert).nonzero(as_tuple=True)
            y_ND = F.linear(self.act_fn(F.linear(x_TD[token_N], up_FD)), down_DF)
            y_ND = y_ND * top_k_weights[token_N, choice_N, None]
            out_TD = out_TD.index_add(0, token_N, y_ND.to(out_TD.dtype))
        return out_TD


class FomoeSparseBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__()
        self.gate = FomoeRouter(config)
        self.experts = FomoeExperts(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Sum the chosen experts' outputs."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        _, weight_TK, index_TK = self.gate(x_TD)
        return self.experts(x_TD, index_TK, weight_TK).view_as(x_BSD)


class FomoeDecoderLayer(GradientCheckpointingLayer):
    """Peri-LN: each branch is normalised before and after, then scaled by m_L ** -alpha."""

    def __init__(self, config: FomoeConfig, layer_idx: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = FomoeAttention(config, layer_idx)
        self.mlp = FomoeSparseBlock(config)
        self.input_layernorm = FomoeRMSNorm(size, eps)
        self.post_attention_layernorm = FomoeRMSNorm(size, eps)
        self.pre_feedforward_layernorm = FomoeRMSNorm(size, eps)
        self.post_feedforward_layernorm = FomoeRMSNorm(size, eps)
        self.multiplier = config.branch_multiplier

    def forward(self, x_BSD: Tensor, **attention: Any) -> Tensor:
        """Add both branches to the residual stream."""
        mixed, _ = self.self_attn(self.input_layernorm(x_BSD), **attention)
        x_BSD = x_BSD + self.multiplier * self.post_attention_layernorm(mixed)
        routed = self.mlp(self.pre_feedforward_layernorm(x_BSD))
        return x_BSD + self.multiplier * self.post_feedforward_layernorm(routed)


class FomoePreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the model."""

    config_class = FomoeConfig
    config: FomoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] | None = ["FomoeDecoderLayer"]
    _skip_keys_device_placement: list[str] | None = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: dict[str, Any] = {
        "hidden_states": FomoeDecoderLayer,
        "attentions": FomoeAttention,
        "router_logits": OutputRecorder(FomoeRouter, index=0),
    }
    _keep_in_fp32_modules_strict: list[str] | None = ["e_score_correction_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw hidden matrices with variance / m_d, embedding and router with the base variance."""
        std = self.config.initializer_range
        hidden_std = std * self.config.width_multiplier**-0.5
        if isinstance(module, FomoeExperts):
            init.normal_(module.up_proj, std=hidden_std)
            init.normal_(module.down_proj, std=hidden_std)
        elif isinstance(module, nn.Linear):
            is_output = module is self.get_output_embeddings()
            init.normal_(module.weight, std=std if is_output else hidden_std)
        elif isinstance(module, FomoeRouter):
            init.normal_(module.weight, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, FomoeRMSNorm):
            init.ones_(module.weight)


class FomoeModel(FomoePreTrainedModel):
    """Embedding, decoder layers and the norms around them."""

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.embed_norm = FomoeRMSNorm(size, eps)
        self.layers = nn.ModuleList(
            FomoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = FomoeRMSNorm(size, eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Return the normed output of the last layer."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = start + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = position_ids[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        tables = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        x_BSD = self.embed_norm(inputs_embeds)
        for layer in self.layers:
            x_BSD = layer(
                x_BSD,
                tables=tables,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        x_BSD = self.norm(x_BSD)
        return MoeModelOutputWithPast(last_hidden_state=x_BSD, past_key_values=past_key_values)


class FomoeForCausalLM(FomoePreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, whose logits are divided by m_d."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: FomoeConfig) -> None:
        super().__init__(config)
        self.model = FomoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.multiplier = 1.0 / config.width_multiplier
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return next-token logits, of the last `logits_to_keep` positions if that is not 0."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=(
                self.config.output_router_logits
                if output_router_logits is None
                else output_router_logits
            ),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.multiplier
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class FomoeForSequenceClassification(GenericForSequenceClassification, FomoePreTrainedModel):
    """The decoder with a head that judges a text by its last token."""


__all__ = [
    "FomoeForCausalLM",
    "FomoeForSequenceClassification",
    "FomoeModel",
    "FomoePreTrainedModel",
]
