"""The operating system says no: one line with the path, the reason and what to do."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import assert_same_end, only_error

from fomoe_flwr import files
from fomoe_flwr.cli.main import main
from fomoe_flwr.data.tokens import _save
from fomoe_flwr.errors import refusal
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.sweep.job import run_command

Start = Callable[..., RunDirectory]
NOWHERE = "/proc/nowhere/x"
"""A path that no user can make, root included."""

REASONS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room",
    errno.EACCES: "permit it",
    errno.EROFS: "permit it",
    errno.ENOENT: "make its folder",
    errno.EIO: "mend it",
}


@pytest.mark.parametrize("number", REASONS)
def test_a_refusal_names_path_reason_and_way_on(number: int) -> None:
    error = OSError(number, os.strerror(number), "/some/where")
    expected = f"/some/where: {os.strerror(number)}: {REASONS[number]}, or name another place"
    assert refusal(error) == expected


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: files.save_text("x" * 9000, path),
    "lines": lambda path: [files.append_line(path, {"x": "x" * 9000}) for _ in range(2)],
    "folder": lambda path: files.replace_folder(
        path, lambda draft: (draft / "a").write_text("x" * 9000, encoding="utf-8")
    ),
    "tensors": lambda path: _tensors(path),
    "arrays": lambda path: files.replace_file(path, lambda draft: _array(draft)),
}


def _tensors(path: Path) -> None:
    import torch

    from fomoe_flwr.model.tensor_files import save_tensors

    save_tensors({"a": torch.zeros(4000)}, path, {})


def _array(path: Path) -> None:
    import numpy as np

    _save(np.zeros(4000), path)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_writer_names_the_file_and_leaves_no_draft(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="File too large") as caught, no_file_larger_than(8000):
        write(tmp_path / "target")
    assert caught.value.filename == str(tmp_path / "target")
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[Path]]:
    """Return a function that lets the disk take so many writes; returns what it will take."""

    def limit(most: int) -> list[Path]:
        taken: list[Path] = []

        def flush(path: Path) -> None:
            if not path.is_relative_to(tmp_path):
                return  # Caches are warm or not.
            if len(taken) >= most:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            taken.append(path)

        monkeypatch.setattr(files, "_flush", flush)
        return taken

    return limit


def test_a_run_that_stops_for_a_full_disk_goes_on_as_if_nothing_had_been(
    start: Start,
    words: list[str],
    tmp_path: Path,
    full_after: Callable[[int], list[Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    count = full_after(10**6)
    whole = start("whole", "rounds=2")
    # The last two are the heartbeat's, which says that the run has ended.
    total = len(count) - 3
    for taken in range(1, total, total // 6):
        run = RunDirectory(tmp_path / f"run-{taken}")
        again = [*words, "rounds=2", f"output_dir={run.path}"]
        full_after(taken)
        capsys.readouterr()
        assert main(again) == 1
        (line,) = [k for k in capsys.readouterr().err.splitlines() if k.startswith("error: ")]
        assert f"error: the run stopped at {run.path}" in line
        assert "No space left on device: make room" in line
        full_after(10**6)
        if f"go on with fomoe run resume={run.path}" in line:
            again = ["run", f"resume={run.path}"]
        else:
            assert line.endswith("start it again")
        assert main(again) == 0
        assert_same_end(run, whole)


@pytest.mark.parametrize("most", [1000, 20_000, 60_000, 300_000])
def test_a_first_round_that_the_disk_does_not_take(
    most: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer's file is one of them, and a library in Rust writes it."""
    with no_file_larger_than(most):
        assert main([*words, f"output_dir={tmp_path / 'run'}"]) in (1, 2)
    (line,) = [k for k in capsys.readouterr().err.splitlines() if k.startswith("error: ")]
    assert f"{tmp_path / 'run'}" in line
    assert "File too large" in line
    assert not list((tmp_path / "run").glob(".*.draft"))


def test_a_checkpoint_that_the_disk_does_not_take(
    start: Start, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = start("whole", "rounds=2")
    run = start("run", "rounds=1")
    capsys.readouterr()
    with no_file_larger_than(100_000):
        assert main(["run", f"resume={run.path}", "rounds=2"]) == 1
    assert "File too large: make room" in capsys.readouterr().err
    assert main(["run", f"resume={run.path}", "rounds=2"]) == 0
    assert_same_end(run, whole)


COMMANDS = (
    f"run preset=tiny output_dir={NOWHERE}",
    "export RUN --to",
    "costs preset=tiny --sweep",
    "sweep preset=tiny seed=1,2 --dir",
    "bench step preset=tiny --to",
    "federation up --nodes=1",
    "federation up --nodes=1 --detach",
    "federation run --nodes=1",
    "federation submit",
    "federation credentials --host=localhost",
    "federation node-key",
    "worker",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_made_is_told_in_one_line(
    command: str, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = command.split()
    if "RUN" in given:
        run = tmp_path / "run"
        assert main([*words, "rounds=1", f"output_dir={run}"]) == 0
        given[given.index("RUN")] = str(run)
    if "run" not in given[:1]:
        given.append(NOWHERE)
    if given[:2] == ["federation", "submit"]:
        given += ["preset=tiny", f"output_dir={tmp_path / 'out'}"]
    if given[:2] == ["federation", "node-key"]:
        given.append("berlin")
    capsys.readouterr()
    assert main(given) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "/proc" in line
    assert "another" in line or "new or an empty" in line


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_run_that_may_only_be_read(
    command: str,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start("run", "rounds=1")
    monkeypatch.undo()
    capsys.readouterr()

    def refuse(path: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(files, "_draft_of", refuse)
    assert main([command, str(run.path)]) == 1
    target = run.report if command == "report" else run.export
    assert capsys.readouterr().err == (
        f"error: {target}: Permission denied: permit it, or name another place\n"
    )


@pytest.mark.parametrize("cache", [NOWHERE, "FILE"])
def test_a_cache_that_cannot_be_written(
    cache: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    cache = cache.replace("FILE", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert main([*words, f"output_dir={tmp_path / 'out'}"]) == 2
    found = only_error(capsys)
    assert found.startswith(f"the cache {cache}/fomoe/tokenizers/")
    assert found.endswith("; set XDG_CACHE_HOME to a folder that can be written and has room")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away home, cache and the user's line in the password file."""

    def unknown(_: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")


def test_a_user_without_a_home(
    homeless: None, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, f"output_dir={tmp_path / 'out'}"]) == 2
    assert only_error(capsys).startswith("this user has no home folder to cache in: set XDG_CACHE")
    reason = "~/run: ~ stands for no folder that is known: write it out"
    with pytest.raises(SystemExit, match="2"):
        main(["status", "~/run"])
    assert capsys.readouterr().err.strip().endswith(f"argument RUN: {reason}")
    assert main([*words, "output_dir='~/run'"]) == 2
    assert only_error(capsys).endswith(reason)


def test_the_c_locale_and_names_beyond_it(tmp_path: Path) -> None:
    (tmp_path / "é").mkdir()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("LC_")}
    done = subprocess.run(
        [*run_command([])[:-1], "status", str(tmp_path / "é")],
        env={**plain, "LANG": "C", "LC_ALL": "C"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    expected = f"error: {tmp_path / 'é'} is not a run directory: it has no config.yaml\n"
    assert done.stderr.decode() == expected
