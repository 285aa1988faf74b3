"""Where a model's shape comes from: a folder or a family says it, and a preset gives way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import tiny

from fomoe_flwr.config import Settings, SettingsError, load_settings, settings_from_dict
from fomoe_flwr.costs.counts import parameter_counts
from fomoe_flwr.model.families import class_of, config_class, transformers_config
from fomoe_flwr.model.source import settle
from fomoe_flwr.parameters.shapes import num_sparse_layers

RELEASED = {
    "deepseek_v3": 671.0,
    "glm4_moe": 103.5,
    "gpt_oss": 116.8,
    "qwen3_moe": 15.4,
    "qwen3_next": 79.7,
    "minimax_m2": 228.7,
    "olmoe": 13.4,
    "mixtral": 46.7,
}
"""Families whose default configuration is counted, and the billions of parameters that it has."""


def load(*words: str) -> Settings:
    return load_settings(["preset=tiny", *words], settle)


def folder_of(family: str, folder: Path, **changes: Any) -> Path:
    config = tiny(family).to_dict() | {"model_type": family} | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("family", RELEASED)
def test_counts_are_the_stock_classs(family: str) -> None:
    model = load(f"model.config={family}").model
    config = config_class(family)()
    with torch.device("meta"):
        stock = class_of(config)._from_config(config)
    counts = parameter_counts(model)
    assert counts.total == sum(parameter.numel() for parameter in stock.parameters())
    assert round(counts.total / 1e9, 1) == RELEASED[family]
    experts = {k: p.numel() for k, p in stock.named_parameters() if ".experts." in k}
    idle = sum(experts.values()) * (model.num_experts - model.top_k) // model.num_experts
    assert counts.active == counts.total - idle
    assert num_sparse_layers(model) == len(
        {key.split(".layers.")[1].split(".")[0] for key in experts}
    )


def test_a_family_takes_the_fields_that_are_given() -> None:
    words = (
        "num_layers=3",
        "hidden_size=32",
        "num_experts=8",
        "top_k=2",
        "vocab_size=512",
        "num_heads=4",
        "num_kv_heads=2",
    )
    model = load(
        "model.config=glm4_moe",
        *(f"model.{word}" for word in words),
        "model.entries={first_k_dense_replace: 2}",
    ).model
    assert (model.family, model.num_layers, model.num_experts, model.top_k) == ("glm4_moe", 3, 8, 2)
    assert num_sparse_layers(model) == 1
    assert transformers_config(model, 8).first_k_dense_replace == 2


def test_a_checkpoint_says_all_and_a_preset_gives_way(tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3", tmp_path)
    model = load("model=qwen3-moe-tiny", f"model.pretrained={folder}").model
    assert (model.family, model.num_layers, model.num_experts) == ("deepseek_v3", 4, 8)
    assert num_sparse_layers(model) == 3


def test_what_the_fields_can_name_needs_no_description(tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path, sliding_window=None)
    model = load(f"model.pretrained={folder}").model
    assert (model.family, model.num_experts, model.architecture) == ("qwen3_moe", 8, {})
    assert transformers_config(model, 8).max_position_embeddings == 64


def test_fields_that_agree_with_the_checkpoint_may_be_given(tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3", tmp_path)
    load(f"model.pretrained={folder}", "model.num_experts=8", "model.routing=skip_token")


def test_all_disagreements_are_told_at_once(tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3", tmp_path)
    with pytest.raises(SettingsError) as caught:
        load(f"model.pretrained={folder}", "model.num_experts=9", "model.top_k=3")
    assert "model.num_experts=9 (it has 8), model.top_k=3 (it has 2)" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model.config=llama", "has no experts with the interface of transformers"),
        ("model.config=zaya", "has no router that can be told"),
        ("model.config=gpt9", "is not a model type that the installed transformers knows"),
        ("model.config=deepseek_v2", "set model.top_k"),
        ("model.config=mixtral model.num_shared_experts=1", "model.num_shared_experts=1 has no"),
        (
            "model.config=mixtral model.entries={colour:1}",
            "model.entries.colour=1 has no meaning",
        ),
        ("model.entries={n_group:1}", "model.entries needs model.config"),
        ("model.config=mixtral model.hidden_size=31", "MixtralForCausalLM cannot be built"),
        ("model.family=gpt_oss", "any other family of transformers comes by model.config=gpt_oss"),
        ("model.config=olmoe model.pretrained=/tmp", "contradict each other"),
        ("model.pretrained=/nowhere/at/all", "has no readable config.json"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(*words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_settings_carry_the_description_and_need_no_folder(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path) if family != "nemotron_h" else tmp_path
    if family == "nemotron_h":
        tiny(family).save_pretrained(folder)
    settings = load(f"model.pretrained={folder}")
    (folder / "config.json").unlink()
    again = settings_from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again.model == settings.model
    config = transformers_config(again.model, 8)
    assert config.model_type == family


def test_another_config_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    from fomoe_flwr.model.pretrained import check_pretrained

    folder = folder_of("deepseek_v3", tmp_path)
    model = load(f"model.pretrained={folder}").model
    check_pretrained(folder, model)
    folder_of("deepseek_v3", tmp_path, routed_scaling_factor=3.0)
    with pytest.raises(SettingsError, match=r"has another config\.json"):
        check_pretrained(folder, model)


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"num_kv_heads=8 .* must divide model.num_heads=4"):
        load("model.config=gpt_oss", "model.num_heads=4")
