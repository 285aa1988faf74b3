"""Configuration of the FoMoE decoder (arXiv 2606.19025).

Exported beside the weights, so it may import transformers and nothing of our own.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_fomoe.FomoeConfig",
    "AutoModel": "modeling_fomoe.FomoeModel",
    "AutoModelForCausalLM": "modeling_fomoe.FomoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_fomoe.FomoeForSequenceClassification",
}


class FomoeConfig(PreTrainedConfig):
    """Shape of a FoMoE decoder, and the proxy from which CompleteP transfers its settings.

    `hidden_size / base_hidden_size` and `num_hidden_layers / base_num_layers` are the width and
    depth multipliers m_d and m_L; with both 1 no multiplier has an effect. A branch's output is
    multiplied by m_L ** -depth_alpha.
    """

    model_type = "fomoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    def __init__(
        self,
        vocab_size: int = 200019,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        head_dim: int | None = None,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 128,
        norm_topk_prob: bool = False,
        hidden_act: str = "silu",
        base_hidden_size: int = 256,
        base_num_layers: int = 4,
        depth_alpha: float = 1.0,
        rope_theta: float = 10000.0,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        output_router_logits: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        # Generation reads both: every head has keys and values of its own.
        self.num_key_value_heads = num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.hidden_act = hidden_act
        self.base_hidden_size = base_hidden_size
        self.base_num_layers = base_num_layers
        self.depth_alpha = depth_alpha
        given = rope_parameters or {}
        kind = given.get("rope_type", "default")
        if kind != "default":
            raise ValueError(f"rope_type={kind} is not one of: default")
        self.rope_theta = float(given.get("rope_theta", rope_theta))
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.output_router_logits = output_router_logits
        others.pop("num_key_value_heads", None)
        super().__init__(**(others | {"tie_word_embeddings": tie_word_embeddings}))
        # Saving a model adds its own class alone; the file beside this one has all of them.
        self.auto_map = dict(_AUTO_MAP)

    @property
    def width_multiplier(self) -> float:
        """m_d of CompleteP."""
        return self.hidden_size / self.base_hidden_size

    @property
    def depth_multiplier(self) -> float:
        """m_L of CompleteP."""
        return self.num_hidden_layers / self.base_num_layers

    @property
    def branch_multiplier(self) -> float:
        """What each residual branch's output is multiplied by."""
        return float(self.depth_multiplier**-self.depth_alpha)


__all__ = ["FomoeConfig"]
