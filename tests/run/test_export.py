"""The export: a stock checkpoint that gives our logits where this package does not exist."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fomoe_flwr.cli.main import main
from fomoe_flwr.model.families import model_class
from fomoe_flwr.report import live
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.run.stored import StoredRun

FAMILIES = {
    "olmoe, tied": ["model.tie_embeddings=true"],
    "olmoe, untied": ["model.tie_embeddings=false", "model.norm_topk=true"],
    "qwen3_moe, tied": ["model=qwen3-moe-tiny"],
    "qwen3_moe, untied": [
        "model=qwen3-moe-tiny",
        "model.tie_embeddings=false",
        "model.routing=partitioned",
        "model.norm_topk=true",
    ],
    "mixtral": ["model=mixtral-tiny"],
    "deepseek_v3": ["model=deepseek-v3-tiny"],
    "glm4_moe": ["model=glm4-moe-tiny", "model.tie_embeddings=false"],
    "fomoe": ["model=fomoe-tiny"],
}

STRANGER = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry not in ("", sys.argv[1])]
import numpy as np
import torch
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
)

for line in sys.stdin:
    folder, ids_file, logits_file, kind = json.loads(line)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=kind == "own"
    )
    for auto in (AutoModel, AutoModelForSequenceClassification) if kind == "own" else ():
        auto.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=kind == "own")
    ids = torch.from_numpy(np.load(ids_file))
    with torch.no_grad():
        np.save(logits_file, model(input_ids=ids).logits.numpy())
    prompt = tokenizer("The quick brown fox", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    print(json.dumps({
        "text": text,
        "class": type(model).__name__,
        "loading": {key: sorted(map(str, value)) for key, value in loading.items()},
        "ours": [name for name in sys.modules if name.startswith("fomoe")],
        "back": tokenizer.decode(tokenizer("Hello, world! \\u00e9")["input_ids"]),
        "eos": tokenizer.eos_token_id == model.config.eos_token_id,
    }), flush=True)
"""


def words(small_text: Path, out: Path) -> list[str]:
    return [
        "run",
        "preset=tiny",
        f"data.path={small_text}",
        f"output_dir={out}",
        "rounds=1",
        "local.threads=1",
        "local.steps=8",
        "local.lr=0.01",
        "eval.max_tokens=512",
        "eval.sample_tokens=4",
    ]


