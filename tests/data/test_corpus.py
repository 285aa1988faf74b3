from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError, corpus
from fomoe_flwr.data.corpus import Document, embedded_corpus_path, fingerprint, read_documents
from fomoe_flwr.data.text_files import cut_text

DOMAINS = {
    "speeches", "novels", "scripture", "dictionary", "maths", "manuals", "c_code", "jargon",
}  # fmt: skip
SPLITS = ("train", "validation", "test")


def settings(path: Path | str = "", **changes: object) -> DataSettings:
    return DataSettings(path=str(path), **changes)  # type: ignore[arg-type]


def write_jsonl(path: Path, rows: list[object]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def refused(data: DataSettings, split: str = "train") -> str:
    with pytest.raises(DataError) as error:
        read_documents(data, split)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message


def test_embedded_corpus_has_eight_domains_and_three_splits() -> None:
    splits = {split: read_documents(DataSettings(), split) for split in SPLITS}  # type: ignore[arg-type]
    assert {split: len(documents) for split, documents in splits.items()} == {
        "train": 972,
        "validation": 64,
        "test": 64,
    }
    for documents in splits.values():
        assert {document.domain for document in documents} == DOMAINS
    assert set(Counter(d.domain for d in splits["test"]).values()) == {8}
    texts = {split: {d.text for d in documents} for split, documents in splits.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"])
    assert not texts["validation"] & texts["test"]


def test_embedded_corpus_is_found_on_sys_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = embedded_corpus_path()
    monkeypatch.setattr(corpus, "__file__", str(tmp_path / "corpus.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(real.parents[2])])
    assert embedded_corpus_path() == real.resolve()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DataError, match=r"data\.path"):
        embedded_corpus_path()


def test_damaged_embedded_corpus_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "corpus.parquet").write_bytes(b"PAR1 no more")
    monkeypatch.setattr(corpus, "__file__", str(tmp_path / "corpus.py"))
    assert "damaged" in refused(DataSettings())


def test_one_text_file_makes_three_splits(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {n}: " + "word " * 90 for n in range(90))
    (tmp_path / "book.txt").write_text(text)
    parts = {split: read_documents(settings(tmp_path / "book.txt"), split) for split in SPLITS}  # type: ignore[arg-type]
    pieces = cut_text(text, 0.02)
    assert 0 < sum(len(d.text) for d in parts["test"] + parts["validation"]) < len(text) / 5
    assert {d.domain for d in parts["train"]} == {"book"}
    assert max(len(d.text) for d in parts["train"]) <= 12_000
    # Neighbours in training are one document again.
    assert len(parts["train"]) < len(pieces) / 3
    assert sorted("".join(d.text for p in parts.values() for d in p)) == sorted(text)


def test_short_text_file_makes_three_splits(tmp_path: Path) -> None:
    # Equal pieces are one document, so the lines must differ.
    (tmp_path / "note.txt").write_text("".join(f"Line {n} of some words.\n" for n in range(250)))
    assert all(read_documents(settings(tmp_path / "note.txt"), split) for split in SPLITS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "x", "a\n\nb" * 9000, "x" * 50_000, "word " * 9000, "l\n" * 12_000],
)
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.4])
def test_pieces_joined_are_the_text(text: str, fraction: float) -> None:
    pieces = cut_text(text, fraction)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 12_000 for piece in pieces)


def test_splits_by_hash_are_disjoint_and_deterministic(tmp_path: Path) -> None:
    rows = [{"text": f"document {n % 150}", "domain": f"d{n % 3}"} for n in range(200)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    data = settings(tmp_path / "a.jsonl", holdout_fraction=0.1)
    parts = {split: read_documents(data, split) for split in SPLITS}  # type: ignore[arg-type]
    texts = {split: {d.text for d in documents} for split, documents in parts.items()}
    assert all(8 <= len(texts[split]) <= 22 for split in ("test", "validation"))
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["test"] & texts["validation"]
    assert sum(map(len, parts.values())) == 200
    write_jsonl(tmp_path / "a.jsonl", rows[::-1])
    assert {d.text for d in read_documents(data, "test")} == texts["test"]


@pytest.mark.parametrize(
    ("names", "validation"),
    [
        (("train.txt", "validation.txt", "test.txt"), "validation.txt"),
        (("train/a.txt", "valid/b.txt", "test/c.txt"), "valid/b.txt"),
        (("x/train/a.txt", "x/val/b.txt", "x/test/c.txt"), "x/val/b.txt"),
        (("train-00000-of-00001.txt", "val_0.txt", "test.1.txt"), "val_0.txt"),
    ],
)
def test_named_splits_are_kept(tmp_path: Path, names: tuple[str, ...], validation: str) -> None:
    for name in (*names, "left_out.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read_documents(settings(tmp_path), "validation")] == [validation]
    assert [d.text for d in read_documents(settings(tmp_path), "train")] == [names[0]]
    assert [d.text for d in read_documents(settings(tmp_path), "test")] == [names[2]]


def test_missing_splits_are_cut_from_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{n}"} for n in range(50)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "the test"}])
    assert [d.text for d in read_documents(settings(tmp_path), "test")] == ["the test"]
    sizes = [len(read_documents(settings(tmp_path), split)) for split in ("validation", "train")]
    assert min(sizes) >= 1
    assert sum(sizes) == 50


def test_only_heldout_named_leaves_the_rest_to_train(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "v"}])
    write_jsonl(tmp_path / "other.jsonl", [{"text": f"t{n}"} for n in range(50)])
    assert len(read_documents(settings(tmp_path), "train")) == 49
    assert [d.text for d in read_documents(settings(tmp_path), "validation")] == ["v"]


