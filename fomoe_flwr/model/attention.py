"""Causal attention over full windows: transformers' SDPA without its masks.

Training windows have no padding, so causality is all there is to mask, where every layer attends to
the whole window. transformers leaves its mask out too, but not while a CUDA graph is captured: then
the captured step would be another one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "fomoe_causal"
"""Name under which `attn_implementation=` selects this; no mask is made for it."""


def _causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        raise ValueError(f"attention {IMPLEMENTATION} takes no mask: windows must be full")
    mixed, _ = sdpa_attention_forward(module, query, key, value, None, **others)
    return mixed, None


def attend_to_full_windows(model: PreTrainedModel) -> None:
    """Make a model that is only ever given full windows attend without masks.

    Only for one that `is_causal_only`.
    """
    AttentionInterface.register(IMPLEMENTATION, _causal)
    model.set_attn_implementation(IMPLEMENTATION)


def is_causal_only(model: PreTrainedModel) -> bool:
    """Tell whether causality is the only mask of every layer, and SDPA the attention.

    What FlashAttention can do is causal, whole or in a sliding window; windows stand in the
    configuration. Attention that chooses its tokens supports no FlashAttention.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) if kinds is None else None
    return (
        config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_flash_attn", False))
        and set(kinds or ()) <= {"full_attention", "attention", "linear_attention", "mamba", "conv"}
        and not slides
        and not getattr(config, "attention_chunk_size", None)
    )
