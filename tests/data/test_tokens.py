from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError, tokens
from fomoe_flwr.data.corpus import Document
from fomoe_flwr.data.tokenizer import tokenizer_from_json, tokenizer_json
from fomoe_flwr.data.tokens import TokenBlocks, cached_blocks, heldout_windows, pack

DOCUMENTS = [
    Document("Beta text number one. " * 6, "beta"),
    Document("Alpha speaks. " * 9, "alpha"),
    Document("Beta again, shorter.", "beta"),
]


def test_packing_keeps_every_token_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(DOCUMENTS, tokenizer, 8)
    expected = [
        token
        for index in (1, 0, 2)  # by domain, else as given
        for token in [*tokenizer.encode(DOCUMENTS[index].text), 0]
    ]
    assert blocks.tokens.tolist() == expected
    assert blocks.tokens.dtype == np.uint16
    assert blocks.domains == ("alpha", "beta")
    assert blocks.num_blocks == (len(expected) - 1) // 8


def test_windows_overlap_by_one_and_target_every_token_once(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    blocks = pack(DOCUMENTS, tokenizer, 8)
    windows = blocks.window(np.arange(blocks.num_blocks))
    assert windows.shape == (blocks.num_blocks, 9)
    assert windows.dtype == np.int64
    targets = windows[:, 1:].ravel()
    assert targets.tolist() == blocks.tokens[1 : len(targets) + 1].tolist()
    assert (windows[1:, 0] == windows[:-1, -1]).all()
    assert blocks.window(np.array([], dtype=np.int64)).shape == (0, 9)


def test_domain_of_a_block_is_that_of_its_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(DOCUMENTS, tokenizer, 8)
    boundary = len(tokenizer.encode(DOCUMENTS[1].text)) + 1
    starts = np.arange(blocks.num_blocks) * 8
    assert blocks.domain_ids.dtype == np.int16
    assert blocks.domain_ids.tolist() == (starts >= boundary).astype(int).tolist()


@pytest.mark.parametrize("index", [-1, 10**6])
def test_window_outside_is_refused(tokenizer: PreTrainedTokenizerFast, index: int) -> None:
    with pytest.raises(IndexError):
        pack(DOCUMENTS, tokenizer, 8).window(np.array([index]))


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.tuples(st.text("ab \n", max_size=40), st.sampled_from("xyz")), max_size=20),
    length=st.integers(8, 16),
)
def test_packing_invariants(
    tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]], length: int
) -> None:
    documents = [Document(text, domain) for text, domain in texts]
    total = sum(len(tokenizer.encode(text)) + 1 for text, _ in texts)
    if total <= length:
        with pytest.raises(DataError, match=r"data\.sequence_length"):
            pack(documents, tokenizer, length)
        return
    blocks = pack(documents, tokenizer, length)
    assert len(blocks.tokens) == total
    assert (blocks.tokens == 0).sum() == len(documents)
    assert blocks.num_blocks * length + 1 <= total < (blocks.num_blocks + 1) * length + 1
    assert (np.diff(blocks.domain_ids) >= 0).all()


def test_special_tokens_in_a_text_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "before <|endoftext|> after <|pad|>"
    blocks = pack([Document(text, "a")], tokenizer, 8)
    assert (blocks.tokens[:-1] > 1).all()
    assert tokenizer.decode(blocks.tokens[:-1].tolist()) == text
    # The caller's tokenizer is as it was.
    assert tokenizer.encode("<|endoftext|>") == [0]


def test_truncation_of_a_tokenizer_file_does_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    cutting = tokenizer_from_json(tokenizer_json(tokenizer))
    cutting.backend_tokenizer.enable_truncation(4)
    cutting.backend_tokenizer.enable_padding(length=64)
    assert (
        pack(DOCUMENTS, cutting, 8).tokens.tolist() == pack(DOCUMENTS, tokenizer, 8).tokens.tolist()
    )


def test_large_vocabulary_takes_uint32() -> None:
    vocab = {f"w{n}": n for n in range(70_000)} | {"</s>": 70_000}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    large = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    blocks = pack([Document(f"w{n}", "a") for n in range(10)], large, 8)
    assert blocks.tokens.dtype == np.uint32
    assert blocks.tokens[1] == 70_000


def test_tokenizer_without_end_token_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(DataError, match=r"eos_token.*data\.tokenizer"):
        pack(DOCUMENTS, bare, 8)


def test_too_many_domains_are_refused(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MOST_DOMAINS", 1)
    with pytest.raises(DataError, match=r"2 domains.*data\.domain_key"):
        pack(DOCUMENTS, tokenizer, 8)


def made_blocks(sizes: list[int], length: int = 8) -> TokenBlocks:
    domain_ids = np.repeat(np.arange(len(sizes)), sizes).astype(np.int16)
    flat = np.zeros(len(domain_ids) * length + 1, dtype=np.uint16)
    return TokenBlocks(flat, domain_ids, tuple(f"d{n}" for n in range(len(sizes))), length)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8), max_tokens=st.integers(1, 2000))
