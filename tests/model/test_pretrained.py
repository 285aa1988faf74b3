"""Warm start: what transformers loads from a checkpoint is what we read, and no byte more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import micro_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fomoe_flwr.config import ModelSettings, SettingsError
from fomoe_flwr.model import stored as stored_tensors
from fomoe_flwr.model.families import FAMILIES, transformers_config
from fomoe_flwr.model.pretrained import pretrained_shape, read_pretrained
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.state import StateSpec, load_state, state_of
from fomoe_flwr.parameters.keys import is_expert_key, layer_of

SHAPE = micro_model()
RESIDENTS = ((0, 2, 3), (1, 5))
ToFamily = Callable[[ModelSettings, str], ModelSettings]


def saved(shape: ModelSettings, folder: Path, **how: Any) -> PreTrainedModel:
    model = build_model(shape, transformers_config(shape, 8), seed=3)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer.copy_(torch.arange(6.0))
    model.save_pretrained(folder, **how)
    return model


def spec_of(shape: ModelSettings) -> StateSpec:
    return StateSpec.of(shape, transformers_config(shape, 8))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype is torch.float32
        assert torch.equal(got[key], value), key


def resident_rows(state: dict[str, Tensor], shape: ModelSettings) -> dict[str, Tensor]:
    return {
        key: value[list(RESIDENTS[layer_of(key)])]
        if is_expert_key(key, shape.routing_mode)
        else value
        for key, value in state.items()
    }


class Spy:
    """A safe_open that writes down what is read."""

    def __init__(self) -> None:
        self.read: list[tuple[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spy, opened = self, safe_open(*args, **kwargs)

        class Slice:
            def __init__(self, name: str) -> None:
                self.name, self.inner = name, opened.get_slice(name)

            def get_shape(self) -> list[int]:
                return self.inner.get_shape()

            def get_dtype(self) -> str:
                return self.inner.get_dtype()

            def __getitem__(self, index: slice) -> Tensor:
                spy.read.append((self.name, index))
                return self.inner[index]

        class File:
            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def keys(self) -> list[str]:
                return list(opened.keys())

            def get_slice(self, name: str) -> Slice:
                return Slice(name)

            def get_tensor(self, name: str) -> Tensor:
                spy.read.append((name, None))
                return opened.get_tensor(name)

        return File()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setattr(stored_tensors, "safe_open", spy)
    return spy


@pytest.mark.parametrize("shards", ["50GB", "4KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_what_transformers_loads(
    family: str, tied: bool, shards: str, of_family: ToFamily, tmp_path: Path
) -> None:
    shape = replace(of_family(SHAPE, family), tie_embeddings=tied)
    saved(shape, tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "4KB")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(read_pretrained(tmp_path, shape, spec_of(shape)), state_of(theirs))


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_worker_reads_its_residents_only(
    family: str, routing: str, of_family: ToFamily, tmp_path: Path, spy: Spy
) -> None:
    shape = replace(of_family(SHAPE, family), routing=routing)
    model = saved(shape, tmp_path)
    got = read_pretrained(tmp_path, shape, spec_of(shape), RESIDENTS)
    assert_same(got, resident_rows(state_of(model), shape))

    held: dict[int, set[int]] = {0: set(), 1: set()}
    for name, index in spy.read:
        if ".experts." not in name:
            continue
        layer, leaf = layer_of(name), name.split(".experts.")[1]
        if family == "fomoe":
            held[layer] |= set(range(index.start, index.stop))
        else:
            assert index == slice(None)
            held[layer].add(int(leaf.split(".")[0]))
    assert held == {layer: set(experts) for layer, experts in enumerate(RESIDENTS)}
    rows = [index for name, index in spy.read if name.endswith("gate.weight")]
    runs = [slice(0, 1), slice(2, 4), slice(1, 2), slice(5, 6)]
    assert rows == (runs if routing == "partitioned" else [slice(None)] * 2)
    assert all(index is not None for _, index in spy.read)

    worker = build_model(shape, transformers_config(shape, 8), RESIDENTS, empty=True)
    load_state(worker, got)


def test_only_the_part_that_the_spec_names_is_read(tmp_path: Path, spy: Spy) -> None:
    model = saved(SHAPE, tmp_path)
    spec = replace(spec_of(SHAPE), expert=())
    got = read_pretrained(tmp_path, SHAPE, spec)
    assert_same(got, {k: v for k, v in state_of(model).items() if ".experts." not in k})
    assert not [name for name, _ in spy.read if ".experts." in name]


def test_experts_stored_as_one_stack_are_read_by_slices(tmp_path: Path, spy: Spy) -> None:
    model = saved(SHAPE, tmp_path)
    save_file(dict(state_of(model)), tmp_path / "model.safetensors")
    got = read_pretrained(tmp_path, SHAPE, spec_of(SHAPE), RESIDENTS)
    assert_same(got, resident_rows(state_of(model), SHAPE))
    stacks = [index for name, index in spy.read if name == "model.layers.0.mlp.experts.down_proj"]
    assert stacks == [slice(0, 1), slice(2, 4)]


def test_half_precision_is_read_as_fp32(tmp_path: Path) -> None:
    model = saved(SHAPE, tmp_path)
    tensors = {k: v.bfloat16() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    expected = {key: value.bfloat16().float() for key, value in state_of(model).items()}
    assert_same(read_pretrained(tmp_path, SHAPE, spec_of(SHAPE)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_read_off_the_configuration(
    family: str, of_family: ToFamily, tmp_path: Path
) -> None:
    shape = of_family(SHAPE, family)
    saved(shape, tmp_path)
    fields = pretrained_shape(tmp_path)
    again = replace(ModelSettings(), **fields)
    assert_same(
        read_pretrained(tmp_path, again, spec_of(again)),
        read_pretrained(tmp_path, shape, spec_of(shape)),
    )


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OLMoE-1B-7B": (
        {"model_type": "olmoe", "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu",
         "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
         "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
         "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
         "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "vocab_size": 50304},
        {"family": "olmoe", "expert_size": 1024, "num_experts": 64, "top_k": 8},
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128,
         "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48,
         "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
         "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
         "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
         "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None,
         "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
        {"family": "qwen3_moe", "expert_size": 768, "head_size": 128, "rope_theta": 1e6},
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
         "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-5,
         "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32000},
        {"family": "mixtral", "expert_size": 14336, "norm_topk": True, "rope_theta": 1e6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name: str, tmp_path: Path) -> None:
    stored, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    assert expected.items() <= pretrained_shape(tmp_path).items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "has model_type=gpt2, the settings have model.family=olmoe"),
        ({"model_type": "gpt9"}, "has model_type=gpt9, which transformers"),
        ({"clip_qkv": 8.0}, "has clip_qkv=8.0, the settings expect None: no setting expresses it"),
        ({"hidden_size": 32}, "has hidden_size=32, the settings expect 16; set model.hidden_size"),
        ({"intermediate_size": 4}, "intermediate_size=4, the settings expect 8; set model.expert_"),
        ({"num_experts": 7}, "has num_experts=7, the settings expect 6; set model.num_experts"),
        ({"rms_norm_eps": 1e-3}, "the settings expect 1e-05; set model.norm_eps"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "set model.rope_theta"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "is quantised with mxfp4"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(SHAPE, tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        read_pretrained(tmp_path, SHAPE, spec_of(SHAPE))
    assert str(caught.value).startswith(f"model.pretrained={tmp_path} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_family_is_refused(tmp_path: Path) -> None:
    saved(SHAPE, tmp_path)
    other = replace(SHAPE, family="qwen3_moe")
    with pytest.raises(SettingsError, match=r"model_type=olmoe, .* model\.family=qwen3_moe"):
        read_pretrained(tmp_path, other, spec_of(other))


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    saved(SHAPE, tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.5.up_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: torch.zeros(8, 15)}, path)
    with pytest.raises(SettingsError, match=rf"{name} of shape \[8, 15\], .* says \[8, 16\]"):
        read_pretrained(tmp_path, SHAPE, spec_of(SHAPE))
    read_pretrained(tmp_path, SHAPE, spec_of(SHAPE), ((0,), (1,)))
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    with pytest.raises(SettingsError, match=f"has no tensor {name}"):
        read_pretrained(tmp_path, SHAPE, spec_of(SHAPE))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no readable config\.json"):
        pretrained_shape(tmp_path)
    saved(SHAPE, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(SettingsError, match=r"has neither model\.safetensors nor"):
        read_pretrained(tmp_path, SHAPE, spec_of(SHAPE))
    weights.write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:50])
    with pytest.raises(SettingsError, match="is damaged"):
        read_pretrained(tmp_path, SHAPE, spec_of(SHAPE))


def in_fp8(name: str, value: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """Store a matrix as DeepSeek does: fp8 numbers, and a scale for each block."""
    scale = torch.rand(-(-value.shape[0] // rows), -(-value.shape[1] // columns)) + 0.5
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    wide = wide[: value.shape[0], : value.shape[1]]
    return {name: (value / wide).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


@pytest.mark.parametrize("block", [(4, 8), (5, 3), (128, 128)], ids=str)
@pytest.mark.parametrize("residents", [None, RESIDENTS], ids=["all", "some"])
def test_fp8_with_scales_is_read_as_the_numbers_it_means(
    block: tuple[int, int], residents: Any, tmp_path: Path
) -> None:
    saved(SHAPE, tmp_path)
    stored, meant = {}, {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if value.dim() != 2 or "embed" in name or "gate.weight" in name:
            stored[name] = meant[name] = value
            continue
        stored |= (parts := in_fp8(name, value, *block))
        scale = parts[f"{name}_scale_inv"].repeat_interleave(block[0], 0)
        scale = scale.repeat_interleave(block[1], 1)[: value.shape[0], : value.shape[1]]
        meant[name] = parts[name].float() * scale
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(meant, plain / "model.safetensors")
    save_file(stored, tmp_path / "model.safetensors")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    want = read_pretrained(plain, SHAPE, spec_of(SHAPE), residents)
    assert_same(read_pretrained(tmp_path, SHAPE, spec_of(SHAPE), residents), want)
