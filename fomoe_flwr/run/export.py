"""Export: the global model as an ordinary transformers checkpoint with its tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from fomoe_flwr.config import Settings
from fomoe_flwr.files import mark_folder, replace_folder, save_text
from fomoe_flwr.model.families import TOKEN_IDS, transformers_config
from fomoe_flwr.model.residency import build_skeleton
from fomoe_flwr.model.state import hold

SMALL_SHARD = "200MB"
"""Size of an export's files where the model may not fit into memory."""


def assemble(
    settings: Settings,
    weights: Mapping[str, Tensor],
    generation: GenerationConfig,
) -> PreTrainedModel:
    """Build the full model on global weights; it holds `weights` themselves, no copies."""
    config = transformers_config(settings.model, settings.data.sequence_length)
    for name in TOKEN_IDS:
        setattr(config, name, getattr(generation, name))
    model = build_skeleton(settings.model, config, torch.device("cpu"))
    vars(model)["generation_config"] = generation
    hold(model, weights)
    return model


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    card: str,
    shard: str = "",
) -> None:
    """Write `model`, `tokenizer` and a card so that stock `from_pretrained` reads both; atomic.

    With a size, such as `500MB`, as many files of that size are written as it takes, and no more
    than about two of them are in memory.
    """

    def fill(draft: Path) -> None:
        if shard:
            _save_by_shards(model, draft, shard)
        else:
            model.save_pretrained(draft)
        context = getattr(model.config, "max_position_embeddings", None)
        if context:
            tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        tokenizer.save_pretrained(draft)
        save_text(card, draft / "README.md")
        mark_folder(draft)

    replace_folder(path, fill)


def _save_by_shards(model: PreTrainedModel, folder: Path, shard: str) -> None:
    # transformers splits stacked experts of all layers before it writes the first file, except for
    # a model that is offloaded: there file by file. Ours is, to files that are mapped.
    vars(model)["hf_device_map"] = {"": "cpu"}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, max_shard_size=shard)
    finally:
        del vars(model)["hf_device_map"]
