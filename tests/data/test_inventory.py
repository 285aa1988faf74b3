"""Text that changed since a run began is noticed, by the run and by a worker."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError, inventory
from fomoe_flwr.data.inventory import check_inventory, check_worker_text, keep_inventory


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.jsonl"):
        (folder / name).write_text(json.dumps({"text": name}))
    return folder


def add(folder: Path) -> None:
    (folder / "new.txt").write_text("new")


def change(folder: Path) -> None:
    stat = (folder / "a.txt").stat()
    (folder / "a.txt").write_text('{"text": "b.txt"}')
    os.utime(folder / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def remove(folder: Path) -> None:
    (folder / "b.txt").unlink()


def rename(folder: Path) -> None:
    (folder / "sub" / "c.jsonl").rename(folder / "d.jsonl")


def all_of_it(folder: Path) -> None:
    for act in (add, change, remove):
        act(folder)


CHANGES = [
    (add, "added new.txt"),
    (change, "changed a.txt"),
    (remove, "removed b.txt"),
    (rename, "added d.jsonl; removed sub/c.jsonl"),
    (all_of_it, "changed a.txt; added new.txt; removed b.txt"),
]


@pytest.mark.parametrize(("act", "told"), CHANGES)
def test_a_run_says_which_files_differ(
    act: Callable[[Path], None], told: str, texts: Path, tmp_path: Path
) -> None:
    data, kept = DataSettings(path=str(texts)), tmp_path / "text.json"
    keep_inventory(kept, data, resumed=False)
    check_inventory(kept, data)
    act(texts)
    with pytest.raises(DataError) as error:
        check_inventory(kept, data)
    assert f"({told})" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("act", "told"), CHANGES)
def test_a_worker_says_which_files_differ(
    act: Callable[[Path], None], told: str, texts: Path, tmp_path: Path
) -> None:
    data = DataSettings(path=str(texts))
    check_worker_text(tmp_path / "worker", data)
    act(texts)
    for _ in range(2):
        with pytest.raises(DataError, match="began with") as error:
            check_worker_text(tmp_path / "worker", data)
        assert f"({told})" in str(error.value)


def test_a_worker_reads_files_again_only_if_they_were_touched(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataSettings(path=str(texts))
    check_worker_text(tmp_path / "worker", data)
    with monkeypatch.context() as patch:
        patch.delattr(inventory, "_digest")
        check_worker_text(tmp_path / "worker", data)
    (texts / "a.txt").touch()
    check_worker_text(tmp_path / "worker", data)


def test_text_may_move(texts: Path, tmp_path: Path) -> None:
    kept = tmp_path / "text.json"
    keep_inventory(kept, DataSettings(path=str(texts)), resumed=False)
    check_worker_text(tmp_path / "worker", DataSettings(path=str(texts)))
    shutil.move(texts, tmp_path / "moved")
    moved = DataSettings(path=str(tmp_path / "moved"))
    check_inventory(kept, moved)
    check_worker_text(tmp_path / "worker", moved)


def test_a_single_file_may_move_and_many_changes_are_counted(texts: Path, tmp_path: Path) -> None:
    kept = tmp_path / "text.json"
    keep_inventory(kept, DataSettings(path=str(texts / "a.txt")), resumed=False)
    (tmp_path / "a.txt").write_bytes((texts / "a.txt").read_bytes())
    check_inventory(kept, DataSettings(path=str(tmp_path / "a.txt")))
    for number in range(8):
        (texts / f"{number}.txt").write_text("x")
    with pytest.raises(DataError, match=r"added 0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt and 5 more"):
        check_inventory(kept, DataSettings(path=str(texts)))


@pytest.mark.parametrize(
    "data",
    [DataSettings(), DataSettings(dataset="allenai/c4")],
    ids=["embedded corpus", "hub data set"],
)
def test_what_has_no_files_of_the_user_stays_the_same(data: DataSettings, tmp_path: Path) -> None:
    keep_inventory(tmp_path / "text.json", data, resumed=False)
    check_inventory(tmp_path / "text.json", data)
    check_worker_text(tmp_path / "worker", data)


def test_a_stream_of_files_is_known_by_sizes_and_ends(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "ENDS_BYTES", 4)
    data, kept = DataSettings(path=str(texts), dataset="text"), tmp_path / "text.json"
    keep_inventory(kept, data, resumed=False)
    assert sorted(json.loads(kept.read_text())["files"]) == ["a.txt", "b.txt"]
    (texts / "sub" / "c.jsonl").unlink()  # No file of this stream.
    check_inventory(kept, data)
    (texts / "a.txt").write_text((texts / "a.txt").read_text() + "more")
    with pytest.raises(DataError, match=r"\(changed a\.txt\)"):
        check_inventory(kept, data)


@pytest.mark.parametrize("content", [None, "", "[]", '{"reader": 1, "files": {"a.txt": "0"}}'])
def test_an_older_run_goes_on_with_a_word(
    content: str | None, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, kept = DataSettings(path=str(texts)), tmp_path / "text.json"
    if content is not None:
        kept.write_text(content)
    keep_inventory(kept, data, resumed=True)
    assert capsys.readouterr().out.count("WARNING") == 1