class Stranger:
    """A process that knows nothing of this package. It opens one export after the other."""

    def __init__(self, folder: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._log = folder / "stderr"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", STRANGER, str(Path(__file__).resolve().parents[2])],
                cwd=folder,
                env=environment | {"HF_MODULES_CACHE": str(folder / "modules")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def open(self, export: Path, ids: torch.Tensor, cwd: Path, kind: str) -> Any:
        """Load an export; return what there is to say about it, and its logits."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        np.save(cwd / "ids.npy", ids.numpy())
        paths = [str(path) for path in (export, cwd / "ids.npy", cwd / "logits.npy")]
        self._process.stdin.write(json.dumps([*paths, kind]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text("utf-8")
        return json.loads(answer), np.load(cwd / "logits.npy")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    """Return one stranger for all exports: its imports take longer than the rest."""
    started = Stranger(tmp_path_factory.mktemp("stranger"))
    yield started
    started.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stranger_loads_the_export_and_gets_our_logits(
    family: str,
    stranger: Stranger,
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Plots take longer than this run.
    monkeypatch.setattr(live, "draw_beside", lambda run: None)
    run = RunDirectory(tmp_path / "run")
    assert main([*words(small_text, run.path), *FAMILIES[family]]) == 0
    stored = StoredRun(run.path)
    ids = torch.randint(
        stored.settings.model.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        ours = stored.model(input_ids=ids, use_cache=False).logits.numpy()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kind = "own" if family == "fomoe" else "stock"
    said, theirs = stranger.open(run.export, ids, elsewhere, kind)

    assert ours.shape == (3, 33, stored.settings.model.vocab_size)
    assert float(np.abs(ours - theirs).max()) <= 1e-5
    assert float(ours.std()) > 0.01
    assert not [name for name in said["ours"] if name.startswith("fomoe_flwr")]
    assert said["loading"] == {key: [] for key in said["loading"]}
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(said["loading"])
    assert said["class"] == model_class(stored.settings.model.family).__name__
    assert said["text"].startswith("The quick brown fox")
    assert len(said["text"]) > len("The quick brown fox")
    assert said["back"] == "Hello, world! é"
    card = (run.export / "README.md").read_text(encoding="utf-8")
    assert "| rounds | 1 of " in card or "| rounds | 2 of " in card
    assert f"| family | `{stored.settings.model.family}` |" in card
    assert str(tmp_path) not in card
    assert (
        json.loads((run.export / "tokenizer_config.json").read_text())["model_max_length"] <= 4096
    )
    assert said["eos"]


@pytest.fixture(scope="module")
def finished(
    small_text: Path, tmp_path_factory: pytest.TempPathFactory, _own_cache: None
) -> RunDirectory:
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "run")
    assert main([*words(small_text, run.path), "eval.max_tokens=1024"]) == 0
    return run


def described(path: Path) -> dict[str, Any]:
    words = json.loads(path.read_text(encoding="utf-8"))
    return {k: v for k, v in words.items() if k not in ("is_local", "local_files_only")}


def test_export_writes_the_same_checkpoint_again(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished.path), "--to", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "copy")
    names = sorted(path.name for path in finished.export.iterdir())
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == names
    for name in names:
        copy, original = (folder / name for folder in (tmp_path / "copy", finished.export))
        if name == "tokenizer_config.json":
            # transformers notes there whether a tokenizer came from a folder.
            assert described(copy) == described(original)
        else:
            assert copy.read_bytes() == original.read_bytes(), name


def test_evaluate_repeats_the_loss_of_the_last_round(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished.path)]) == 0
    result = json.loads(capsys.readouterr().out)
    row = finished.read_metrics()[-1]
    for key in ("round", "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/tokens"):
        assert result[key] == row[key], key
    assert result["split"] == "validation"


def test_evaluate_scores_the_test_split_on_as_many_tokens_as_asked(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished.path), "--split", "test", "--max-tokens", "256"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["split"], result["eval/tokens"]) == ("test", 256)
    assert math.isfinite(result["eval/loss"])


def test_sample_continues_the_prompt_and_depends_on_the_seed_alone(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        asked = ["--prompt", "A certain", "--tokens", "12", "--seed", seed]
        assert main(["sample", str(finished.path), *asked]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("A certain") for text in texts)


def test_report_prints_the_table_and_draws_the_plots_again(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = sorted(path.name for path in finished.plots.iterdir())
    assert {"layout.png", "loss.png", "routing.png"} <= set(drawn)
    for path in finished.plots.iterdir():
        path.unlink()
    assert main(["report", str(finished.path)]) == 0
    printed = capsys.readouterr().out
    assert f"{finished.read_metrics()[-1]['eval/loss']:.4f}" in printed
    assert str(finished.export) in printed
    assert sorted(path.name for path in finished.plots.iterdir()) == drawn


@pytest.mark.parametrize("command", ["evaluate", "sample", "export", "report"])
def test_a_folder_that_is_no_run_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not a run directory: it has no config.yaml\n"
    )


@pytest.mark.parametrize("command", ["evaluate", "sample", "export"])
def test_a_run_with_a_damaged_checkpoint_is_refused(
    command: str, finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in finished.path.rglob("*"):
        if path.is_file() and ("checkpoints" in path.parts or path.parent.name == "tokenizer"):
            copy = tmp_path / path.relative_to(finished.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "config.yaml").write_bytes(finished.config.read_bytes())
    damaged = tmp_path / "checkpoints" / "round-000001" / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main([command, str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot read the checkpoint {damaged.parent}: ")


def test_report_of_a_run_without_a_finished_round_is_no_traceback(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes(finished.config.read_bytes())
    assert main(["report", str(tmp_path)]) in (0, 2)
