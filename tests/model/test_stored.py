"""A checkpoint's folder is checked by its headers; what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe_flwr.config import ModelSettings, SettingsError, load_settings
from fomoe_flwr.model.families import class_of, transformers_config
from fomoe_flwr.model.pretrained import check_weights, read_pretrained
from fomoe_flwr.model.source import settle
from fomoe_flwr.model.state import StateSpec, state_of

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.o_proj.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.norm.weight"
SCALE = f"{Q}_scale_inv"


def saved(folder: Path, family: str = "deepseek_v3", seed: int = 0, **how: Any) -> Tensors:
    torch.manual_seed(seed)
    config = tiny(family)
    model = class_of(config)._from_config(config)
    model.save_pretrained(folder, **how)
    return state_of(model)


def load(folder: Path, *words: str) -> ModelSettings:
    return load_settings(["preset=tiny", f"model.pretrained={folder}", *words], settle).model


def read(folder: Path) -> Tensors:
    model = load(folder)
    return read_pretrained(folder, model, StateSpec.of(model, transformers_config(model, 8)))


def change_tensors(folder: Path, change: Change) -> None:
    tensors = change(load_file(folder / WHOLE))
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / WHOLE)


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | entries), "utf-8")


def fp8(scale: Tensor) -> Change:
    return lambda t: t | {Q: t[Q].to(torch.float8_e4m3fn), SCALE: scale}


def refusal(act: Callable[[], Any], folder: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model.pretrained={folder} ")
    return text


UNFIT: dict[str, tuple[Change, str]] = {
    "one matrix of an expert": (
        lambda t: {k: v for k, v in t.items() if k != UP},
        f"has no tensor {UP}",
    ),
    "an expert": (
        lambda t: {k: v for k, v in t.items() if ".experts.7." not in k},
        "has no tensor model.layers.1.mlp.experts.7.gate_proj.weight",
    ),
    "one matrix of all experts": (
        lambda t: {k: v for k, v in t.items() if ".experts." not in k or "up_proj" not in k},
        "has no tensor model.layers.1.mlp.experts.0.up_proj.weight",
    ),
    "an expert too many": (
        lambda t: t | {UP.replace(".3.", ".8."): t[UP]},
        "has model.layers.1.mlp.experts.8.up_proj.weight, config.json says 8 experts",
    ),
    "shape": (
        lambda t: t | {Q: torch.zeros(3, 5)},
        f"has {Q} of shape [3, 5], config.json says [32, 32]",
    ),
    "shape of an expert": (
        lambda t: t | {UP: torch.zeros(3, 5)},
        f"has {UP} of shape [3, 5], config.json says [16, 32]",
    ),
    "int8": (lambda t: t | {Q: t[Q].to(torch.int8)}, f"has {Q} of I8, it must be of F16, BF16"),
    "int64": (lambda t: t | {Q: t[Q].to(torch.int64)}, f"has {Q} of I64, it must be of F16"),
    "complex": (lambda t: t | {Q: t[Q].to(torch.complex64)}, f"has {Q} of C64, it must be"),
    "int8 of an expert": (lambda t: t | {UP: t[UP].to(torch.uint8)}, f"has {UP} of U8, it must"),
    "fp8 without scales": (
        lambda t: t | {Q: t[Q].to(torch.float8_e4m3fn)},
        f"has {Q} of F8_E4M3 (it has no scales), it must be of F16, BF16, F32, F64",
    ),
    "too few scales": (
        fp8(torch.ones(1, 1)),
        f"has {SCALE} of shape [1, 1], [4, 4] belongs to [32, 32] with weight_block_size=[8, 8]",
    ),
    "too many scales": (fp8(torch.ones(9, 9)), f"has {SCALE} of shape [9, 9], [4, 4] belongs to"),
    "scales of a vector": (
        lambda t: t | {NORM: t[NORM].to(torch.float8_e4m3fn), f"{NORM}_scale_inv": torch.ones(4)},
        f"has {NORM}_scale_inv of shape [4], [1] belongs to [32] with",
    ),
    "scales of integers": (fp8(torch.ones(4, 4).int()), f"has {SCALE} of I32, it must be of F16"),
    "layers": (
        lambda t: t | {k.replace("s.3.", "s.4."): v for k, v in t.items() if "layers.3." in k},
        "has model.layers.4.input_layernorm.weight, config.json says 4 layers",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_do_not_fit_are_refused_by_their_headers(case: str, tmp_path: Path) -> None:
    change, message = UNFIT[case]
    saved(tmp_path)
    change_config(
        tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]}
    )
    check_weights(load(tmp_path))
    change_tensors(tmp_path, change)
    assert message in refusal(lambda: check_weights(load(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vocab_size": 512}, "embed_tokens.weight of shape [300, 32], config.json says [512, 32]"),
        ({"n_routed_experts": 16}, "has no tensor model.layers.1.mlp.experts.8.gate_proj.weight"),
        ({"n_routed_experts": 4}, "mlp.experts.4.gate_proj.weight, config.json says 4 experts"),
        ({"num_hidden_layers": 3}, "has model.layers.3."),
        ({"num_hidden_layers": 5}, "has no tensor model.layers.4."),
        ({"quantization_config": [1]}, "is quantised with [1]: store it in bfloat16 first"),
        ({"weight_block_size": [128]}, "weight_block_size=[128], which must be null or two sizes"),
        ({"weight_block_size": "x"}, "has weight_block_size=x, which must be null or two sizes"),
        ({"weight_block_size": [0, 8]}, "weight_block_size=[0, 8], which must be null or two"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    if "weight_block_size" in entries:
        entries = {"quantization_config": {"quant_method": "fp8", **entries}}
    change_config(tmp_path, **entries)
    assert message in refusal(lambda: check_weights(load(tmp_path)), tmp_path)


def test_heads_that_olmoe_cannot_run_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "olmoe")
    change_config(tmp_path, head_dim=16)
    assert "has head_dim=16, it must be 8" in refusal(lambda: load(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["[]", "[1]", "5", "{", "\xff"])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, "latin-1")
    assert "config.json" in refusal(lambda: load(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map of tensors"),
        ([1], "has no weight_map of tensors"),
        ({"weight_map": {}}, "has no weight_map of tensors"),
        ({"weight_map": {"a": 5}}, "has a: 5, no file"),
        ({"weight_map": {"a": None}}, "has a: None, no file"),
        ({"weight_map": {"a": ["x"]}}, "has a: ['x'], no file"),
        ({"weight_map": {"a": "gone.safetensors"}}, "has no file gone.safetensors, which its"),
        ({"weight_map": {"a": "../x.safetensors"}}, "has no file ../x.safetensors, which its"),
    ],
)
def test_a_wrong_index_is_refused(index: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(folder)
    (folder / WHOLE).rename(tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps(index), "utf-8")
    assert message in refusal(lambda: check_weights(load(folder)), folder)


def test_one_file_of_all_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = saved(tmp_path, seed=1)
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / WHOLE).is_file()
    assert (tmp_path / INDEX).is_file()
    assert torch.equal(read(tmp_path)["lm_head.weight"], new["lm_head.weight"])


@pytest.mark.parametrize("key", [Q, UP])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(key: str, number: str, tmp_path: Path) -> None:
    saved(tmp_path)

    def harm(tensors: Tensors) -> Tensors:
        tensors[key][1, 2] = float(number)
        return tensors

    change_tensors(tmp_path, harm)
    text = refusal(lambda: read(tmp_path), tmp_path)
    assert text.endswith(f"holds NaN or infinite numbers in {key}")


def test_finite_weights_whose_sum_is_infinite_are_read(tmp_path: Path) -> None:
    saved(tmp_path)
    change_tensors(tmp_path, lambda t: t | {Q: torch.full((32, 32), 3e38)})
    assert (read(tmp_path)[Q] == 3e38).all()


@pytest.mark.parametrize(
    ("block", "scale"),
    [
        (None, torch.tensor(2.0)),
        (None, torch.tensor([2.0])),
        (None, torch.tensor([[2.0]])),
        ([8, 8], torch.tensor(2.0)),
        ([64, 64], torch.tensor([[2.0]])),
    ],
    ids=str,
)
def test_one_scale_is_the_whole_matrixs(block: Any, scale: Tensor, tmp_path: Path) -> None:
    before = saved(tmp_path)[Q]
    change_tensors(tmp_path, fp8(scale))
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    check_weights(load(tmp_path))
    assert torch.equal(read(tmp_path)[Q], before.to(torch.float8_e4m3fn).float() * 2)


@pytest.mark.parametrize("block", [None, (8, 8), (5, 3)], ids=str)
@pytest.mark.parametrize("residents", [None, ((1, 2, 6),) * 4], ids=["all", "some"])
def test_a_stack_of_experts_has_scales_for_each(block: Any, residents: Any, tmp_path: Path) -> None:
    state = saved(tmp_path, "olmoe")
    key = "model.layers.0.mlp.experts.down_proj"
    stack = state[key].to(torch.float8_e4m3fn)  # [8, 32, 24]
    rows, columns = block or stack.shape[1:]
    scale = torch.rand(8, -(-32 // rows), -(-24 // columns)) + 0.5
    save_file(dict(state) | {key: stack, f"{key}_scale_inv": scale}, tmp_path / WHOLE)
    change_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    wide = scale.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, :32, :24]
    meant = stack.float() * wide
    model = load(tmp_path)
    check_weights(model)
    spec = StateSpec.of(model, transformers_config(model, 8))
    got = read_pretrained(tmp_path, model, spec, residents)[key]
    assert torch.equal(got, meant if residents is None else meant[list(residents[0])])
    change_tensors(tmp_path, lambda t: t | {f"{key}_scale_inv": scale[:1]})
    assert "_scale_inv of shape [1, " in refusal(lambda: check_weights(model), tmp_path)


def test_integers_are_read_where_the_class_has_them(tmp_path: Path) -> None:
    state = saved(tmp_path, "deepseek_v4")
    key = "model.layers.0.mlp.gate.tid2eid"
    check_weights(load(tmp_path))
    assert torch.equal(read(tmp_path)[key], state[key].float())


def next_token(tensors: Tensors, layer: int) -> Tensors:
    extra = {k.replace("s.3.", f"s.{layer}."): v for k, v in tensors.items() if "layers.3." in k}
    return tensors | extra


PASSED: dict[str, tuple[Change, str]] = {
    "a layer that the class names": (lambda t: next_token(t, 61), ""),
    "old buffers": (
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "",
    ),
    "a layer for the token after next": (
        lambda t: {"model.layers.4.eh_proj.weight": torch.ones(2, 2), **next_token(t, 4)},
        "tensors that its class does not read: model.layers.4.",
    ),
    "others": (
        lambda t: t | {"vision.layers.9.a": torch.ones(2), "vision.b": torch.ones(2)},
        "holds 2 tensors that its class does not read: vision.b, …",
    ),
}


@pytest.mark.parametrize("case", PASSED)
def test_what_the_model_lacks_is_told_unless_its_class_passes_over_it(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = PASSED[case]
    saved(tmp_path)
    change_tensors(tmp_path, change)
    check_weights(load(tmp_path))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == bool(message)
    assert message in "".join(told)
