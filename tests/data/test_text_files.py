"""Which files are read, under which names, and what is said of the others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.corpus import read_documents, read_splits
from fomoe_flwr.data.holdout import SPLITS
from fomoe_flwr.data.summary import summarise_text
from fomoe_flwr.data.text_files import list_files, survey_files
from fomoe_flwr.data.tokenizer import tokenizer_json, train_tokenizer


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"text": name}) if "json" in name.lower() else name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("z") else text.encode())
    return root


def read(root: Path) -> dict[str, str]:
    """Return {text: split} of all that is read."""
    parts, _ = read_splits(DataSettings(path=str(root)))
    return {document.text: split for split in SPLITS for document in parts[split]}


@pytest.mark.parametrize(
    "name",
    [
        "a.txt", "a.TXT", "a.Text", "a.md", "a.MARKDOWN", "a.txt.gz", "a.MD.gz", "a.json",
        "a.JSONL", "a.ndjson", "a.jsonl.gz", "a.json.gz", "deep/er/a.txt", "link to.txt",
    ],
)  # fmt: skip
def test_text_of_every_kind_is_read(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, "b.txt", "c.txt")
    assert set(read(tmp_path)) == {name, "b.txt", "c.txt"}
    assert survey_files(str(tmp_path)).left_out == {}
    assert list_files(str(tmp_path / name))[0].domain in ("a", "link to")


@pytest.mark.parametrize("test", ["Test/a.txt", "TEST.txt", "x/Test/a.txt", "test.jsonl.gz"])
@pytest.mark.parametrize("validation", ["Validation/a.txt", "VAL.TXT", "Valid-00000-of-00002.txt"])
def test_a_split_is_known_in_capitals_too(test: str, validation: str, tmp_path: Path) -> None:
    write(tmp_path, test, validation, "book.txt")
    assert read(tmp_path) == {test: "test", validation: "validation", "book.txt": "train"}
    assert {file.domain.lower() for file in list_files(str(tmp_path))} <= {
        "x", "book", "a", tmp_path.name.lower(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.pdf", "kind .pdf is not read"),
        ("a.csv.gz", "kind .gz is not read"),
        ("a.parquet.gz", "kind .gz is not read"),
        ("LICENSE", "kind without suffix is not read"),
        ("README.md", "says what is in a folder"),
        (".hidden.txt", "hidden"),
    ],
)
def test_a_file_that_is_left_out_is_named_with_the_reason(
    name: str, reason: str, tmp_path: Path
) -> None:
    write(tmp_path, "1.txt", "2.txt", "3.txt", name)
    assert set(read(tmp_path)) == {"1.txt", "2.txt", "3.txt"}
    assert survey_files(str(tmp_path)).left_out == {name: reason}


def test_a_book_beside_train_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train.txt", "val.txt", "test.txt", "book.txt")
    assert set(read(tmp_path)) == {"train.txt", "val.txt", "test.txt"}
    (reason,) = survey_files(str(tmp_path)).left_out.items()
    assert reason == ("book.txt", "others are named train, it is named after no split")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    root = write(tmp_path / "root", "a.txt", "sub/b.txt")
    other = write(tmp_path / "other", "c.txt", "deep/d.txt")
    (other / "back").symlink_to(root)
    (root / "one").symlink_to(other)
    (root / "two").symlink_to(other)
    (root / "deep").symlink_to(other / "deep")
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "alias").symlink_to(root / "sub")
    (root / "nothing.txt").symlink_to(tmp_path / "nowhere")
    found = survey_files(str(root))
    names = [file.path.relative_to(root).as_posix() for file in found.files]
    assert sorted(Path(name).name for name in names if name != "deep/d.txt") == [
        "a.txt", "b.txt", "c.txt", "d.txt",
    ]  # fmt: skip
    assert {"loop", "up", "alias", "two", "one/back"} <= found.left_out.keys()
    assert found.left_out["nothing.txt"] == "a link to nothing"


def test_a_folder_without_text_says_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.pdf" for number in range(8)))
    with pytest.raises(DataError, match=r"left out: 0\.pdf, .*4\.pdf and 3 more \(kind \.pdf"):
        list_files(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"x" * 9000, mtime=0)[:-12], b"\x1f\x8b\x08"],
    ids=["no gzip", "cut", "a head alone"],
)
def test_a_damaged_gz_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt\.gz"):
        read_documents(DataSettings(path=str(tmp_path)), "train")


def test_the_summary_counts_every_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write(tmp_path / "root", "a.pdf")
    (root / "train.txt").write_text("one two three " * 3000)
    (root / "val.txt").write_text("one two three " * 300)
    (root / "Test.txt").write_text("é")
    tokenizer = tokenizer_json(train_tokenizer(["one two three"], 300))
    found = summarise_text(DataSettings(path=str(root), sequence_length=8), tokenizer)
    assert found.files == 3
    assert found.left_out == "a.pdf (kind .pdf is not read)"
    sizes = {split: (size.documents, size.bytes) for split, size in found.splits.items()}
    assert sizes == {"train": (1, 42_000), "validation": (1, 4200), "test": (1, 2)}
    tokens = [found.splits[split].tokens for split in SPLITS]
    assert tokens[0] > tokens[1] > 0
    assert tokens[2] == 0


def test_the_summary_of_a_stream_counts_files(tmp_path: Path) -> None:
    root = write(tmp_path, "a.txt", "b.jsonl", "c.pdf")
    found = summarise_text(DataSettings(path=str(root), dataset="json"), "")
    assert (found.files, found.splits) == (1, {})
    assert "c.pdf" in found.left_out
