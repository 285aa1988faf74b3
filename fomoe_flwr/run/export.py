"""Export: the global model as an ordinary transformers checkpoint with its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fomoe_flwr.config import Settings
from fomoe_flwr.files import mark_folder, replace_folder
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_skeleton
from fomoe_flwr.model.state import hold


def assemble(
    settings: Settings,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
) -> PreTrainedModel:
    """Build the full model on global weights; it holds `weights` themselves, no copies."""
    config = transformers_config(
        settings.model,
        settings.data.sequence_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = build_skeleton(settings.model, config, torch.device("cpu"))
    hold(model, weights)
    return model


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write `model` and `tokenizer` so that stock `from_pretrained` reads both; atomic."""

    def fill(draft: Path) -> None:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        mark_folder(draft)

    replace_folder(path, fill)
