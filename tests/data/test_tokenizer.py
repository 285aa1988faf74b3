from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fomoe_flwr.data import DataError
from fomoe_flwr.data.corpus import Document
from fomoe_flwr.data.tokenizer import (
    load_tokenizer,
    token_byte_lengths,
    tokenizer_digest,
    tokenizer_from_json,
    tokenizer_json,
    train_tokenizer,
)

ODD_TEXTS = ["", " ", "\n\n\t x", "naïve 東京 🙂\u200d", "\x00\x7f\u2028", "a  b   c\r\n"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_round_trip_is_exact(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_real_text(
    tokenizer: PreTrainedTokenizerFast, embedded_train: list[Document]
) -> None:
    for document in embedded_train[::150]:
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text


def test_special_tokens_and_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert len(tokenizer) == 600


def test_training_is_deterministic_and_may_give_fewer_tokens() -> None:
    texts = ["the cat sat on the mat", "the dog"]
    first, second = (tokenizer_json(train_tokenizer(iter(texts), 1000)) for _ in range(2))
    assert first == second
    assert 258 <= len(tokenizer_from_json(first)) < 1000


def test_vocab_that_cannot_hold_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size=257.*at least 258"):
        train_tokenizer(["x"], 257)


def test_json_carries_everything(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer_json(tokenizer)
    again = tokenizer_from_json(text)
    assert tokenizer_json(again) == text
    assert again.eos_token_id == 0
    assert again.pad_token_id == 1
    assert again.encode("Some words.") == tokenizer.encode("Some words.")
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_json(tokenizer) == text
    assert len(tokenizer_digest(text)) == 64
    assert tokenizer_digest(text) != tokenizer_digest(text + " ")


def test_load_folder_and_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        loaded = load_tokenizer(path)
        assert loaded.encode("Some words.") == tokenizer.encode("Some words.")
        assert loaded.eos_token_id == 0


def test_load_folder_with_nothing_but_tokenizer_json(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("Some words.") == tokenizer.encode("Some words.")
    assert loaded.eos_token_id == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"special_tokens": {}, "tokenizer": 3}'])
def test_bad_tokenizer_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    for action in (
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
        lambda: load_tokenizer(tmp_path),
        lambda: tokenizer_from_json(content),
    ):
        with pytest.raises(DataError) as error:
            action()
        assert "data.tokenizer" in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(DataError, match=r"data\.tokenizer"):
            load_tokenizer(path)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "dbrx"])
def test_folder_with_a_config_alone_holds_no_tokenizer(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="slow"):
        load_tokenizer(tmp_path)


def test_byte_lengths_sum_to_the_bytes_of_real_text(
    tokenizer: PreTrainedTokenizerFast, embedded_train: list[Document]
) -> None:
    lengths = token_byte_lengths(tokenizer, 640)
    assert lengths.dtype == np.int32
    assert lengths.shape == (640,)
    assert lengths[:2].tolist() == [0, 0]
    assert not lengths[600:].any()
    for text in [*ODD_TEXTS, *(d.text for d in embedded_train[::150])]:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_lengths_sum_to_the_bytes_of_any_text(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    lengths = token_byte_lengths(tokenizer, 600)
    backend = tokenizer.backend_tokenizer
    # As corpora are encoded: a special token that a text spells out is text.
    backend.encode_special_tokens = True
    ids = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    assert lengths[ids].sum() == len(text.encode())


def test_added_tokens_count_their_own_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    extended = tokenizer_from_json(tokenizer_json(tokenizer))
    extended.add_tokens(["    ", "東京"])
    lengths = token_byte_lengths(extended, 602)
    assert lengths[600:].tolist() == [4, 6]


def test_byte_lengths_of_a_sentencepiece_like_tokenizer() -> None:
    vocab = {"<unk>": 0, "▁": 1, "▁hello": 2, "world": 3, "<0xC3>": 4, "<0xA9>": 5}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    lengths = token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend), 8)
    assert lengths[1:].tolist() == [1, 6, 5, 1, 1, 0, 0]


def test_vocab_smaller_than_the_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"600 tokens but model\.vocab_size=512"):
        token_byte_lengths(tokenizer, 512)


def test_plain_tokenizer_json_text_is_accepted(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = json.loads(tokenizer_json(tokenizer))["tokenizer"]
    assert tokenizer_from_json(json.dumps(plain)).eos_token_id == 0
