"""Where a model's shape comes from: a folder or a family says it, and a preset gives way."""

from __future__ import annotations

import json
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("field", "value", "entry"),
    [
        ("rope_theta", 5.0, ""),
        ("max_positions", 77, "max_position_embeddings"),
        ("norm_eps", 1e-3, "rms_norm_eps"),
        ("norm_topk", True, "norm_topk_prob"),
        ("init_std", 0.01, "initializer_range"),
    ],
)
def test_a_field_that_is_given_arrives(field: str, value: Any, entry: str) -> None:
    model = load("model.config=olmoe", f"model.{field}={value}").model
    assert getattr(model, field) == value
    config = transformers_config(model, 8)
    if entry:
        assert getattr(config, entry) == value
    if field == "rope_theta":
        assert config.rope_parameters["rope_theta"] == value


def test_a_vocabulary_may_be_smaller_than_the_familys_tokens() -> None:
    assert load("model.config=flex_olmo", "model.vocab_size=300").model.vocab_size == 300


def test_a_head_of_no_size_is_an_even_share() -> None:
    words = ("hidden_size=64", "num_heads=4", "num_kv_heads=4", "head_size=0", "num_layers=1")
    model = load("model.config=gpt_oss", *(f"model.{word}" for word in words)).model
    assert model.head_size == transformers_config(model, 8).head_dim == 16


@pytest.mark.parametrize(
    ("family", "text"), [("qwen3_5_moe", "qwen3_5_moe_text"), ("gemma4", "gemma4_text")]
)
def test_of_pictures_and_text_the_text_is_taken(family: str, text: str) -> None:
    words = ["model.num_layers=4"]
    if family == "gemma4":
        moe = "enable_moe_block:true,top_k_experts:2,num_experts:8,moe_intermediate_size:16"
        words.append(f"model.entries={{{moe}}}")
    assert load(f"model.config={family}", *words).model.family == text


AGREE = ("norm_topk=true", "rope_theta=10000", "max_positions=64", "num_shared_experts=1")
OTHER = ("norm_topk=false", "rope_theta=5", "max_positions=65", "num_shared_experts=2")


@pytest.mark.parametrize("word", [*AGREE, "norm_eps=1e-6", "norm_eps=0", "rope_theta=0"])
def test_what_agrees_with_a_description_may_be_given(word: str, tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3", tmp_path, routed_scaling_factor=3.0, n_shared_experts=1)
    model = load(f"model.pretrained={folder}", f"model.{word}").model
    assert model.architecture
    assert (model.norm_topk, model.rope_theta, model.max_positions) == (True, 1e4, 64)


def test_what_disagrees_with_a_description_is_refused_at_once(tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3", tmp_path, routed_scaling_factor=3.0, n_shared_experts=1)
    with pytest.raises(SettingsError) as caught:
        load(f"model.pretrained={folder}", *(f"model.{w}" for w in (*OTHER, "base_num_layers=9")))
    for word in ("base_num_layers=9 (it says nothing of it)", "norm_topk=False (it has True)"):
        assert f"model.{word}" in str(caught.value)
    for word in ("rope_theta=5.0 (it has 10000.0)", "max_positions=65 (it has 64)"):
        assert f"model.{word}" in str(caught.value)
    assert "model.num_shared_experts=2 (it has 1)" in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ("num_heads=3",),
        ("num_kv_heads=3",),
        ("hidden_size=33",),
        ("hidden_size=36", "num_heads=8", "num_kv_heads=8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(words: tuple[str, ...]) -> None:
    small = ("hidden_size=32", "num_heads=4", "num_kv_heads=4", "num_layers=1", "num_experts=4")
    with pytest.raises(SettingsError, match=r"do not fit each other|must divide") as caught:
        load("model.config=olmoe", *(f"model.{word}" for word in (*small, *words)))
    assert "\n" not in str(caught.value)


def test_transformers_says_nothing_beside_a_refusal() -> None:
    script = (
        "from fomoe_flwr.config import load_settings; from fomoe_flwr.model.source import settle\n"
        "load_settings(['preset=tiny', 'model.config=bert'], settle)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert "BertLMHeadModel" not in done.stderr
    assert "has no experts" in done.stderr.splitlines()[-1]


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
        ("model.config=mixtral model.base_hidden_size=77", "model.base_hidden_size=77 has no"),
        ("model.config=olmoe model.entries={num_expert:1}", "did you mean num_experts?"),
        ("model.config=olmoes", "model.config=olmoes is not a model type"),
        ("model.config=olmoe model.entries=5", "model.entries must be names with values"),
        ("model.config=olmoe model.entries=[1]", "model.entries must be names with values"),
        ("model.config=olmoe model.entries={1:2}", "model.entries must be names with values"),
        ("model.config=olmoe model.entries={model_type:mixtral}", "has no meaning"),
        ("model.config=olmoe model.entries={attention_dropout:0.5}", "must be 0: training draws"),
        ("model.config=olmoe model.entries={clip_qkv:nan}", "must be a number"),
        ("model.config=olmoe model.family=mixtral", "model.family=mixtral (it has olmoe)"),
        ("model.config=phimoe model.top_k=3 model.family=olmoe", "model.top_k=3 (it has 2)"),
        ("model.config=olmoe model.num_experts=8 model.entries={num_experts:16}", "contradict"),
        (
            "model.config=olmoe model.num_experts=8 model.entries={num_local_experts:9}",
            "contradict",
        ),
        ("model.config=olmoe model.upcycle_noise=0.5", "without model.upcycle"),
        ("model.config=dots1", "cannot be built without n_routed_experts, n_shared_experts, num_"),
        ("model.config=hunyuan_v1_moe", "cannot be built without head_dim"),
        ("model.config=lfm2_moe", "cannot be built without layer_types"),
        ("model.config=deepseek_v3 model.num_layers=2", "is sparse (first_k_dense_replace=3"),
        ("model.config=gemma4_text", "no layer of it is sparse (enable_moe_block=False)"),
        ("model.config=llama", "model.upcycle makes a MoE of a dense"),
        ("model.config=qwen3_vl_moe", "has no causal language model in transformers"),
        ("model.entries={n_group:1}", "needs model.config"),
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
