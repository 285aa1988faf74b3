"""Prompts: none, of any letters, and longer than the model can read."""

from __future__ import annotations

import pytest
from micro import SEQUENCE, micro_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fomoe_flwr.cli.main import main
from fomoe_flwr.data.tokenizer import train_tokenizer
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import build_model
from fomoe_flwr.run.evaluation import sample_text

LONG = "a few words " * 1000


@pytest.fixture(scope="module")
def parts() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    shape = micro_model()
    model = build_model(shape, transformers_config(shape, SEQUENCE), seed=0)
    return model, train_tokenizer(["a few words"], shape.vocab_size)


@pytest.mark.parametrize("prompt", ["", " ", "\n", "é日\x00", "<|endoftext|>", LONG])
def test_every_prompt_is_continued(
    prompt: str, parts: tuple[PreTrainedModel, PreTrainedTokenizerFast]
) -> None:
    text = sample_text(*parts, prompt, max_tokens=4, seed=0)
    assert text.startswith(prompt.removeprefix("<|endoftext|>"))
    assert text == sample_text(*parts, prompt, max_tokens=4, seed=0)


def test_a_sample_may_be_longer_than_the_context(
    parts: tuple[PreTrainedModel, PreTrainedTokenizerFast],
) -> None:
    parts[0].config.max_position_embeddings, before = 4, parts[0].config.max_position_embeddings
    assert sample_text(*parts, "words", max_tokens=8, seed=0).startswith("words")
    parts[0].config.max_position_embeddings = before


@pytest.mark.parametrize(
    "words",
    [("--tokens", "0"), ("--tokens", "-1"), ("--seed", "-1"), ("--seed", str(2**63))],
)
def test_a_sample_of_nothing_is_refused_before_work_starts(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "/nowhere", *words]) == 2
    assert f"{words[0]} {words[1]} is out of range: it must be >= " in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "/nowhere", "--prompt", "a\udcff"]) == 2
    assert capsys.readouterr().err.startswith("error: 'a\\udcff' holds bytes that are no UTF-8")
