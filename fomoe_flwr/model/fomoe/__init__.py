"""The FoMoE paper's own decoder, known to the transformers Auto classes once this is imported."""

from transformers import AutoConfig, AutoModelForCausalLM

from fomoe_flwr.model.fomoe.configuration_fomoe import FomoeConfig
from fomoe_flwr.model.fomoe.modeling_fomoe import FomoeForCausalLM

AutoConfig.register(FomoeConfig.model_type, FomoeConfig, exist_ok=True)
AutoModelForCausalLM.register(FomoeConfig, FomoeForCausalLM, exist_ok=True)
# `save_pretrained` then copies both files beside the weights: `trust_remote_code=True` loads them.
FomoeConfig.register_for_auto_class()
FomoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["FomoeConfig", "FomoeForCausalLM"]