def test_a_name_that_only_begins_like_a_split_is_none(tmp_path: Path) -> None:
    for name in ("test_results", "training", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(5)])
    total = sum(len(read_documents(settings(tmp_path), split)) for split in SPLITS)  # type: ignore[arg-type]
    assert total == 15


def test_domains_come_from_column_folder_or_stem(tmp_path: Path) -> None:
    (tmp_path / "law" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("unseen")
    for number in range(5):
        (tmp_path / "law" / "deep" / f"{number}.txt").write_text(f"law {number}")
    (tmp_path / "poems.txt").write_text("a poem")
    rows = [{"text": "one", "domain": "x"}, {"text": "two", "domain": None}, {"text": None}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.table({"text": ["p", "q"], "domain": [1, 2]}), tmp_path / "t.parquet")
    found = {
        d.text: d.domain
        for split in SPLITS
        for d in read_documents(settings(tmp_path), split)  # type: ignore[arg-type]
    }
    assert found == {
        **{f"law {n}": "law" for n in range(5)},
        "a poem": "poems", "one": "x", "two": "rows", "p": "1", "q": "2",
    }  # fmt: skip


def test_split_folders_give_no_domain(tmp_path: Path) -> None:
    for name in ("train/novels/a.txt", "train/b.txt", "validation/novels/c.txt", "test/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    train = {d.text: d.domain for d in read_documents(settings(tmp_path), "train")}
    assert train == {"train/novels/a.txt": "novels", "train/b.txt": "b"}


def test_json_list_json_lines_and_other_keys(tmp_path: Path) -> None:
    rows = [{"body": f"text {n}\u2028more", "kind": "k"} for n in range(6)]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    for name in ("list.json", "lines.json"):
        data = settings(tmp_path / name, text_key="body", domain_key="kind")
        documents = [d for split in SPLITS for d in read_documents(data, split)]  # type: ignore[arg-type]
        assert len(documents) == 6
        assert documents[0].domain == "k"


def test_parquet_column_that_is_text_and_domain(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "t.parquet")
    data = settings(tmp_path / "t.parquet", domain_key="text")
    assert {d.text == d.domain for d in read_documents(data, "train")} == {True}


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    rows = ['{"text": "bad \\ud800 here"}', '{"text": "b"}', '{"text": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    texts = {
        d.text
        for split in SPLITS
        for d in read_documents(settings(tmp_path), split)  # type: ignore[arg-type]
    }
    assert texts == {"bad ? here", "b", "c"}


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    assert "does not exist" in refused(settings(tmp_path / "nowhere"))
    assert "holds no file" in refused(settings(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    assert ".txt .parquet" in refused(settings(tmp_path / "a.csv"))
    assert "stream" in refused(DataSettings(dataset="allenai/c4"))
    assert "'dev'" in refused(DataSettings(), "dev")
    if os.geteuid():
        (tmp_path / "b.txt").write_text("x")
        (tmp_path / "b.txt").chmod(0)
        assert "data.path" in refused(settings(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "0 different documents"),
        ("a.txt", b"  \n ", "0 different documents"),
        ("a.txt", b"short", "1 different documents"),
        ("a.txt", b"caf\xe9", "not UTF-8 (byte 3)"),
        ("a.parquet", b"nonsense", "as Parquet"),
        ("a.parquet", b"", "as Parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', "line 2 is no JSON object"),
        ("a.jsonl", b'{"body": "a"}', "no column 'text' (columns: body); set data.text_key"),
        ("a.jsonl", b'{"text": 7}', "holds int"),
        ("a.json", b'[{"text": "a"}, 3]', "item 2 is no JSON object"),
        ("a.json", b"[1,", "not JSON"),
        ("a.json", b'"text"', "no JSON object"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(settings(tmp_path / name))
    assert expected in message
    assert "data." in message


def test_parquet_without_the_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    assert "(columns: body, n); set data.text_key" in refused(settings(tmp_path))
    assert "holds int" in refused(settings(tmp_path, text_key="n"))


def test_empty_named_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "validation.txt").write_text("")
    assert "validation split has no text" in refused(settings(tmp_path), "validation")


def test_fingerprint_follows_content_and_settings(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.txt").write_text("text")
    base = fingerprint(settings(first))
    assert len(base) == 64
    assert fingerprint(settings(second)) == base
    assert fingerprint(settings(first, sequence_length=64, partition="by_domain")) == base
    assert fingerprint(settings(first, holdout_fraction=0.1)) != base
    assert fingerprint(settings(first, text_key="body")) != base
    (second / "a.txt").write_text("Text")
    assert fingerprint(settings(second)) != base
    (first / "a.txt").rename(first / "b.txt")
    assert fingerprint(settings(first)) != base
    assert fingerprint(DataSettings()) == fingerprint(DataSettings(holdout_fraction=0.1)) != base
    with pytest.raises(DataError):
        fingerprint(settings(tmp_path / "nowhere"))


def test_document_is_a_value() -> None:
    assert Document("a", "b") == Document("a", "b")
