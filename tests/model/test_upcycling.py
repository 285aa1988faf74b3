"""A MoE made of a dense checkpoint gives the dense model's logits before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fomoe_flwr.config import Settings, SettingsError, load_settings
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.source import settle
from fomoe_flwr.model.state import StateSpec, state_of
from fomoe_flwr.model.upcycling import check_dense, fill_upcycled

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
IDS = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def dense(family: str, folder: Path, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


def load(folder: Path, *words: str) -> Settings:
    return load_settings(["preset=tiny", f"model.upcycle={folder}", *words], settle)


def upcycled(settings: Settings) -> PreTrainedModel:
    model = settings.model
    config = transformers_config(model, 32)
    built = build_model(model, config, seed=5).eval()
    with torch.no_grad():
        fill_upcycled(model, StateSpec.of(model, config), state_of(built), seed=5)
    return built


WINDOW = {"head_dim": 16, "use_sliding_window": True, "sliding_window": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, scaled rotary": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, all sliding": ("qwen3", {**WINDOW, "max_window_layers": 0}),
    "qwen3, none sliding": ("qwen3", {**WINDOW, "max_window_layers": 3}),
    "llama with a window it does not read": ("llama", {"sliding_window": 4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("parts", "experts", "top_k"), [(1, 6, 2), (1, 4, 1), (2, 8, 2), (3, 9, 6)]
)
def test_the_logits_are_the_dense_models(
    case: str, parts: int, experts: int, top_k: int, tmp_path: Path
) -> None:
    family, more = CASES[case]
    want = dense(family, tmp_path, **more)(input_ids=IDS).logits
    words = (f"model.num_experts={experts}", f"model.top_k={top_k}")
    settings = load(tmp_path, *words, f"model.upcycle_granularity={parts}")
    assert settings.model.num_experts == experts
    assert settings.model.expert_size == 24 // parts
    got = upcycled(settings)(input_ids=IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_noise_tells_the_copies_apart_and_the_seed_repeats_it(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    settings = load(tmp_path, "model.num_experts=4", "model.upcycle_noise=0.1")
    states = [state_of(upcycled(settings)) for _ in range(2)]
    key = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(states[0][key], states[1][key])
    apart = states[0][key][0] - states[0][key][1]
    assert 0.05 < float(apart.std() / states[0][key].std()) < 0.3


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {}, "model.upcycle_granularity=5", "cannot be cut: model.upcycle_granularity=5"),
    ("llama", {}, "model.upcycle_granularity=0", "granularity=0 is out of range: it must be >= 1"),
    (
        *("llama", {}, "model.hidden_size=64 model.vocab_size=300 model.family=olmoe"),
        "contradicts model.family=olmoe (it has mixtral), model.hidden_size=64 (it has 32): leave",
    ),
    ("llama", {}, "model.config=olmoe", "contradict each other"),
    ("qwen3", {**WINDOW, "max_window_layers": 2}, "", "mixes kinds of attention (layer_types)"),
    ("gpt2", {}, "", "has model_type=gpt2, which is not one of llama, mistral, qwen3"),
]


@pytest.mark.parametrize(("family", "entries", "words", "message"), REFUSED)
def test_what_cannot_be_upcycled_is_refused_in_one_line(
    family: str, entries: dict[str, Any], words: str, message: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **(SIZES if family != "gpt2" else {}), **entries)
    config.save_pretrained(tmp_path)
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, *words.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_agree_may_be_given(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path)
    load(tmp_path, "model.hidden_size=32", "model.expert_size=24", "model.family=mixtral")


@pytest.mark.parametrize("word", ["upcycle_granularity=2", "upcycle_noise=0.1"])
def test_what_belongs_to_an_upcycling_is_refused_without_one(word: str) -> None:
    with pytest.raises(SettingsError, match=f"model.{word} has no meaning without model.upcycle"):
        load_settings(["preset=tiny", f"model.{word}"], settle)


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.embed_tokens.weight", torch.zeros(320, 32), "of shape [320, 32], config.json says"),
        ("model.norm.weight", torch.ones(1), "of shape [1], config.json says [32]"),
        (f"{LAYER}.self_attn.q_proj.weight", torch.ones(1, 32), "of shape [1, 32], config.json"),
        (f"{LAYER}.mlp.down_proj.weight", torch.ones(1, 24), "of shape [1, 24], config.json says"),
        (f"{LAYER}.mlp.up_proj.weight", torch.ones(12, 32), "of shape [12, 32], config.json says"),
        (f"{LAYER}.mlp.up_proj.weight", torch.ones(24, 32).int(), "of I32, it must be of F16"),
        (f"{LAYER}.mlp.up_proj.weight", None, ""),
        ("model.layers.3.mlp.up_proj.weight", torch.ones(24, 32), ", config.json says 3 layers"),
    ],
)
def test_a_dense_tensor_that_does_not_fit_is_refused_by_its_header(
    name: str, value: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors = dict(dense("llama", tmp_path).state_dict()) | {name: value}
    kept = {k: v.clone() for k, v in tensors.items() if v is not None}
    save_file(kept, tmp_path / "model.safetensors")
    model = load(tmp_path, "model.num_experts=4").model
    with pytest.raises(SettingsError) as caught:
        check_dense(model)
    lead = "has" if value is not None else "has no tensor"
    assert f"model.upcycle={tmp_path} {lead} {name}" in str(caught.value)
    assert message in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no readable config\.json"):
        load(tmp_path / "nowhere")


def test_a_damaged_dense_checkpoint_is_named_by_its_own_setting(tmp_path: Path) -> None:
    dense("llama", tmp_path)
    settings = load(tmp_path, "model.num_experts=4")
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SettingsError, match=rf"model\.upcycle={tmp_path} is damaged"):
        check_dense(settings.model)
