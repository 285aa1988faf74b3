"""A released checkpoint of any family, through a whole run: what comes out is what went in.

Learning rates are so small that no weight moves, so the export must give the checkpoint's logits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from registry import families, tiny
from transformers import AutoModelForCausalLM

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
    train_tokenizer([text], config.vocab_size).save_pretrained(folder)
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
    scale = float(want.abs().max())
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=1e-4)
