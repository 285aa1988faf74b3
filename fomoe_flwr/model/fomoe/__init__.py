"""The FoMoE paper's own decoder, known to the transformers Auto classes once this is imported."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from fomoe_flwr.model.fomoe.configuration_fomoe import FomoeConfig
from fomoe_flwr.model.fomoe.modeling_fomoe import (
    FomoeForCausalLM,
    FomoeForSequenceClassification,
    FomoeModel,
)

AutoConfig.register(FomoeConfig.model_type, FomoeConfig, exist_ok=True)
# `save_pretrained` then copies both files beside the weights: `trust_remote_code=True` loads them.
FomoeConfig.register_for_auto_class()
for _auto, _model in (
    (AutoModel, FomoeModel),
    (AutoModelForCausalLM, FomoeForCausalLM),
    (AutoModelForSequenceClassification, FomoeForSequenceClassification),
):
    _auto.register(FomoeConfig, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)

__all__ = ["FomoeConfig", "FomoeForCausalLM", "FomoeForSequenceClassification", "FomoeModel"]