def test_heldout_windows_are_even_over_domains(sizes: list[int], max_tokens: int) -> None:
    blocks = made_blocks(sizes)
    chosen = heldout_windows(blocks, max_tokens)
    assert chosen.dtype == np.int64
    assert len(chosen) == min(max(1, max_tokens // 8), blocks.num_blocks)
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(blocks.domain_ids[chosen], minlength=len(sizes))
    open_counts = counts[counts < np.array(sizes)]
    if len(open_counts):
        assert open_counts.max() - open_counts.min() <= 1
        assert counts.max() <= open_counts.max() or counts.max() <= open_counts.min() + 1
    assert (heldout_windows(blocks, max_tokens) == chosen).all()


def test_heldout_windows_spread_within_a_domain() -> None:
    assert heldout_windows(made_blocks([100]), 32).tolist() == [12, 37, 62, 87]


@pytest.fixture
def text_folder(tmp_path: Path) -> DataSettings:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"Text {number}. " * 30)
    return DataSettings(path=str(folder), sequence_length=16)


def same(left: TokenBlocks, right: TokenBlocks) -> bool:
    return (
        left.tokens.tolist() == right.tokens.tolist()
        and left.domain_ids.tolist() == right.domain_ids.tolist()
        and (left.domains, left.sequence_length) == (right.domains, right.sequence_length)
    )


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = tokens.pack

    def counting(*arguments: object) -> TokenBlocks:
        calls.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens, "pack", counting)
    return calls


def test_cache_is_reused(
    text_folder: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    packings: list[int],
) -> None:
    text = tokenizer_json(tokenizer)
    first = cached_blocks(text_folder, "train", text, tmp_path / "cache")
    second = cached_blocks(text_folder, "train", text, tmp_path / "cache")
    assert same(first, second)
    assert isinstance(second.tokens, np.memmap)
    assert not second.tokens.flags.writeable
    assert type(second.window(np.array([0]))) is np.ndarray
    assert len(packings) == 1


def test_cache_key_covers_what_shapes_blocks(
    text_folder: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    packings: list[int],
) -> None:
    text = tokenizer_json(tokenizer)

    def build(data: DataSettings, split: str = "train", tokenizer_text: str = text) -> int:
        cached_blocks(data, split, tokenizer_text, tmp_path / "cache")  # type: ignore[arg-type]
        return len(packings)

    fields = vars(text_folder)
    assert build(text_folder) == 1
    assert build(text_folder, "test") == 2
    assert build(DataSettings(**{**fields, "sequence_length": 32})) == 3
    assert build(DataSettings(**{**fields, "holdout_fraction": 0.3})) == 4
    assert build(text_folder, tokenizer_text=text + " ") == 5
    Path(text_folder.path, "0.txt").write_text("New text. " * 30)
    assert build(text_folder) == 6
    assert build(text_folder) == 6


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.npy", "domain_ids.npy", "index.json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink, lambda p: p.write_text("[1]")])
def test_damaged_cache_is_rebuilt(
    text_folder: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    packings: list[int],
    name: str,
    damage: object,
) -> None:
    text = tokenizer_json(tokenizer)
    whole = cached_blocks(text_folder, "train", text, tmp_path / "cache")
    kept = TokenBlocks(
        np.array(whole.tokens), whole.domain_ids, whole.domains, whole.sequence_length
    )
    (path,) = (tmp_path / "cache").rglob(name)
    damage(path)  # type: ignore[operator]
    assert same(cached_blocks(text_folder, "train", text, tmp_path / "cache"), kept)
    assert len(packings) == 2
    assert same(cached_blocks(text_folder, "train", text, tmp_path / "cache"), kept)
    assert len(packings) == 2


def test_no_draft_is_left(
    text_folder: DataSettings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    cached_blocks(text_folder, "train", tokenizer_json(tokenizer), tmp_path / "cache")
    names = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert names == ["domain_ids.npy", "index.json", "lock", "tokens.npy"]


def test_errors_name_the_split_or_the_cache(
    text_folder: DataSettings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = tokenizer_json(tokenizer)
    long = DataSettings(path=text_folder.path, sequence_length=4096)
    with pytest.raises(DataError, match=r"test split: the text has \d+ tokens, one block needs"):
        cached_blocks(long, "test", text, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used"):
        cached_blocks(text_folder, "train", text, tmp_path / "file")


def _build(arguments: tuple[str, str, str]) -> int:
    path, text, cache = arguments
    built: list[int] = []
    real = tokens.pack

    def counting(*given: object) -> TokenBlocks:
        built.append(1)
        return real(*given)  # type: ignore[arg-type]

    tokens.pack = counting  # type: ignore[assignment]
    cached_blocks(DataSettings(path=path, sequence_length=16), "train", text, Path(cache))
    return len(built)


def test_processes_tokenise_once(
    text_folder: DataSettings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    arguments = (text_folder.path, tokenizer_json(tokenizer), str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert sum(pool.map(_build, [arguments] * 3, chunksize=1)) == 1
    (index,) = (tmp_path / "cache").rglob("index.json")
    assert json.loads(index.read_text())["sequence_length"] == 16
