"""A released checkpoint of any family, through a whole run: what comes out is what went in.

Learning rates are so small that no weight moves, so the export must give the checkpoint's logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from registry import families, tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fomoe_flwr.cli.main import main
from fomoe_flwr.data.tokenizer import train_tokenizer
from fomoe_flwr.model.families import class_of
from fomoe_flwr.report import live
from fomoe_flwr.run.directory import RunDirectory

QUICK = ("deepseek_v2", "deepseek_v4", "gemma4_text", "gpt_oss", "nemotron_h", "qwen3_next")
"""With dense layers, hashed and layer-wide routers, biases, Mamba and linear attention."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in families()
        if name != "zaya"
    ],
)
def test_a_round_that_changes_nothing_exports_the_checkpoints_logits(
    family: str, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "draw_beside", lambda run: None)
    folder, run = tmp_path / "released", RunDirectory(tmp_path / "run")
    torch.manual_seed(0)
    config = tiny(family)
    stock = class_of(config)._from_config(config).eval()
    stock.save_pretrained(folder, max_shard_size="200KB")
    text = small_text.read_text(encoding="utf-8") if small_text.is_file() else "some text"
    tokenizer = train_tokenizer([text], config.vocab_size)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    words = [
        *("run", "preset=tiny", "engine=in_process", f"model.pretrained={folder}", "rounds=1"),
        *("layout.num_workers=2", "layout.overlap=1", "local.steps=1", "local.lr=1e-30"),
        *("local.optimizer=sgd", "local.weight_decay=0", "eval.sample_tokens=2"),
        *(f"data.path={small_text}", f"output_dir={run.path}"),
    ]
    assert main(words) == 0
    assert run.read_metrics()[0]["round/participants"] == [0, 1]
    ids = torch.randint(5, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    exported = AutoModelForCausalLM.from_pretrained(run.export, dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = (m(input_ids=ids, use_cache=False).logits for m in (stock, exported))
    chat = AutoTokenizer.from_pretrained(run.export).chat_template
    assert chat == tokenizer.chat_template
    scale = float(want.abs().max())
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-4)


@pytest.fixture
def released(small_text: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "released"
    class_of(tiny("deepseek_v3"))._from_config(tiny("deepseek_v3")).save_pretrained(
        folder, max_shard_size="20KB"
    )
    text = small_text.read_text(encoding="utf-8")
    train_tokenizer([text], 300).save_pretrained(folder)
    return folder


def lose_a_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_file(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index), encoding="utf-8")


def lose_an_expert(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    kept = {k: v for k, v in index["weight_map"].items() if ".experts.5.up_proj" not in k}
    path.write_text(json.dumps({"weight_map": kept}), encoding="utf-8")


def lose_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def have_more_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] |= {"zzzz": 400}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose_a_file, "has no file model-00002-of-"),
        (cut_a_file, "is damaged: model-00002-of-"),
        (lose_a_tensor, "has no tensor model.norm.weight"),
        (lose_an_expert, "has no tensor model.layers.1.mlp.experts.5.up_proj.weight"),
        (lose_the_tokenizer, "has no tokenizer that can be loaded"),
        (have_more_words, "tokens, model.vocab_size=300 is too small"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_before_anything_is_written(
    harm: Callable[[Path], None],
    message: str,
    released: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(released)
    out = tmp_path / "run"
    words = ["preset=tiny", "engine=in_process", "layout.num_workers=2", "layout.overlap=1"]
    assert main(["run", *words, f"model.pretrained={released}", f"output_dir={out}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not out.exists()


def test_a_tokenizer_with_other_words_is_refused(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(["quite another text, with other pairs"], 280).save_pretrained(tmp_path / "own")
    words = ["preset=tiny", "engine=in_process", f"model.pretrained={released}"]
    out = tmp_path / "run"
    given = [f"data.tokenizer={tmp_path / 'own'}", f"output_dir={out}"]
    assert main(["run", *words, *given]) == 2
    assert "has other tokens than the tokenizer of" in capsys.readouterr().err
    assert not out.exists()


STOPS = {"bos_token_id": 3, "eos_token_id": [0, 5], "pad_token_id": 4}


@pytest.mark.parametrize(
    ("generation", "kept"),
    [
        ({}, {}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9},) * 2,
        ({"temperature": -1.0}, {}),  # refused by transformers, so left out
    ],
    ids=["none", "sampled", "broken"],
)
def test_an_export_generates_as_the_checkpoint_did(
    generation: dict[str, Any],
    kept: dict[str, Any],
    released: Path,
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live, "draw_beside", lambda run: None)
    for name, entries in (("config.json", STOPS), ("generation_config.json", generation)):
        path = released / name
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        path.write_text(json.dumps(found | entries), "utf-8")
    if not generation:
        (released / "generation_config.json").unlink()
    run = RunDirectory(tmp_path / "run")
    words = ["preset=tiny", "engine=in_process", f"model.pretrained={released}", "rounds=1"]
    words += [f"data.path={small_text}", f"output_dir={run.path}", "local.steps=1"]
    assert main(["run", *words]) == 0
    assert main(["export", str(run.path), "--to", str(tmp_path / "again")]) == 0
    for export in (run.export, tmp_path / "again"):
        config = json.loads((export / "config.json").read_text("utf-8"))
        assert {name: config[name] for name in STOPS} == STOPS
        said = json.loads((export / "generation_config.json").read_text("utf-8"))
        assert {name: said[name] for name in STOPS | kept} == STOPS | kept


@pytest.mark.parametrize("setting", ["model.pretrained", "model.upcycle"])
def test_a_resumed_run_needs_the_released_folder_no_more(
    setting: str,
    released: Path,
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(live, "draw_beside", lambda run: None)
    if setting == "model.upcycle":
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
        config = AutoConfig.for_model(
            "llama", vocab_size=300, hidden_size=32, num_hidden_layers=2, **sizes
        )
        for file in released.glob("*.safetensors*"):
            file.unlink()
        AutoModelForCausalLM.from_config(config).save_pretrained(released)
    run = tmp_path / "run"
    words = [
        *("run", "preset=tiny", "engine=in_process", f"{setting}={released}", "rounds=1"),
        *("layout.num_workers=2", "layout.overlap=1", "local.steps=1", "eval.sample_tokens=0"),
        *(f"data.path={small_text}", f"output_dir={run}"),
    ]
    assert main(words) == 0
    released.rename(tmp_path / "elsewhere")
    assert main(["run", f"resume={run}", "rounds=2", f"{setting}={released}"]) == 0
    assert main(["run", f"resume={run}", "rounds=3", f"{setting}={tmp_path}"]) == 2
    assert f"{setting} cannot change when a run is resumed" in capsys.readouterr().err
