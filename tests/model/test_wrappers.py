"""Checkpoints of pictures and text: their text part is trained, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from registry import VOCABULARY, tiny
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from fomoe_flwr.config import SettingsError, load_settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.pretrained import check_weights, read_pretrained
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.source import settle
from fomoe_flwr.model.state import StateSpec, load_state

PICTURES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 32,
    },
    "gemma4": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 16,
    },
}


def wrapper(family: str, folder: Path) -> PreTrainedModel:
    text = tiny(f"{family}_text").to_dict()
    config = CONFIG_MAPPING[family](text_config=text, vision_config=PICTURES[family])
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def test_the_text_part_of_a_wrapper_gives_its_logits(tmp_path: Path) -> None:
    stock = wrapper("qwen3_5_moe", tmp_path)
    shape = load_settings(["preset=tiny", f"model.pretrained={tmp_path}"], settle).model
    assert shape.family == "qwen3_5_moe_text"
    check_weights(shape)
    config = transformers_config(shape, 12)
    model = build_model(shape, config, empty=True).eval()
    load_state(model, read_pretrained(tmp_path, shape, StateSpec.of(shape, config)))
    ids = torch.randint(5, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = (m(input_ids=ids, use_cache=False).logits for m in (stock, model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_text_part_that_is_not_found_is_told(tmp_path: Path) -> None:
    wrapper("gemma4", tmp_path)
    shape = load_settings(["preset=tiny", f"model.pretrained={tmp_path}"], settle).model
    with pytest.raises(SettingsError, match="is of pictures and text, and its text part") as caught:
        check_weights(shape)
    assert "\n" not in str(caught.value)
