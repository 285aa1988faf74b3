"""The paper's block against its formulas in float64, and its export in a process without us."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from micro import micro_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fomoe_flwr.config import ModelSettings
from fomoe_flwr.data.tokenizer import train_tokenizer
from fomoe_flwr.model import fomoe
from fomoe_flwr.model.blocks import moe_blocks
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.model.router_probe import RouterProbe
from fomoe_flwr.model.state import state_of
from fomoe_flwr.run.export import export_model
from fomoe_flwr.worker.training_model import token_loss

SHAPE = micro_model(
    family="fomoe",
    # As many key heads as heads: the family knows no others.
    num_kv_heads=2,
    # The size of the tokenizer that is exported with it.
    vocab_size=300,
    # Every multiplier differs from 1 and from the others.
    hidden_size=32,
    base_hidden_size=8,
    base_num_layers=1,
)
IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def model_of(shape: ModelSettings = SHAPE, **how: object) -> PreTrainedModel:
    return build_model(shape, transformers_config(shape, 8), seed=1, **how).eval()


def reference(state: dict[str, Tensor], shape: ModelSettings, ids: Tensor) -> Tensor:
    """Compute the logits of one sequence from sections 2.4 and 2.6 of the dossier, in float64."""
    w = {key: value.double() for key, value in state.items()}
    width = shape.hidden_size / shape.base_hidden_size
    branch = shape.base_num_layers / shape.num_layers
    head = shape.hidden_size // shape.num_heads
    length = len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        half = head // 2
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(half) / half).double()
        pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pairs.real, pairs.imag), -1)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (
            (x @ w[f"{name}.{part}_proj.weight"].T).split(head, -1) for part in ("q", "k", "v")
        )
        heads = []
        for query, key, value in zip(q, k, v, strict=True):
            scores = turn(query) @ turn(key).T / head
            scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ value)
        return torch.cat(heads, -1) @ w[f"{name}.o_proj.weight"].T

    def experts(x: Tensor, name: str) -> Tensor:
        scores = (x @ w[f"{name}.gate.weight"].T / width).sigmoid()
        out = torch.zeros_like(x)
        for token in range(length):
            for expert in scores[token].topk(shape.top_k).indices:
                inner = F.silu(w[f"{name}.experts.up_proj"][expert] @ x[token])
                y = w[f"{name}.experts.down_proj"][expert] @ inner
                out[token] += scores[token, expert] * y
        return out

    x = norm(w["model.embed_tokens.weight"][ids], "model.embed_norm")
    for layer in range(shape.num_layers):
        name = f"model.layers.{layer}"
        mixed = attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
        x = x + branch * norm(mixed, f"{name}.post_attention_layernorm")
        routed = experts(norm(x, f"{name}.pre_feedforward_layernorm"), f"{name}.mlp")
        x = x + branch * norm(routed, f"{name}.post_feedforward_layernorm")
    unembedding = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ unembedding.T / width


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_its_formulas(attention: str, tied: bool) -> None:
    shape = replace(SHAPE, tie_embeddings=tied)
    model = model_of(shape)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(2))
        found = model(input_ids=IDS, use_cache=False).logits
    for row, ids in zip(found, IDS, strict=True):
        expected = reference(state_of(model), shape, ids)
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)
    assert float(found.std()) > 0.1


def test_hidden_matrices_shrink_with_the_width_and_the_others_do_not() -> None:
    wide = replace(SHAPE, hidden_size=256, expert_size=64, base_hidden_size=16, init_std=0.02)
    for name, value in state_of(model_of(wide)).items():
        if "norm" in name:
            assert (value == 1).all()
        elif "bias" in name:
            assert (value == 0).all()
        else:
            is_base = "embed" in name or "gate" in name
            expected = 0.02 if is_base else 0.02 / 4
            assert float(value.std()) == pytest.approx(expected, rel=0.08), name


def test_tokens_of_ghosts_only_give_finite_values_and_gradients() -> None:
    model = model_of(SHAPE, residents=((0,), (5,))).train()
    probe = RouterProbe(model, SHAPE.num_experts, ((0,), (5,)))
    loss = token_loss(model, IDS)
    loss.backward()
    assert 0.1 < probe.counts.all_ghost_fraction < 1
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_without_any_resident_choice_still_trains() -> None:
    model = model_of(SHAPE, residents=((0,), (5,))).train()
    for block in moe_blocks(model):
        block.router.e_score_correction_bias[:] = torch.tensor([-9.0, 0, 0, 0, 0, -9.0])
    probe = RouterProbe(model, SHAPE.num_experts, ((0,), (5,)))
    token_loss(model, IDS).backward()
    assert probe.counts.all_ghost_fraction == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_balance_loss_takes_sigmoid_scores_normalised_over_the_experts() -> None:
    model, seen = model_of().train(), []
    for block in moe_blocks(model):
        block.router.register_forward_hook(lambda _m, _i, out: seen.append((out[0], out[-1])))
    probe = RouterProbe(model, SHAPE.num_experts)
    model(input_ids=IDS, use_cache=False)
    by_hand = []
    for logits, chosen in seen:
        scores = 1 / (1 + (-logits).exp())
        probability = [(scores[:, e] / scores.sum(1)).mean().item() for e in range(6)]
        share = [(chosen == e).float().sum().item() / chosen.numel() for e in range(6)]
        by_hand.append(6 * sum(f * p for f, p in zip(share, probability, strict=True)))
    assert probe.losses().balance.item() == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    model = model_of()
    alone = model.generate(IDS[:1, 3:], max_new_tokens=4, do_sample=False)
    mask = torch.ones_like(IDS[:1])
    mask[:, :3] = 0
    padded = model.generate(IDS[:1], attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert padded[0, 3:].tolist() == alone[0].tolist()


def test_loss_hidden_states_and_kept_logits() -> None:
    model = model_of()
    out = model(input_ids=IDS, labels=IDS, output_hidden_states=True, use_cache=False)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert len(out.hidden_states) == SHAPE.num_layers + 1
    last = model(input_ids=IDS, logits_to_keep=1, use_cache=False).logits
    torch.testing.assert_close(last, out.logits[:, -1:])
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=IDS, inputs_embeds=out.hidden_states[0])


def test_the_auto_classes_know_the_family() -> None:
    config = AutoConfig.for_model("fomoe", hidden_size=32, num_attention_heads=2, vocab_size=300)
    assert isinstance(AutoModelForCausalLM.from_config(config), fomoe.FomoeForCausalLM)


def test_a_configuration_survives_its_file(tmp_path: Path) -> None:
    config = transformers_config(SHAPE, 8)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, fomoe.FomoeConfig)
    assert (again.width_multiplier, again.depth_multiplier, again.branch_multiplier) == (4, 2, 0.5)
    dropped = ("transformers_version", "_name_or_path", "dtype", "auto_map")
    first, second = (
        {k: v for k, v in c.to_dict().items() if k not in dropped} for c in (config, again)
    )
    assert first == second


@pytest.mark.parametrize("name", ["configuration_fomoe.py", "modeling_fomoe.py"])
def test_exported_code_imports_torch_and_transformers_only(name: str) -> None:
    tree = ast.parse((Path(fomoe.__file__).parent / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            allowed = ("torch", "transformers", "collections", "typing", "__future__")
            assert root in allowed or (node.level == 1 and root == "configuration_fomoe")
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= {"torch"}


STRANGER = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry not in ("", sys.argv[3])]
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, work = sys.argv[1:3]
model, loading = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
)
ids = torch.from_numpy(np.load(work + "/ids.npy"))
with torch.no_grad():
    np.save(work + "/logits.npy", model(input_ids=ids).logits.numpy())
    loss = model(input_ids=ids, labels=ids).loss
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The quick", return_tensors="pt")
print(json.dumps({
    "generated": model.generate(ids[:1], max_new_tokens=5, do_sample=False)[0].tolist(),
    "text": tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0]),
    "module": type(model).__module__,
    "experts": model.config._experts_implementation,
    "loading": {key: sorted(map(str, value)) for key, value in loading.items()},
    "ours": [name for name in sys.modules if name.startswith("fomoe_flwr")],
}))
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["The quick brown fox jumps over the lazy dog. " * 20], 300)


@pytest.mark.parametrize("tied", [True, False])
def test_a_stranger_loads_the_export_through_trust_remote_code(
    tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = model_of(replace(SHAPE, tie_embeddings=tied))
    export_model(model, tokenizer, tmp_path / "export", "a card")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"configuration_fomoe.py", "modeling_fomoe.py", "model.safetensors"} <= names
    np.save(tmp_path / "ids.npy", IDS.numpy())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "export"), str(tmp_path), root],
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ours"] == []
    assert said["module"].startswith("transformers_modules.")
    assert said["loading"] == {key: [] for key in said["loading"]}
    with torch.no_grad():
        ours = model(input_ids=IDS, use_cache=False).logits.numpy()
    assert float(np.abs(np.load(tmp_path / "logits.npy") - ours).max()) <= 1e-5
    mine = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert said["generated"] == mine[0].tolist()
    assert said["text"].startswith("The quick")
